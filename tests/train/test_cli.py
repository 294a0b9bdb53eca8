"""`peft-ref train` as a program: what it leaves, how it says no, and that a kill costs nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.cli import main
from peft_ref.cli import train as cli
from peft_ref.files.adapter import CONFIG, WEIGHTS, load_adapter
from peft_ref.methods import METHODS
from peft_ref.train import checkpoint
from peft_ref.train.run import Plan
from peft_ref.train.session import method_keys
from tests.methods import facts

ROOT = Path(__file__).resolve().parents[2]
TEXT = bytes(range(97, 123)) * 8 + b"some words, and again some words. " * 8
SMALL = ("--tiny", "--data", "text", "--out", "run", "--batch", "2", "--length", "12", "--lr", "0.01")
ADALORA = ("--method", "adalora", "--init-r", "4", "--target-r", "2", "--tinit", "2", "--deltaT", "2", "--lora-dropout", "0.25")
PTUNING = ("--method", "p_tuning", "--num-virtual-tokens", "2", "--encoder-hidden-size", "4")
LSTM = ("--encoder-reparameterization-type", "LSTM", "--encoder-dropout", "0.3")
OPTIONS = {
    "adaption_prompt": ("--adapter-len", "3", "--adapter-layers", "1", "--target-modules", "self_attn"),
    "cartridge": ("--num-virtual-tokens", "3"),
    "cpt": ("--cpt-token-ids", "97", "98", "99", "--cpt-tokens-type-mask", "1", "2", "4", "--opt-weighted-loss-type", "decay"),
    "adalora": ("--target-modules", "q_proj", "down_proj"),
    "bdlora": ("--r", "2", "--target-modules", "q_proj", "--use-bdlora", '{"target_modules_bd_a": ["q_proj"], "nblocks": 2}'),
    "dora": ("--r", "2", "--target-modules", "q_proj"),
    "ia3": ("--target-modules", "k_proj", "down_proj", "--feedforward-modules", "down_proj"),
    "loha": ("--r", "2", "--target-modules", "q_proj"),
    "lora": ("--r", "2", "--lora-alpha", "4", "--target-modules", "all-linear", "--modules-to-save", "lm_head"),
    "multitask_prompt_tuning": ("--num-virtual-tokens", "2", "--num-tasks", "1"),
    "p_tuning": ("--num-virtual-tokens", "2", "--encoder-hidden-size", "4"),
    "prefix_tuning": ("--num-virtual-tokens", "2", "--token-dim", "16", "--num-attention-heads", "2"),
    "prompt_tuning": ("--num-virtual-tokens", "2"),
}


def options(name: str) -> tuple[str, ...]:
    """The arguments of a method: its row above, or what makes it small."""
    words = ((f"--{word.replace('_', '-')}", str(value)) for word, value in facts(name).small.items())
    return OPTIONS.get(name) or ("--target-modules", "q_proj", *(part for pair in words for part in pair))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(TEXT)


# The command, which kills itself without a chance to tidy up: when step `at` is told, or at the renaming of a file with that number.
KILLED = """
import os, signal, sys
from peft_ref.cli import main, train

kind, at = sys.argv[1], int(sys.argv[2])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
replace, tell, renamed = os.replace, train._Teller.tell, []

def counted(*paths):
    renamed.append(paths)
    die() if kind == "rename" and len(renamed) == at else replace(*paths)

def told(self, progress):
    die() if kind == "step" and progress.step == at else tell(self, progress)

