"""A port that is a program: JSON lines on its standard input and output.

Whatever it does costs the one case it was asked, and nobody else: one that hangs is killed after its time, one that died or lost step is
started again, one that floods is cut off, garbage is reported. One that left politely (exit code 0) is started and asked again. One that
fails three times in a row on a method is not asked about that method for now, one that fails nine times in a row is given up.

No threads: one loop writes, reads and watches the clock on pipes that never block, so nothing is left behind, whoever holds a pipe open.
That needs POSIX; elsewhere there is `peft-ref check --answers`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, final

from peft_ref.check.case import Case
from peft_ref.check.port import BrokenPort, Failed, Port, Reply
from peft_ref.check.protocol import START, STOP, read_info, read_reply, run_message
from peft_ref.check.result import PortInfo

LONGEST_ANSWER = 8 * 2**20  # bytes; the longest right answer has some ten thousand
STDERR_KEPT = 2000  # bytes
GIVE_UP_METHOD, GIVE_UP_PORT = 3, 9  # failures in a row
STOP_TIME = 2.0  # seconds a program has to end after "stop"
GLANCE = 0.1  # how often to see whether a program that says nothing is still there
HINT = "Standard output is for answers alone, one JSON object per line; print anything else to standard error"


class _Trouble(Exception):
    """The program did not answer properly; the message says how."""


class _Left(_Trouble):
    """It ended with exit code 0 and without a word: perhaps before it was asked."""


@final
class ProgramPort(Port):
    """The program `command`. `timeout` is seconds per question; the first answer may take `start_timeout`."""

    def __init__(self, command: Sequence[str], timeout: float = 10.0, start_timeout: float = 60.0, validate: bool = False) -> None:
        self._command, self._timeout, self._start_timeout, self._validate = list(command), timeout, start_timeout, validate
        self._process: _Process | None = None
        self._answered: set[str] = set()
        self._failed: list[str] = []  # the methods of the latest failures in a row

    def start(self) -> PortInfo:
        began = time.monotonic()
        try:
            self._process = _Process(self._command)
            info = read_info(self._process.exchange(START, self._start_timeout), self._validate)
        except _Trouble as trouble:
            self._kill()
            raise BrokenPort(f"{' '.join(self._command)}: asked to start, it {trouble}") from None
        except BrokenPort as broken:
            self._kill()
            raise BrokenPort(f"{' '.join(self._command)}: {broken}") from None
        except (OSError, ValueError) as error:
            raise BrokenPort(f"{' '.join(self._command)}: cannot be started: {_why(error)}") from None
        # Started again later, it has no more to do than the first time.
        self._start_timeout = min(self._start_timeout, max(self._timeout, 10 * (time.monotonic() - began)))
        return info

    def ask(self, case: Case) -> Reply:
        if len(self._failed) >= GIVE_UP_PORT:
            return Failed(f"not asked: the program failed {GIVE_UP_PORT} times in a row")
        if self._failed.count(case.method) >= GIVE_UP_METHOD:
            return Failed(f"not asked: the program failed {GIVE_UP_METHOD} times in a row on {case.method}")
        try:
            try:
                message = self._exchange(case)
            except _Left:
                self._kill()
                message = self._exchange(case)
            self._check_step(case, message)
        except (_Trouble, BrokenPort) as trouble:
            self._failed.append(case.method)
            self._kill()
            return Failed(f"the program {trouble}" if isinstance(trouble, _Trouble) else str(trouble))
        self._failed.clear()
        self._answered.add(case.id)
        return read_reply(case, message, self._validate)

    def forget(self) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _exchange(self, case: Case) -> dict[str, Any]:
        if self._process is None:
            self.start()
        assert self._process is not None
        return self._process.exchange(run_message(case), self._timeout)

    def _check_step(self, case: Case, message: dict[str, Any]) -> None:
        """Question and answer belong together; a program that is out of step has to be started again."""
        told = message.get("id", case.id)
        if told == case.id:
            return
        if not isinstance(told, str):
            raise _Trouble(f"answered with an id that is no text; {case.id} was asked. Send the id back as it came")
        if told in self._answered:
            raise _Trouble(f"answered {told} a second time; {case.id} was asked. Every question has one answer")
        raise _Trouble(f"answered with the id {_excerpt(told.encode(errors='replace'))}; {case.id} was asked. Send the id back as it came")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


class _Process:
    """One run of the program."""

    def __init__(self, command: Sequence[str]) -> None:
        if os.name != "posix":
            raise OSError("programs are judged on Linux and macOS only; use peft-ref check --answers")
        self._popen = subprocess.Popen(
            list(command),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that its children end with it
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._stdin, self._stdout, self._stderr = self._popen.stdin, self._popen.stdout, self._popen.stderr
        self._unsent = b""
        self._heard = bytearray()  # from standard output, not yet handed on
        self._searched = 0  # so much of it has no end of line
        self._told = bytearray()  # the latest of standard error
        self._selector = selectors.DefaultSelector()
        for stream in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(stream.fileno(), False)
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(self._stderr, selectors.EVENT_READ)

    def exchange(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Sends one message and returns the one that comes back, decoded."""
        self._send(message)
        deadline, read = time.monotonic() + timeout, 0
        while self._unsent or (line := self._line()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Trouble(self._silence(timeout))
            gone = self._gone()  # asked before reading, so that all it said before it went is read
            got = self._pump(min(left, GLANCE))
            read += got
            if read > LONGEST_ANSWER:
                raise _Trouble(f"wrote more than {LONGEST_ANSWER >> 20} MiB instead of an answer: {_excerpt(bytes(self._heard))}")
            if gone and not got and not self._unsent and b"\n" not in self._heard:
                raise self._ending()
        return self._decode(line)

    def stop(self) -> None:
        """Asks the program to stop, and kills it if it does not."""
        if not self._unsent:  # else it was interrupted in the middle of a question
            self._send(STOP)
            deadline = time.monotonic() + STOP_TIME
            while self._popen.poll() is None and time.monotonic() < deadline:
                self._pump(0.02)
                self._heard.clear()
                if not self._unsent:
                    self._stdin.close()  # one that waits for the end of its input ends too
        self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._popen.kill()
        self._selector.close()
        for stream in (self._stdin, self._stdout, self._stderr):
            stream.close()
        with suppress(subprocess.TimeoutExpired):  # one in the kernel's hands ends when the kernel lets it
            self._popen.wait(timeout=5.0)

    # ---- the pipes

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent = (json.dumps(message, allow_nan=False) + "\n").encode()
        self._selector.register(self._stdin, selectors.EVENT_WRITE)

    def _pump(self, seconds: float) -> int:
        """Writes and reads what can be, waiting up to `seconds` for the first thing; how many bytes standard output gave."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return 0
        read = 0
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._stdin:
                self._write()
            elif key.fileobj is self._stdout:
                chunk = self._read(self._stdout)
                self._heard += chunk
                read += len(chunk)
            else:
                self._told += self._read(self._stderr)
                del self._told[:-STDERR_KEPT]
        return read

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more; what it still says, or how it ended, tells why
            self._unsent = b""
        if not self._unsent:
            self._selector.unregister(self._stdin)

    def _read(self, stream: IO[bytes]) -> bytes:
        try:
            chunk = os.read(stream.fileno(), 2**18)
        except BlockingIOError:
            return b""
        except OSError:
            chunk = b""
        if not chunk:
            self._selector.unregister(stream)
        return chunk

    def _line(self) -> bytes | None:
        """The next line that is not blank, if it is complete."""
        if self._heard[:1].isspace():
            self._heard, self._searched = self._heard.lstrip(), 0
        end = self._heard.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._heard)
            return None
        line = bytes(self._heard[:end])
        del self._heard[: end + 1]
        self._searched = 0
        return line

    def _gone(self) -> bool:
        """Whether nothing more can come. A child of a dead program may hold the pipe open; nobody waits for it."""
        return self._stdout not in _registered(self._selector) or self._popen.poll() is not None

    # ---- what went wrong

    def _decode(self, line: bytes) -> dict[str, Any]:
        what = "no JSON object"
        try:
            message = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            message, what = None, "no JSON"
        if isinstance(message, dict):
            return message
        raise _Trouble(f"answered a line that is {what}: {_excerpt(line)}. {HINT}{self._said()}")

    def _silence(self, timeout: float) -> str:
        if self._unsent:
            return f"did not read its input within {timeout:g} s{self._said()}"
        begun = f"; it began a line and did not end it: {_excerpt(bytes(self._heard))}" if self._heard.strip() else ""
        flush = "" if begun else ". If it did write an answer, flush standard output after every line"
        return f"did not answer within {timeout:g} s{begun or flush}{self._said()}"

    def _ending(self) -> _Trouble:
        deadline = time.monotonic() + 0.5
        while self._popen.poll() is None and time.monotonic() < deadline:
            self._pump(0.02)
        for _ in range(16):  # the rest of standard error, which a child may hold open
            if self._stderr in _registered(self._selector):
                self._pump(0.0)
        code = self._popen.poll()
        if code == 0 and not self._heard.strip():
            return _Left(f"ended with exit code 0 and without an answer{self._said()}")
        how = "closed its output and runs on" if code is None else _signal(-code) if code < 0 else f"ended with exit code {code}"
        rest = f", in the middle of a line: {_excerpt(bytes(self._heard))}" if self._heard.strip() else ""
        return _Trouble(f"{how}{rest}{self._said()}")

    def _said(self) -> str:
        told = self._told.decode("utf-8", "replace").strip()
        return "; it wrote to standard error:\n    " + "\n    ".join(told.splitlines()[-12:]) if told else ""


def _registered(selector: selectors.BaseSelector) -> set[Any]:
    return {key.fileobj for key in selector.get_map().values()}


def _signal(number: int) -> str:
    try:
        return f"was ended by signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"was ended by signal {number}"


def _why(error: Exception) -> str:
    """The operating system's words, and what is most often behind them."""
    if isinstance(error, FileNotFoundError):
        return f"{error}. Is the path right, is it installed, and is the interpreter of its first line there?"
    if isinstance(error, PermissionError):
        return f"{error}. Is it a program, and was it made executable (chmod +x)?"
    if isinstance(error, OSError) and error.errno == 8:
        return f"{error}. A script needs a first line such as #!/usr/bin/env python3"
    return str(error)


def _excerpt(line: bytes) -> str:
    text = line[:200].decode("utf-8", "replace").strip()
    return repr(text) + (f"... ({len(line)} bytes)" if len(line) > 200 else "")
