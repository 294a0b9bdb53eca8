"""PEFT loads what `peft-ref train` leaves, on the model that it was trained on, and computes the same logits.

No labels go in: PEFT's AdaLoRA in inference mode fails on a loss (it asks for the trainable adapter's penalty, and there is none).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref.cli import main  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.model import adapt  # noqa: E402
from peft_ref.model import load as load_onto  # noqa: E402
from peft_ref.nn import Inputs, Llama, load  # noqa: E402
from peft_ref.nn.prompted import with_prompt  # noqa: E402
from peft_ref.prompts import Context, Prompt  # noqa: E402
from peft_ref.train import net_of  # noqa: E402
from tests.train.test_cli import ADALORA, OPTIONS, SMALL, TEXT  # noqa: E402

IDS = np.frombuffer(TEXT[:24], dtype=np.uint8).astype(np.int64).reshape(2, 12)


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_computes_the_same_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(TEXT)
    method = (*ADALORA, *OPTIONS[name]) if name == "adalora" else ("--method", name, *OPTIONS[name])
    assert main(["train", *SMALL, "--steps", "8", *method]) == 0
    if name == "adalora":
        kept = json.loads(Path("run/adapter_config.json").read_text())["rank_pattern"]
        assert 0 < sum(sum(each) for each in kept.values()) < 4 * len(kept)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained("run/base", attn_implementation="eager").eval()
        plain = base(input_ids=torch.tensor(IDS)).logits.numpy().copy()
        live = peft.PeftModel.from_pretrained(base, "run").eval()
        tasks = {"task_ids": torch.zeros(2, dtype=torch.int64)} if name.startswith("multitask") else {}
        expected = live(input_ids=torch.tensor(IDS), **tasks).logits.numpy()
    got = ours(Path("run"))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected[:, -12:] - plain).max() > 1e-3 * np.abs(plain).max(), "the training did nothing"


def ours(folder: Path) -> np.ndarray[Any, Any]:
    """The logits with the adapter that lies in `folder`."""
    model, net, graph = load(folder / "base")
    assert isinstance(model, Llama)
    inputs, read = Inputs(input_ids=IDS), load_adapter(folder)
    method = read.config.method
    if isinstance(method, Prompt):
        rows = method.prompt(read.prompt, Context(batch=2, task_ids=np.zeros(2, dtype=np.int64)))
        inputs = with_prompt(model, net, method, rows, inputs, "CAUSAL_LM")
    else:
        net = net_of(model, load_onto(adapt(graph), folder))
    return np.asarray(model.forward(net, inputs).logits)