os.replace, train._Teller.tell = counted, told
sys.exit(main(sys.argv[3:]))
"""


def program(folder: Path, *arguments: str, killed: tuple[str, int] | None = None) -> int:
    """The exit code of the command in a process of its own, working in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "text").write_bytes(TEXT)
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = ["-m", "peft_ref.cli"] if killed is None else ["-c", KILLED, killed[0], str(killed[1])]
    done = subprocess.run([sys.executable, *start, "train", *SMALL, *arguments], cwd=folder, env=environment, capture_output=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


KILLS = {
    "adalora, at step 7": ((*ADALORA, *OPTIONS["adalora"]), ("step", 7), 6),
    "p-tuning, before a checkpoint is decided": ((*PTUNING, *LSTM), ("rename", 20), 6),  # the base's 3, 5 and twice 8 of a checkpoint
    "p-tuning, after it was": ((*PTUNING, *LSTM), ("rename", 22), 9),
    "monteclora, at step 7": (("--method", "monteclora", *options("monteclora"), "--lora-dropout", "0.25"), ("step", 7), 6),
}


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.parametrize("name", KILLS)
def test_a_training_that_is_killed_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    method, killed, reached = KILLS[name]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    given = (*method, "--steps", "12", "--every", "3")
    assert program(straight, *given) == 0
    assert program(stopped, *given, killed=killed) == -signal.SIGKILL
    assert not (stopped / "run" / WEIGHTS).exists()
    folder = stopped / "run" / "checkpoint"
    rest = checkpoint.committed(folder, checkpoint.REST, checkpoint.FILES)
    assert json.loads(rest.read_text())["step"] == reached
    assert program(stopped, *given, "--resume") == 0
    for file in (WEIGHTS, CONFIG, *(f"checkpoint/{part}" for part in checkpoint.FILES)):
        assert (straight / "run" / file).read_bytes() == (stopped / "run" / file).read_bytes(), file


def train(*arguments: str) -> int:
    return main(["train", *SMALL, "--steps", "3", *arguments])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_trained_and_its_file_is_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--method", name, *options(name), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["losses"]) == 3
    assert len(set(told["losses"])) == 3
    read = load_adapter(Path("run"))
    assert type(read.config.method) is METHODS[name]
    assert read.config.housekeeping.get("inference_mode", True) is True


def test_the_loss_falls_and_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    method = ("--method", "lora", "--r", "4", "--target-modules", "all-linear", "--lora-dropout", "0.1", "--accumulate", "2")
    assert main(["train", *SMALL, *method, "--steps", "30", "--schedule", "cosine", "--warmup", "3", "--picture", "loss.svg"]) == 0
    told = capsys.readouterr()
    first, last = (float(x) for x in re.findall(r"(?:loss|,) (\d+\.\d+) at step", told.out))
    assert last < first - 0.5
    assert re.search(r"step 30/30  loss \d+\.\d+  [\d,]+ tokens/s  0:00:00 left", told.err)
    root = ET.parse("loss.svg").getroot()
    raw, smooth = [p.get("d", "") for p in root.iter("{http://www.w3.org/2000/svg}path") if "L" in p.get("d", "")]
    assert raw.count("L") == smooth.count("L") == 29
    heights = [float(point.split()[1]) for point in raw[1:].split("L")]
    assert heights[-1] > heights[0] + 50, "down is lower"


def test_a_configuration_file_and_token_ids(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ids").write_text(" ".join(map(str, [1, 2, 3, 4] * 20)))
    Path("c.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"], "lora_bias": False}))
    given = ["--tiny", "--data", "ids", "--ids", "--out", "run", "--length", "8", "--steps", "2", "--config", "c.json", "--r", "5"]
    assert main(["train", *given]) == 0
    read = load_adapter(Path("run"))
    assert read.modules["model.layers.0.self_attn.q_proj"].params.A.shape == (5, 32)
    assert read.config.housekeeping["base_model_name_or_path"] == os.path.join("run", "base")
    assert "LoRA on" in capsys.readouterr().out


LORA = ("--method", "lora", "--target-modules", "q_proj")
WRONG = {
    "a key of another method": (("--method", "lora", "--num-virtual-tokens", "2"), "lora has no num_virtual_tokens"),
    "no target": (("--method", "lora", "--target-modules", "nothing"), "nothing"),
    "no checkpoint": ((*LORA, "--resume"), "no checkpoint"),
    "a window longer than the text": ((*LORA, "--length", "5000"), "windows of 5000"),
    "no such schedule": ((*LORA, "--schedule", "steep"), "steep"),
    "no ids": ((*LORA, "--ids"), "is no token id"),
    "no such file": ((*LORA, "--data", "nowhere"), "nowhere"),
    "another task": ((*LORA, "--config", "c.json"), "not allowed"),
    "checkpoints backwards": ((*LORA, "--every", "-1"), "--every -1"),
    "no steps": ((*LORA, "--steps", "0"), "steps=0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_makes_no_sense_ends_with_2_and_a_sentence(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, told = WRONG[wrong]
    try:
        code = train(*arguments)
    except SystemExit as ended:  # argparse's own
        code = ended.code if isinstance(ended.code, int) else 0
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (Path("run") / WEIGHTS).exists()


def test_another_training_is_not_resumed_nor_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*LORA, "--every", "2") == 0
    assert train(*LORA, "--every", "2") == 2
    assert "Add --resume" in capsys.readouterr().err
    assert train(*LORA, "--resume", "--lr", "0.5") == 2
    assert "lr=0.01, asked for now: 0.5" in capsys.readouterr().err
    assert train("--method", "lora", "--target-modules", "k_proj", "--resume") == 2
    assert "config=" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*LORA, "--every", "2") == 0
    state = Path("run/checkpoint") / checkpoint.REST
    good = state.read_text()
    for bad in (b"{}", b"no json", good.replace('"step": 2', '"step": 3').encode(), good.replace("PCG64", "MT19937").encode(), b"\xff"):
        state.write_bytes(bad)
        assert train(*LORA, "--resume") == 2
        assert checkpoint.REST in capsys.readouterr().err


def test_a_loss_that_is_finite_no_longer_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with np.errstate(all="ignore"):
        assert (
            main(["train", *SMALL, "--lr", "1e30", "--steps", "20", "--clip", "1e30", "--method", "lora", "--target-modules", "all-linear"])
            == 1
        )
    assert "Take a lower lr" in capsys.readouterr().err
    assert not (Path("run") / WEIGHTS).exists()


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, progress: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("peft_ref.cli.train._Teller.tell", stop)
    assert train(*LORA, "--every", "2") == 130
    assert "--resume" in capsys.readouterr().err


def test_the_options_are_those_of_the_plan_and_of_all_methods() -> None:
    assert {name: default for name, (default, _, _) in cli.SETTINGS.items()} == asdict(Plan())
    assert cli.keys() == method_keys()


def test_a_folder_of_somebody_elses_is_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    (Path("run") / "base").mkdir(parents=True)
    (Path("run") / "base" / "config.json").write_text("{}")
    assert train(*LORA) == 2
    assert "not written over" in capsys.readouterr().err
    assert (Path("run") / "base" / "config.json").read_text() == "{}"


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "peft-ref train --tiny" in told
    assert "exit codes" in told
