"""A port that is a program: JSON lines on its standard input and output.

Whatever it does costs the one case it was asked, and nobody else: one that hangs is killed after its time, one that died is started
again, one that floods is cut off, garbage is reported. One that fails three times in a row without any answer is given up.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import IO, Any, final

from peft_ref.check.case import Case
from peft_ref.check.port import BrokenPort, Failed, Port, Reply
from peft_ref.check.protocol import START, STOP, read_info, read_reply, run_message
from peft_ref.check.result import PortInfo

LONGEST_LINE = 32 * 2**20
LINES_AHEAD = 64  # a port that sends more than this unasked is flooding
STDERR_LINES = 20
GIVE_UP_AFTER = 3


class _Trouble(Exception):
    """The program did not answer properly; the message says how."""


@final
class ProgramPort(Port):
    """The program `command`. `timeout` is seconds per question; the first answer may take `start_timeout`."""

    def __init__(self, command: Sequence[str], timeout: float = 10.0, start_timeout: float = 60.0, validate: bool = False) -> None:
        self._command, self._timeout, self._start_timeout, self._validate = list(command), timeout, start_timeout, validate
        self._process: _Process | None = None
        self._failures = 0

    def start(self) -> PortInfo:
        try:
            self._process = _Process(self._command)
            return read_info(self._process.exchange(START, self._start_timeout), self._validate)
        except _Trouble as trouble:
            self._kill()
            raise BrokenPort(f"{' '.join(self._command)}: asked to start, it {trouble}") from None
        except OSError as error:
            raise BrokenPort(f"{' '.join(self._command)}: cannot be started: {error}") from None

    def ask(self, case: Case) -> Reply:
        if self._failures >= GIVE_UP_AFTER:
            return Failed(f"not asked: the program failed {GIVE_UP_AFTER} times in a row")
        try:
            if self._process is None:
                self.start()
            assert self._process is not None
            message = self._process.exchange(run_message(case), self._timeout)
        except (_Trouble, BrokenPort) as trouble:
            self._failures += 1
            self._kill()
            return Failed(f"the program {trouble}" if isinstance(trouble, _Trouble) else str(trouble))
        self._failures = 0
        return read_reply(case, message, self._validate)

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


class _Process:
    """One run of the program, with threads that read what it says."""

    def __init__(self, command: Sequence[str]) -> None:
        self._popen = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that its children end with it
        )
        self._lines: queue.Queue[bytes | None] = queue.Queue(maxsize=LINES_AHEAD)
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._flood = threading.Event()
        threading.Thread(target=self._read_stdout, args=(self._popen.stdout,), daemon=True).start()
        self._stderr_reader = threading.Thread(target=self._read_stderr, args=(self._popen.stderr,), daemon=True)
        self._stderr_reader.start()

    def exchange(self, message: dict[str, Any], timeout: float) -> Any:
        """Sends one message and returns the one that comes back, decoded."""
        if not self._lines.empty() and (early := self._lines.get_nowait()) is not None:
            raise _Trouble(f"said something nobody had asked for: {_excerpt(early)}")
        deadline = time.monotonic() + timeout
        self._send((json.dumps(message, allow_nan=False) + "\n").encode(), deadline, timeout)
        try:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.001))
        except queue.Empty:
            raise _Trouble(f"did not answer within {timeout:g} s{self._said()}") from None
        if self._flood.is_set():
            raise _Trouble(f"flooded: more than {LINES_AHEAD} lines, or one longer than {LONGEST_LINE} bytes")
        if line is None:
            raise _Trouble(f"{self._ending()}{self._said()}")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise _Trouble(f"answered a line that is no JSON: {_excerpt(line)}{self._said()}") from None

    def stop(self) -> None:
        """Asks the program to stop, and kills it if it does not."""
        try:
            self._send((json.dumps(STOP) + "\n").encode(), time.monotonic() + 1.0, 1.0)
            self._popen.wait(timeout=2.0)
        except (_Trouble, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass

    def _send(self, data: bytes, deadline: float, timeout: float) -> None:
        """Writes from a thread: a program that does not read must not block the judge."""
        problem: list[OSError] = []

        def write() -> None:
            assert self._popen.stdin is not None
            try:
                self._popen.stdin.write(data)
                self._popen.stdin.flush()
            except (OSError, ValueError) as error:
                problem.append(OSError(str(error)))

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(max(deadline - time.monotonic(), 0.001))
        if writer.is_alive():
            raise _Trouble(f"did not read its input within {timeout:g} s{self._said()}")
        if problem:
            raise _Trouble(f"{self._ending()}{self._said()}")

    def _read_stdout(self, stream: IO[bytes]) -> None:
        try:
            while line := stream.readline(LONGEST_LINE):
                if len(line) >= LONGEST_LINE:
                    self._flood.set()
                    break
                if line.strip():
                    try:
                        self._lines.put(line, timeout=0.5)
                    except queue.Full:
                        self._flood.set()
                        break
        except (OSError, ValueError):
            pass  # the pipe was closed under us: the process was killed
        try:
            self._lines.put(None, timeout=0.5)
        except queue.Full:
            self._flood.set()

    def _read_stderr(self, stream: IO[bytes]) -> None:
        try:
            while line := stream.readline(4096):
                self._stderr.append(line.decode("utf-8", "replace").rstrip())
        except (OSError, ValueError):
            pass

    def _ending(self) -> str:
        try:
            code = self._popen.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its output"
        self._stderr_reader.join(0.5)
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _said(self) -> str:
        return "; it wrote to stderr:\n    " + "\n    ".join(self._stderr) if self._stderr else ""


def _excerpt(line: bytes) -> str:
    text = line[:200].decode("utf-8", "replace").strip()
    return repr(text) + ("..." if len(line) > 200 else "")
