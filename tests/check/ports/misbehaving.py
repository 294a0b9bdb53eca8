"""The port of spec/ports/python, which is right, with one way to misbehave: python misbehaving.py HOW WHERE

WHERE is "start", "always" (every question), or a part of the ids of the cases it happens on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "spec" / "ports" / "python"))
import port

HOW, WHERE = sys.argv[1], sys.argv[2]
OUT = sys.stdout.buffer
LAST: list[str] = []


def say(text):
    OUT.write(text if isinstance(text, bytes) else text.encode())
    OUT.flush()


def sleep():
    time.sleep(600)


def for_ever(text, stream=OUT):
    while True:
        stream.write(text)


def answer_with(value):
    """The right reply with `value` for the first array of the answer, and the id as it came."""

    def wrong(reply):
        if "answer" not in reply:
            return value
        name = next(iter(reply["answer"]))
        return {**reply, "answer": {**reply["answer"], name: value}}

    return lambda reply: say(json.dumps(wrong(reply)) + "\n")


def replies(make):
    return lambda reply: say(json.dumps(make(reply)) + "\n")


def raw(text):
    """The reply's id in a line that json.dumps would not write."""
    return lambda reply: say(b'{"id": "%s", "answer": %s}\n' % (reply.get("id", "").encode(), text))


def right(reply):
    say(json.dumps(reply) + "\n")


def all_of(*steps):
    def do(reply):
        for step in steps:
            step(reply)

    return do


def child(detached):
    def fork(reply):
        subprocess.Popen(
            [sys.executable, "-S", "-c", "import time; time.sleep(5)", *([] if detached else sys.argv[3:])], start_new_session=detached
        )

    return fork


def die(code):
    return lambda reply: os._exit(code)


def complain(reply):
    print("out of memory", file=sys.stderr, flush=True)


def ignoring_stop(reply):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    right(reply)
    sleep()


