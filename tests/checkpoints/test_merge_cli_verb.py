"""`peft-ref merge` as a program: what it writes and says, its exit codes, its memory, and that it says no in words."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from peft_ref.cli import main
from tests.checkpoints.engine_made import BF16, beside, bytes_of, merged

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]
LAYERS, OUT, IN, RANK = 3, 12, 8, 2


def llama(folder: Path, layers: int = LAYERS, shards: int = 2, out: int = OUT, n_in: int = IN) -> Path:
    """Names of a Llama, and whole numbers as weights: what is merged here is exact in bfloat16."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {"model.norm.weight": rng.integers(0, 8, n_in).astype(BF16)}
    for n in range(layers):
        tensors[f"model.layers.{n}.self_attn.q_proj.weight"] = rng.integers(-8, 8, (out, n_in)).astype(BF16)
        tensors[f"model.layers.{n}.self_attn.v_proj.weight"] = rng.integers(-8, 8, (out, n_in)).astype(BF16)
    folder.mkdir(parents=True)
    names, weight_map = sorted(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = names[len(names) * k // shards : len(names) * (k + 1) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(t.nbytes for t in tensors.values())
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": n_in, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def lora(folder: Path, layers: int = LAYERS, out: int = OUT, n_in: int = IN, seed: int = 1) -> Path:
    """On q_proj alone, with a scale of 2."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for n in range(layers):
        head = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        tensors[f"{head}.lora_A.weight"] = rng.integers(-2, 3, (RANK, n_in)).astype(np.float32)
        tensors[f"{head}.lora_B.weight"] = rng.integers(-2, 3, (out, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expected(base: Path, *adapters: tuple[Path, float]) -> dict[str, Any]:
    """W + sum of weight * 2 * B A."""
    found = {name: tensor.astype(np.float64) for name, tensor in merged(base).items()}
    for folder, weight in adapters:
        theirs = merged(folder)
        for name in found:
            if "q_proj" in name:
                head = "base_model.model." + name.removesuffix(".weight")
                found[name] = found[name] + weight * 2.0 * (theirs[f"{head}.lora_B.weight"] @ theirs[f"{head}.lora_A.weight"])
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.astype(np.float64), wanted[name], err_msg=name)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return lora(tmp_path / "adapter")


def merge(*words: str | Path) -> int:
    return main(["merge", *map(str, words)])


def test_a_sharded_checkpoint_keeps_its_shards_and_what_lies_beside(tmp_path: Path, base: Path, adapter: Path, capsys: Capture) -> None:
    assert merge(base, adapter, "-o", tmp_path / "out") == 0
    assert_same(merged(tmp_path / "out"), expected(base, (adapter, 1)))
    new, was = bytes_of(tmp_path / "out"), bytes_of(base)
    assert new.keys() == was.keys()
    assert all(new[name] == was[name] for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"))
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert not beside(tmp_path / "out")


def test_a_single_file_comes_out_as_one(tmp_path: Path, adapter: Path) -> None:
    base = llama(tmp_path / "single", shards=1)
    assert merge(base, adapter, "-o", tmp_path / "out", "--exact") == 0
    assert_same(merged(tmp_path / "out"), expected(base, (adapter, 1)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("weights", ["0.5,2", "-1,0.25"])
def test_each_adapter_has_its_weight(tmp_path: Path, base: Path, adapter: Path, weights: str) -> None:
    other = lora(tmp_path / "other", seed=2)
    assert merge(base, adapter, other, "-o", tmp_path / "out", f"--weights={weights}") == 0
    one, two = map(float, weights.split(","))
    assert_same(merged(tmp_path / "out"), expected(base, (adapter, one), (other, two)))


def test_a_dtype_and_a_size_of_shards(tmp_path: Path, base: Path, adapter: Path) -> None:
    assert merge(base, adapter, "-o", tmp_path / "out", "--dtype", "float32", "--max-shard-size", "1KB") == 0
    found = merged(tmp_path / "out")
    assert {t.dtype.name for t in found.values()} == {"float32"}
    assert_same(found, expected(base, (adapter, 1)))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, base: Path, adapter: Path, capsys: Capture) -> None:
    assert merge(base, adapter, "-o", tmp_path / "out", "--dry-run", "--weights", "0.5") == 0
    told = capsys.readouterr().out
    for words in ("2 shards", "tokenizer.json", "3 x model.layers.*.self_attn.q_proj.weight", "(weight 0.5): 3 tensors", "memory: about"):
        assert words in told
    assert merge(base, adapter, "-o", tmp_path / "out", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    shards = [path.stat().st_size for path in sorted(base.glob("*.safetensors"))]
    assert [shard["bytes"] for shard in plan["shards"]] == shards
    assert sum(shard["changed"] for shard in plan["shards"]) == LAYERS * OUT * IN * 2
    assert plan["bytes"] == sum(shard["copied"] + shard["changed"] for shard in plan["shards"]) == sum(shards)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_json_is_all_there_is_on_standard_output(tmp_path: Path, base: Path, adapter: Path, capsys: Capture) -> None:
    assert merge(base, adapter, "-o", tmp_path / "out", "--json", "--no-fsync", "--threads", "1") == 0
    told = capsys.readouterr()
    said = json.loads(told.out)
    assert said["out"] == str(tmp_path / "out")
    assert said["written"] == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert told.err == ""


def test_an_output_is_replaced_only_when_asked(tmp_path: Path, base: Path, adapter: Path, capsys: Capture) -> None:
    out = llama(tmp_path / "out", layers=1)
    was = bytes_of(out)
    assert merge(base, adapter, "-o", out) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert bytes_of(out) == was
    assert merge(base, adapter, "-o", out, "--overwrite") == 0
    assert_same(merged(out), expected(base, (adapter, 1)))


SENSELESS = {
    "weights that are no numbers": (("--weights", "a,b"), "numbers with commas"),
    "too many weights": (("--weights", "1,2"), "2 for 1 adapters"),
    "a weight without end": (("--weights", "inf"), "finite"),
    "no workers": (("--threads", "0"), "at least one"),
    "a size in no unit": (("--max-shard-size", "5 apples"), "5GB"),
    "a size of nothing": (("--max-shard-size", "0GB"), "5GB"),
}


@pytest.mark.parametrize("what", SENSELESS)
def test_a_call_that_makes_no_sense_is_2(tmp_path: Path, base: Path, adapter: Path, capsys: Capture, what: str) -> None:
    words, match = SENSELESS[what]
    assert merge(base, adapter, "-o", tmp_path / "out", *words) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FAULTS = {
    "no base": (("nothing", "adapter"), "nothing"),
    "no adapter": (("base", "nothing"), "nothing"),
    "an adapter for another model": (("base", "wide"), "q_proj"),
    "a checkpoint for an adapter": (("base", "base"), "adapter_config.json"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_files_that_are_at_fault_are_1(tmp_path: Path, base: Path, adapter: Path, capsys: Capture, what: str) -> None:
    lora(tmp_path / "wide", n_in=IN + 1)
    words, match = FAULTS[what]
    assert merge(*(tmp_path / word for word in words), "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.startswith("peft-ref merge: ")
    assert match in said
    assert len(said.splitlines()) <= 4
    assert not (tmp_path / "out").exists()
    assert not beside(tmp_path / "out")


def test_an_interrupt_is_130(tmp_path: Path, base: Path, adapter: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_ref.checkpoints.engine.cores", interrupt)
    assert merge(base, adapter, "-o", tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not beside(tmp_path / "out")


def on_a_terminal(*words: str | Path) -> tuple[str, str]:
    """What the verb writes to a terminal as its standard error, and to its standard output."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "peft_ref.cli", "merge", *map(str, words)]
    done = subprocess.run(program, cwd=ROOT, stderr=theirs, stdout=subprocess.PIPE, text=True, check=True)
    os.write(theirs, b"|")  # so that there is something to read
    seen = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    return seen.removesuffix("|"), done.stdout


def test_a_terminal_gets_a_bar_that_goes_away(tmp_path: Path, base: Path, adapter: Path) -> None:
    seen, said = on_a_terminal(base, adapter, "-o", tmp_path / "out")
    assert "[################] 100%" in seen
    assert "2/2 shards" in seen
    assert seen.endswith("\r\x1b[K")
    assert "written in" in said


def test_with_json_a_terminal_gets_nothing_else(tmp_path: Path, base: Path, adapter: Path) -> None:
    seen, said = on_a_terminal(base, adapter, "-o", tmp_path / "out", "--json")
    assert seen == ""
    assert json.loads(said)["kept"] == []


PEAK = """
import sys
from peft_ref.cli import main
code = main()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], file=sys.stderr)
sys.exit(code)
"""


def peak_of(*words: str | Path) -> float:
    """MB. Of this program alone: getrusage also counts the memory of the process that started it, and that one has torch in it."""
    program = [sys.executable, "-c", PEAK, "merge", *map(str, words)]
    done = subprocess.run(program, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=True)
    return float(done.stderr.splitlines()[-1]) / 1024


def large(folder: Path, layers: int) -> tuple[Path, Path]:
    """8 MB a layer, half of it touched."""
    return llama(folder / "base", layers, shards=4, out=1024, n_in=2048), lora(folder / "adapter", layers, out=1024, n_in=2048)


LIMIT = 48.0


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_memory_stays_within_its_limit(tmp_path: Path) -> None:
    base, adapter = large(tmp_path, 8)
    assert peak_of(base, adapter, "-o", tmp_path / "out", "--threads", "2") < LIMIT


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_memory_is_the_same_for_a_model_eight_times_as_large(tmp_path: Path) -> None:
    for exact in ((), ("--exact",)):
        peaks = []
        for layers in (8, 64):
            folder = tmp_path / f"{layers}{len(exact)}"
            base, adapter = large(folder, layers)
            peaks.append(peak_of(base, adapter, "-o", folder / "out", "--threads", "2", *exact))
        print(peaks)
        assert max(peaks) < LIMIT
        assert peaks[1] - peaks[0] < 2.0
