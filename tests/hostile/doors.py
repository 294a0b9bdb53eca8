"""Every public door that a folder from elsewhere comes in by, opened in a child with a limit of memory and of time.

    python -m tests.hostile.doors DOOR FOLDER_OF_CASES < names     one line of JSON for each name: what became of it

The room is made once; each case has a child of its own, a fork, so that what it takes is its own and the limit hits it alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_ref.errors import PeftRefError
from tests.hostile.corpus import adapter, checkpoint
from tests.hostile.corpus_folders import ADAPTERS, CHECKPOINTS

MEMORY = 700 * 2**20  # bytes of address space that a child may take beside what its parent had
SECONDS = 30  # after which it is killed

Door = Callable[[Path, Path], object]  # of the hostile folder, and of what is right and of the other kind


def _base(folder: Path) -> Any:
    from peft_ref.graph import CheckpointGraph

    return CheckpointGraph(folder)


def _config(folder: Path, right: Path) -> object:
    from peft_ref.files.adapter import load_config

    return load_config(folder)


def _adapter(folder: Path, right: Path) -> object:
    from peft_ref.files.adapter import load_adapter

    return load_adapter(folder)


def _model(folder: Path, right: Path) -> object:
    from peft_ref.model import adapt, load, merge_and_unload

    return merge_and_unload(load(adapt(_base(right)), folder))


def _lazily(folder: Path, right: Path) -> object:
    from peft_ref.model import adapt, load, merge_and_unload

    return merge_and_unload(load(adapt(_base(right)), folder, lazy=True))


def _hf_config(folder: Path, right: Path) -> object:
    from peft_ref.hf import PeftConfig

    return PeftConfig.from_pretrained(folder).to_dict()


def _hf_model(folder: Path, right: Path) -> object:
    from peft_ref.hf import PeftModel

    return PeftModel.from_pretrained(_base(right), folder)


def _command(*words: str) -> object:
    """The command line. Its error is on standard error, and its code says so; a traceback is ours to see."""
    from peft_ref.cli import main

    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    if code:
        assert code == 2, code
        raise PeftRefError(told.getvalue())
    return None


def _convert(folder: Path, right: Path) -> object:
    return _command("convert", str(folder), str(right.with_name("out")))


def _convert_on(folder: Path, right: Path) -> object:
    return _command("convert", str(right), str(right.with_name("out")), "--model", str(folder))


def _graph(folder: Path, right: Path) -> object:
    graph = _base(folder)
    return graph.modules(), [graph.weight(name) for name in graph.parameters()]


def _network(folder: Path, right: Path) -> object:
    from peft_ref.nn.load import load

    return load(folder)


def _under(folder: Path, right: Path) -> object:
    return _model(right, folder)


OF_ADAPTERS: Mapping[str, Door] = {
    "load_config": _config,
    "load_adapter": _adapter,
    "model.load": _model,
    "model.load, lazily": _lazily,
    "hf.PeftConfig": _hf_config,
    "hf.PeftModel": _hf_model,
    "peft-ref convert": _convert,
}
OF_CHECKPOINTS: Mapping[str, Door] = {
    "CheckpointGraph": _graph,
    "nn.load": _network,
    "model.load on it": _under,
    "peft-ref convert --model": _convert_on,
}


def outcome(door: Door, folder: Path, right: Path) -> dict[str, Any]:
    """What became of one folder: `error` is None where it was taken."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        door(folder, right)
        kind, message = None, ""
    except PeftRefError as error:
        kind, message = "PeftRefError", str(error)
    except BaseException as error:
        kind, message = type(error).__name__, f"{error!s:.500}"
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"error": kind, "message": message, "seconds": time.monotonic() - began, "megabytes": peak}


def in_a_child(door: Door, folder: Path, right: Path) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        signal.alarm(SECONDS)  # its default is to end the process
        found = outcome(door, folder, right)
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else {"error": f"ended by signal {status & 127}", "message": "", "seconds": SECONDS, "megabytes": 0.0}


def main(name: str) -> None:
    door = {**OF_ADAPTERS, **OF_CHECKPOINTS}[name]
    corpus, other = (ADAPTERS, checkpoint) if name in OF_ADAPTERS else (CHECKPOINTS, adapter)
    with tempfile.TemporaryDirectory() as place:
        right, hostile = Path(place) / "right", Path(place) / "hostile"
        other(right)
        # imported once, before the children: what is right is taken
        (adapter if name in OF_ADAPTERS else checkpoint)(hostile)
        door(hostile, right)
        for case in [line.rstrip("\n") for line in sys.stdin]:
            shutil.rmtree(hostile)
            corpus[case](hostile)
            found = in_a_child(door, hostile, right)
            print(json.dumps({"case": case, "named": str(hostile) in found["message"], **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
