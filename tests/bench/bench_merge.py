"""How long merging an adapter takes, beside one `cp` and beside HF PEFT end to end.   python tests/bench/bench_merge.py --size 2GB

The checkpoint has the shape of TinyLlama in bfloat16, in 4 shards; the adapter is a LoRA of rank 16 on every linear layer, in float32.

    fresh    OUT is not there, nothing waits for the disk
    fsync    OUT is not there, and it is on the disk at the end
    cache    OUT is there and in the page cache. cp writes over it; merge writes beside it, exchanges the two and removes the old one
    again    what is written over is there and in the page cache, for all: for merge, the files of a run that was killed at its end

Every sample is a process of its own, from its start to its end, imports included. The runners take turns within a round, after a sync;
a ratio is the median of the ratios within a round, so that a slow minute of the machine slows both. `others` is the share of the machine
that other processes used meanwhile: above 5 % the seconds mean little. CPU and memory are the kernel's count for the process (wait4);
where it has forked workers, the memory is the most that it and they were seen to have together, what they share counted once. Python's
bytecode is kept, as pip keeps it of what it installs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER, HEADS, KEYS, RANK, SHARDS = 2048, 5632, 32, 4, 16, 4
SCENARIOS = ("fresh", "fsync", "cache", "again")
HF = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
# What a run leaves that is killed right before its first shard gets its name.
KILLED = """
import os, shutil, sys
from pathlib import Path
from peft_ref.checkpoints.copying import Stamps
from peft_ref.checkpoints.engine import fingerprint, read_by
from peft_ref.checkpoints.output import PART, Output
from peft_ref.checkpoints.plan import Source
from peft_ref.checkpoints.planning import plan
base, adapter, out = map(Path, sys.argv[1:4])
planned = plan(base, [Source(adapter)], exact=sys.argv[4] == "exact")
with Output(out, fingerprint=fingerprint(planned, Stamps(read_by(planned))), fsync=False) as output:
    for shard in planned.shards:
        shutil.copyfile(base / shard.name, output.folder / (shard.name + PART))
    os._exit(0)
"""
MERGEKIT = "merge_method: linear\nmodels:\n  - model: {base}+{adapter}\n    parameters: {{weight: 1.0}}\ndtype: bfloat16\n"


class Sample(NamedTuple):
    seconds: float
    user: float
    system: float
    peak: float  # MB
    others: float  # share of the machine


# ---- what is merged; in a process of its own, as the memory of this one counts for those that it starts


def make(folder: Path, size: int) -> None:
    """`folder`/base and `folder`/adapter."""
    import numpy as np

    from peft_ref.files.safetensors import header

    rng = np.random.default_rng(0)
    vocabulary = 32000 if size >= 1e9 else 4000
    kv = KEYS * HIDDEN // HEADS
    linear = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)}
    linear |= {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}
    linear |= {"mlp.down_proj": (HIDDEN, INNER)}
    one = 2 * sum(out * n_in for out, n_in in linear.values())
    layers = max(1, round((size - 4 * vocabulary * HIDDEN) / one))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"model.layers.{n}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}

    def bits(number: int) -> bytes:  # bfloat16 of both signs from 2^-9 to 2^-5
        return bytes((rng.integers(0, 1 << 16, number, np.uint16) & 0x81FF | 0x3B00).data)

    base = folder / "base"
    base.mkdir(parents=True)
    names, weight_map = list(shapes), {}
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    for n in range(SHARDS):
        part = sorted(names[len(names) * n // SHARDS : len(names) * (n + 1) // SHARDS])
        file = f"model-{n + 1:05}-of-{SHARDS:05}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        with (base / file).open("wb") as stream:
            stream.write(header(((name, "BF16", shapes[name], sizes[name]) for name in part), {"format": "pt"}))
            for name in part:
                stream.write(bits(sizes[name] // 2))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER}
    llama |= {"num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "vocab_size": vocabulary}
    llama |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(llama, indent=2) + "\n")
    (base / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}\n')
    _make_adapter(folder / "adapter", linear, layers, rng)


def _make_adapter(folder: Path, linear: dict[str, tuple[int, int]], layers: int, rng: Any) -> None:
    import numpy as np

    from peft_ref.files.safetensors import serialize

    folder.mkdir()
    tensors = {}
    for n in range(layers):
        for name, (out, n_in) in linear.items():
            head = f"base_model.model.model.layers.{n}.{name}"
            tensors[f"{head}.lora_A.weight"] = rng.normal(size=(RANK, n_in)).astype(np.float32) / 50
            tensors[f"{head}.lora_B.weight"] = rng.normal(size=(out, RANK)).astype(np.float32) / 50
    (folder / "adapter_model.safetensors").write_bytes(serialize(tensors, {"format": "pt"}))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "bias": "none"}
    config |= {"target_modules": sorted({name.partition(".")[2] for name in linear}), "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


# ---- what is timed


def commands(folder: Path, scenario: str, threads: int, mergekit: str | None) -> dict[str, list[str]]:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    how = {"fsync": [], "cache": ["--no-fsync", "--overwrite"]}.get(scenario, ["--no-fsync"])
    merge = [sys.executable, "-m", "peft_ref.cli", "merge", str(base), str(adapter), "-o", str(out), "--threads", str(threads), *how]
    found = {"cp": ["cp", "-rT", str(base), str(out)], "merge": merge, "merge --exact": [*merge, "--exact"]}
    found["HF PEFT"] = [sys.executable, "-c", HF, str(base), str(adapter), str(out), str(threads)]
    if mergekit is not None:
        (folder / "merge.yaml").write_text(MERGEKIT.format(base=base, adapter=adapter))
        found["mergekit"] = [mergekit, str(folder / "merge.yaml"), str(out), "--lora-merge-cache", str(folder / "cache")]
    if scenario == "fsync":  # those that do not wait for the disk by themselves
        for name in found.keys() - {"merge", "merge --exact"}:
            found[name] = ["sh", "-c", '"$@" && sync "$0" "$0"/*', str(out), *found[name]]
    return found


def prepare(folder: Path, scenario: str, name: str) -> None:
    """What is there when the runner starts."""
    for left in ("out", "cache"):
        shutil.rmtree(folder / left, ignore_errors=True)
    if scenario == "again" and name in ("merge", "merge --exact"):
        exact = "exact" if "exact" in name else "fast"
        killed = [sys.executable, "-c", KILLED, *(str(folder / part) for part in ("base", "adapter", "out")), exact]
        subprocess.run(killed, check=True, env=_environment(1))
    elif scenario in ("cache", "again"):
        shutil.copytree(folder / "base", folder / "out")


def _environment(threads: int) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | own


def sample(command: list[str], threads: int) -> Sample:
    with tempfile.TemporaryFile() as said:
        busy, began = _busy(), time.perf_counter()
        process = subprocess.Popen(command, env=_environment(threads), stdout=said, stderr=said, cwd="/")
        with watched(process.pid) as together:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)[:300]}\n{said.read().decode()[-3000:]}")
    own = usage.ru_utime + usage.ru_stime
    others = max(0.0, _busy() - busy - own) / (seconds * (os.cpu_count() or 1))
    return Sample(seconds, usage.ru_utime, usage.ru_stime, max(usage.ru_maxrss, *together) / 1024, others)


@contextlib.contextmanager
def watched(process: int) -> Iterator[list[int]]:
    """The kB that a process and its children have together, again and again: all of its own, and what they have for themselves."""
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.03):
            with contextlib.suppress(OSError):  # somebody has just ended
                children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
                seen.append(_kb(process, "Rss:") + sum(_kb(int(child), "Private_") for child in children))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _kb(process: int, what: str) -> int:
    return sum(int(line.split()[1]) for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines() if line.startswith(what))


def _busy() -> float:
    """CPU seconds of the whole machine since it started: user, nice, system, the interrupts, and what the host took."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, list[Sample]]]:
    found: dict[str, dict[str, list[Sample]]] = {}
    for n in range(options.repeats + 1):  # the first round warms caches, and is not counted
        for scenario in options.scenario:
            for name, command in commands(folder, scenario, options.threads, options.mergekit).items():
                if name not in options.only or (name in ("HF PEFT", "mergekit") and not 0 < n <= options.slow_repeats):
                    continue
                prepare(folder, scenario, name)
                os.sync()
                taken = sample(command, options.threads)
                print(f"round {n}  {scenario:6} {name:14} {taken.seconds:7.2f} s  others {taken.others:.0%}", file=sys.stderr, flush=True)
                if n:
                    found.setdefault(scenario, {}).setdefault(name, []).append(taken)
    return found


