"""The tests of the engine once more, in a program that has one thread and may be forked: there the workers are processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = ("forked_cases.py", "test_engine_bytes.py", "test_faults_once.py", "test_faults_resumed.py")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers are threads")
def test_processes_pass_what_threads_pass() -> None:
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES)]
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(program, cwd=HERE.parents[1], env={**os.environ, **one}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
