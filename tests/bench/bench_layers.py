"""How fast one adapted layer is, beside HF PEFT's.   python tests/bench/bench_layers.py [--rounds 7] [--only LoRA,OFT] [--readme]

A linear layer of 2048 x 2048 in float32 without a bias, 512 and 4096 tokens: forward, and forward with the gradients of the input and of
the adapter, the weight frozen. PEFT runs on torch, this library on NumPy, each in a process of its own with as many threads. They take
turns within a round, and before anything is timed all outputs and gradients must agree. NumPy's OpenBLAS is measured twice: with the
kernel pinned to Haswell (AVX2), as `OPENBLAS_CORETYPE` says on many CI machines, and with the one it picks itself.

    x           PEFT's time / ours
    limit       the time of the matrix products that cannot be done without, alone in the same library, / ours: 100 % cannot be beaten.
                One forward and two with gradients; three for LoHa and FourierFT, which need the gradient of the whole weight
    neutral x   our limit / PEFT's: what would be left of x if both libraries multiplied matrices equally fast

A sample is the fastest of its calls, with the products right after it; a cell is the median of its samples, a ratio that of two medians.
While a sample runs the whole machine is watched: one during which others used more than a twentieth of it is taken again, a few times;
then the quietest count, and the table says how loud they were. With `--threads 1` the clock is the processor time of the process, which a
busy machine disturbs far less.
All of them keep the memory that they free (glibc's `KEPT`): a virtual machine may hand it back to its host, and to get it again costs up to
a tenth of a call, at times. That helps torch more than NumPy; without it PEFT's DoRA takes a third longer.
`--readme` writes the table into README.md, `--json FILE` every number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("LoRA", "DoRA", "AdaLoRA", "IA3", "LoHa", "OFT", "FourierFT")
TOKENS = (512, 4096)
WHAT = {"forward": "forward", "both": "forward + backward"}
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
KERNELS: dict[str, dict[str, str]] = {"pinned": {"OPENBLAS_CORETYPE": "Haswell"}, "unpinned": {}}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
QUIET = 0.05  # of the machine may be used by others while a sample runs
TRIES = 4  # times as many samples as are wanted are taken, at most
AGREEMENT = 1e-4  # of the largest number: a sum of 4096 products in float32 errs by no more than 4096 / 2^24
BEGIN, END = "<!-- layers: written by tests/bench/bench_layers.py --readme, do not edit -->", "<!-- end of layers -->"


class Sample(NamedTuple):
    seconds: float
    limit: float
    others: float  # the share of the machine that others used


class Worker:
    """tests/bench/layer_worker.py in its own process, which sleeps until it is told something."""

    def __init__(self, library: str, folder: Path, kernel: dict[str, str], threads: int) -> None:
        env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"} | dict.fromkeys(THREADS, str(threads)) | KEPT | kernel
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
        command = [sys.executable, "-m", "tests.bench.layer_worker", library, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)

    def do(self, verb: str, /, **order: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": verb, **order}), file=self.process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer

    def time(self, **order: Any) -> Sample:
        time.sleep(0.05)  # threads that wait for work spin for a while before they sleep
        before = _busy()
        result = self.do("time", **order)
        others = max(0.0, _busy() - before - result["busy"]) / (result["wall"] * (os.cpu_count() or 1))
        return Sample(result["seconds"], result["limit"], others)


def _busy() -> float:
    """Processor seconds that were used, or taken by the host, on the whole machine."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def check(workers: dict[str, Worker], folder: Path, method: str, tokens: int) -> float:
    """How far the outputs and gradients of NumPy are from torch's at most, as a share of the largest number of each."""
    import numpy as np

    for name, worker in workers.items():
        worker.do("answer", method=method, tokens=tokens, file=f"{name}.npz")
    expected, worst = dict(np.load(folder / "torch.npz")), 0.0
    for name in KERNELS:
        got = dict(np.load(folder / f"{name}.npz"))
        assert got.keys() == expected.keys(), f"{method}: {sorted(got)}, PEFT has {sorted(expected)}"
        for key, want in expected.items():
            off = float(np.max(np.abs(got[key].reshape(want.shape) - want)) / np.max(np.abs(want)))
            assert off <= AGREEMENT, f"{method} at {tokens} tokens, {name} kernel: {key} is off by {off:.2g} of its largest number"
            worst = max(worst, off)
    return worst


def measure(workers: dict[str, Worker], rounds: int, **cell: Any) -> dict[str, dict[str, float]]:
    samples: dict[str, list[Sample]] = {name: [] for name in workers}
    for taken in range(rounds * TRIES):
        waiting = [name for name in workers if taken < rounds or sum(s.others <= QUIET for s in samples[name]) < rounds]
        for name in waiting:
            samples[name].append(workers[name].time(**cell))
    result = {}
    for name, all_of_it in samples.items():
        best = sorted(all_of_it, key=lambda s: s.others)[:rounds]
        medians = map(statistics.median, zip(*best, strict=True))
        result[name] = dict(zip(Sample._fields, medians, strict=True))
    return result


def run(methods: Sequence[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    cells = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = {"torch": Worker("torch", folder, {}, threads)}
        workers |= {kernel: Worker("numpy", folder, env, threads) for kernel, env in KERNELS.items()}
        try:
            for method in methods:
                for worker in workers.values():
                    worker.do("make", method=method)
                for tokens in TOKENS:
                    off = check(workers, folder, method, tokens)
                    for what in WHAT:
                        cell = {"method": method, "tokens": tokens, "what": what}
                        cells.append({**cell, "off": off, **measure(workers, rounds, **cell)})
                        print("  ".join(row(cells[-1])), file=sys.stderr, flush=True)
        finally:
            for worker in workers.values():
                worker.process.kill()
    return cells


def row(cell: dict[str, Any]) -> list[str]:
    """One line of the table."""
    torch = cell["torch"]
    columns = [cell["method"], str(cell["tokens"]), WHAT[cell["what"]], f"{1000 * torch['seconds']:.1f}"]
    for kernel in KERNELS:
        ours = cell[kernel]
        share, theirs = ours["limit"] / ours["seconds"], torch["limit"] / torch["seconds"]
        columns += [f"{1000 * ours['seconds']:.1f}", f"{torch['seconds'] / ours['seconds']:.2f}", f"{share:.0%}", f"{share / theirs:.2f}"]
    return columns


def table(cells: Sequence[dict[str, Any]], rounds: int, threads: int) -> str:
    head = ["method", "tokens", "", "PEFT, ms", *(word for kernel in KERNELS for word in (f"{kernel}, ms", "x", "limit", "neutral x"))]
    lines = [head, ["---"] * len(head), *map(row, cells)]
    loud = max(cell[name]["others"] for cell in cells for name in ("torch", *KERNELS))
    off = max(cell["off"] for cell in cells)
    foot = (
        f"Medians of {rounds}, threads: {threads}; others used at most {loud:.0%} of the machine;"
        f" outputs and gradients agree to {off:.0e} of the largest number."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + foot


def write_readme(text: str) -> None:
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="One adapted layer beside HF PEFT's.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(METHODS), help="methods, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where every number goes")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    cells = run(options.only.split(","), options.rounds, options.threads)
    text = table(cells, options.rounds, options.threads)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    if options.readme:
        write_readme(text)


if __name__ == "__main__":
    main()