WAYS = {
    "hangs": lambda reply: sleep(),
    "dies": all_of(complain, die(3)),
    "segfaults": lambda reply: os.kill(os.getpid(), signal.SIGSEGV),
    "leaves": die(0),
    "leaves-after": all_of(right, die(0)),
    "half-a-line": all_of(lambda reply: say('{"id": '), die(1)),
    "no-end-of-line": all_of(lambda reply: say(json.dumps(reply)), lambda reply: sleep()),
    "banner": all_of(lambda reply: say("Loading model...\n"), right),
    "junk": lambda reply: say(bytes(range(128, 256)) + b"\xff\xfe\n"),
    "utf-16": lambda reply: say((json.dumps(reply) + "\n").encode("utf-16")),
    "crlf": lambda reply: say(json.dumps(reply) + "\r\n"),
    "bom": lambda reply: say(b"\xef\xbb\xbf" + json.dumps(reply).encode() + b"\n"),
    "blank-lines": all_of(lambda reply: say("\n \n\r\n"), right),
    "floods-lines": lambda reply: for_ever(b"1\n" * 4096),
    "floods-after": all_of(right, lambda reply: for_ever(b"tick\n" * 4096)),
    "floods-blank": lambda reply: for_ever(b"\n" * 65536),
    "endless-line": lambda reply: for_ever(b"1234567890" * 65536),
    "floods-stderr": lambda reply: for_ever(b"warning: slow\n" * 4096, sys.stderr.buffer),
    "noisy-stderr": all_of(lambda reply: sys.stderr.write("warning: slow\n" * 50000), right),
    "twice": all_of(right, right),
    "wrong-id": replies(lambda reply: {**reply, "id": "lora.of.another.planet"}),
    "stale-id": lambda reply: say(json.dumps({**reply, "id": LAST[-1]}) + "\n"),
    "number-id": replies(lambda reply: {**reply, "id": 7}),
    "no-id": replies(lambda reply: {k: v for k, v in reply.items() if k != "id"}),
    "null": replies(lambda reply: None),
    "list": replies(lambda reply: [reply]),
    "nothing": replies(lambda reply: {"id": reply.get("id")}),
    "null-answer": replies(lambda reply: {**reply, "answer": None}),
    "list-answer": replies(lambda reply: {**reply, "answer": [1, 2]}),
    "missing": replies(lambda reply: {**reply, "answer": {}}),
    "extra": replies(lambda reply: {**reply, "answer": {**reply["answer"], "loss": [1.0]}}),
    "skips": replies(lambda reply: {"id": reply.get("id"), "skipped": "not built yet"}),
    "error": replies(lambda reply: {"id": reply.get("id"), "error": "thread 'main' panicked at src/lib.rs:12"}),
    "deep-error": lambda reply: say(b'{"id": "%s", "error": %s}\n' % (reply["id"].encode(), b"[" * 900 + b"]" * 900)),
    "adapters-null": replies(lambda reply: {**reply, "answer": {**reply["answer"], "adapters": None}}),
    "adapters-object": replies(lambda reply: {**reply, "answer": {**reply["answer"], "adapters": {"0": {}}}}),
    "adapters-numbers": replies(lambda reply: {**reply, "answer": {**reply["answer"], "adapters": [1]}}),
    "shape": answer_with([[1.0, 2.0]]),
    "scalar": answer_with(1.0),
    "empty": answer_with([]),
    "ragged": answer_with([[1.0, 2.0], [3.0]]),
    "text": answer_with("twelve"),
    "texts": answer_with([["a", "b"]]),
    "object": answer_with({"data": [1.0]}),
    "objects": answer_with([[{"value": 1}]]),
    "not-even": raw(b'{"y": [[NaN, Infinity]], "x": nan}'),
    "huge-integer": raw(b'{"y": [' + b"9" * 400 + b"]}"),
    "longest-integer": raw(b'{"y": [' + b"9" * 100_000 + b"]}"),
    "deep": raw(b'{"y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep-enough": raw(b'{"y": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "deep-open": lambda reply: say(b"[" * 100_000 + b"\n"),
    "surrogate": replies(lambda reply: {"id": reply.get("id"), "error": "\ud800 \x1b[31m"}),
    "closes-stdout": lambda reply: (os.close(1), sleep()),
    "closes-stdin": all_of(right, lambda reply: (os.close(0), sleep())),
    "child": all_of(child(False), right),
    "child-and-dies": all_of(child(False), die(1)),
    "detached-child-and-dies": all_of(child(True), die(1)),
    "detached-child": all_of(child(True), right),
    "ignores-stop": ignoring_stop,
    "name": replies(lambda reply: {"name": 7}),
    "dtype": replies(lambda reply: {**reply, "dtype": ["float32"]}),
    "unknown-dtype": replies(lambda reply: {**reply, "dtype": "posit16"}),
    "operations": replies(lambda reply: {**reply, "operations": "forward"}),
    "long-name": replies(lambda reply: {**reply, "name": "x" * 100_000}),
    "every-nan": lambda reply: say(json.dumps({**reply, "answer": _filled(reply["answer"], float("nan"))}) + "\n"),
    "every-null": replies(lambda reply: {**reply, "answer": _filled(reply["answer"], None)}),
    "every-huge": replies(lambda reply: {**reply, "answer": _filled(reply["answer"], 1.7e308)}),
    "every-inf": replies(lambda reply: {**reply, "answer": _filled(reply["answer"], "-inf")}),
}


def _filled(value, number):
    if isinstance(value, list):
        return [_filled(v, number) for v in value]
    return {k: _filled(v, number) for k, v in value.items()} if isinstance(value, dict) else number


def main():
    if HOW == "does-not-read":
        if WHERE == "start":
            sleep()
        say(json.dumps(port.INFO) + "\n")
        sys.stdin.buffer.readline()
        sleep()
    for line in sys.stdin:
        message = json.loads(line)
        if message["command"] == "stop":
            if HOW == "ignores-stop":
                sleep()
            break
        starting = message["command"] == "start"
        reply = port.INFO if starting else port.answer(message["case"])
        here = WHERE == "start" if starting else WHERE == "always" or WHERE in reply["id"]
        (WAYS[HOW] if here and HOW in WAYS and HOW != "ignores-stop" else right)(reply)
        LAST.append(reply.get("id", ""))


main()
