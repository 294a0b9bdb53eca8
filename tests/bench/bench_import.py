"""How long `import peft_ref` takes, as a ratio to `import numpy`.   python tests/bench/bench_import.py [repeats]

Every sample is a fresh interpreter that times its own statement, so the start of Python counts for nobody. The statements take turns, so a
busy machine slows them all; the ratio is the median of the ratios within a round. Goal: at most 1.7 for `import peft_ref`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "import numpy"
STATEMENTS = {
    "import peft_ref": "the package: its names load on first use",
    "from peft_ref import Adapter, Linear, forward, merge": "the mathematics without a method",
    "from peft_ref import Adapter, Linear, LoRA, forward, merge": "what one method needs",
    "from peft_ref import *": "every public name and every method",
}


def seconds(statement: str) -> float:
    program = f"from time import perf_counter as clock\nstart = clock()\n{statement}\nprint(clock() - start)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(run.stdout)


def main(repeats: int = 41) -> None:
    for statement in (BASE, *STATEMENTS):  # the first run of each may compile and read from disk
        seconds(statement)
    rounds = [{s: seconds(s) for s in (BASE, *STATEMENTS)} for _ in range(repeats)]
    print(f"medians of {repeats} rounds, Python {sys.version.split()[0]}")
    print(f"{BASE:60} {1000 * statistics.median(r[BASE] for r in rounds):6.1f} ms")
    for statement, meaning in STATEMENTS.items():
        median = statistics.median(r[statement] for r in rounds)
        ratio = statistics.median(r[statement] / r[BASE] for r in rounds)
        print(f"{statement:60} {1000 * median:6.1f} ms   {ratio:5.2f} x numpy   {meaning}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