# ---- what is told


def table(found: dict[str, dict[str, list[Sample]]]) -> str:
    lines = ["| scenario | runner | wall, s | x cp | HF / it | user CPU, s | system CPU, s | peak memory, MB | others |", "|---" * 9 + "|"]
    for scenario, runners in found.items():
        for name, samples in runners.items():
            cells = [f"{statistics.median(getattr(s, what) for s in samples):.2f}" for what in ("seconds", "user", "system")]
            peak, others = (statistics.median(getattr(s, what) for s in samples) for what in ("peak", "others"))
            ratios = [_ratio(samples, runners.get("cp")), _ratio(runners.get("HF PEFT"), samples)]
            lines.append(
                f"| {scenario} | {name} | {cells[0]} | {ratios[0]} | {ratios[1]} | {cells[1]} | {cells[2]} | {peak:.1f} | {others:.0%} |"
            )
    return "\n".join(lines)


def _ratio(one: list[Sample] | None, other: list[Sample] | None) -> str:
    if not one or not other:
        return ""
    return f"{statistics.median(a.seconds / b.seconds for a, b in zip(one, other, strict=False)):.2f}"


def bytes_of(text: str) -> int:
    units = {"MB": 10**6, "GB": 10**9}
    return int(float(text[:-2]) * units[text[-2:].upper()])


def main() -> None:
    names = ("cp", "merge", "merge --exact", "HF PEFT", "mergekit")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=bytes_of, default=bytes_of("2GB"), help="of the checkpoint: 2GB, 200MB (default: 2GB)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--slow-repeats", type=int, default=3, help="of them with HF PEFT and mergekit (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each runner (default: one for each core)")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="runners")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="the program mergekit-yaml, where it is installed")
    parser.add_argument("--folder", type=Path, default=None, help="where to work, and to keep the checkpoint for the next time")
    parser.add_argument("--json", type=Path, help="all samples")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        return make(options.make, options.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "base").exists():
            subprocess.run([sys.executable, __file__, "--make", str(folder), "--size", f"{options.size / 1e6}MB"], check=True)
        size = sum(file.stat().st_size for file in (folder / "base").iterdir())
        found = measure(folder, options)
        shutil.rmtree(folder / "out", ignore_errors=True)
    core = os.environ.get("OPENBLAS_CORETYPE", "chosen by OpenBLAS")
    print(f"{size / 1e9:.2g} GB, {options.threads} threads each, Python {sys.version.split()[0]}, OpenBLAS kernel: {core}\n")
    print(table(found))
    if options.json is not None:
        told = {
            scenario: {name: [s._asdict() for s in samples] for name, samples in runners.items()} for scenario, runners in found.items()
        }
        options.json.write_text(json.dumps({"size": size, "threads": options.threads, "core": core, "samples": told}, indent=1))
    return None


if __name__ == "__main__":
    main()
