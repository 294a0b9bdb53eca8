"""trainable_token_indices of a LoRA in a plan, beside PEFT's merge to the bit; in `verify`, in `inspect` and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="the extra `hf` is not installed")

from peft_ref.checkpoints.fitting import fitted
from peft_ref.checkpoints.inspecting import WRONG, inspect
from peft_ref.checkpoints.plan import Source
from peft_ref.checkpoints.planning import ROUNDINGS, plan
from peft_ref.cli import main
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, PeftRefError
from peft_ref.files.adapter import load_config, open_adapter, save_tensors
from peft_ref.graph import CheckpointGraph
from peft_ref.model.adapted import adapt
from peft_ref.model.parameters import load, save
from peft_ref.model.storing import load as load_onto
from tests.checkpoints.beside_peft import (
    DTYPES,
    array_of,
    carried_out,
    differing,
    llama,
    made,
    merged_by_peft,
    nn,
    peft,
    quietly,
    saved_adapter,
    saved_base,
)
from tests.checkpoints.test_plan_parameters import Mixture

pytestmark = pytest.mark.usefixtures("quiet")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": ["q_proj"], **options})


CASES: Mapping[str, tuple[Callable[[], Any], frozenset[str]]] = {  # and which tensors of a tied model get rows
    "list": (lambda: lora(trainable_token_indices=[99, 3, 50], modules_to_save=["norm"]), frozenset({TABLE})),
    "both alike": (lambda: lora(trainable_token_indices={"lm_head": [99, 3], "embed_tokens": [99, 3]}), frozenset({TABLE, HEAD})),
    "both apart": (lambda: lora(trainable_token_indices={"lm_head": [5], "embed_tokens": [99, 3]}), frozenset({TABLE, HEAD})),
    "head": (lambda: lora(trainable_token_indices={"lm_head": [5]}), frozenset({HEAD})),
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=5, target_r=2, total_step=9, target_modules=["q_proj"], trainable_token_indices=[7]),
        frozenset({TABLE}),
    ),
}
ASKED = ("both apart", "head")  # of a tied model the one weight gets rows that are not meant for both of its names


def folders(tmp_path: Path, case: str, dtype: str, tied: bool = False) -> tuple[Any, Path, Path]:
    model = made(lambda: llama(tie_word_embeddings=tied), dtype)
    return model, saved_base(model, tmp_path / "base"), saved_adapter(model, CASES[case][0](), tmp_path / "adapter")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_merge_has_the_bits_of_pefts(tmp_path: Path, case: str, dtype: str, tied: bool) -> None:
    model, base, adapter = folders(tmp_path, case, dtype, tied)
    for rounding in ROUNDINGS[: 2 if case == "adalora" else 3]:
        theirs = merged_by_peft(model, [adapter], rounding)
        ours = carried_out(plan(base, [Source(adapter)], rounding=rounding, exact=True, ties="share" if case in ASKED else "refuse"))
        assert not differing({name: theirs[name] for name in ours}, ours), rounding
        before = {name: array_of(tensor) for name, tensor in model.state_dict().items()}
        moved = {name for name in (TABLE, HEAD) if name in ours and differing({name: before[name]}, {name: ours[name]})}
        assert moved == ({TABLE} if tied else CASES[case][1])


@pytest.mark.parametrize("case", CASES)
def test_parted_names_of_a_tied_weight_get_the_rows_that_are_theirs(tmp_path: Path, case: str) -> None:
    """What the adapter computes unmerged: each name its own rows, and a head that follows the table's."""
    model, base, adapter = folders(tmp_path, case, "F32", tied=True)
    ours = carried_out(plan(base, [Source(adapter)], ties="untie"))
    live = peft.PeftModel.from_pretrained(model, adapter).base_model.model
    for module in ("model.embed_tokens", "lm_head"):
        assert not differing({"W": array_of(live.get_submodule(module).weight)}, {"W": ours[f"{module}.weight"]}), module


@pytest.mark.parametrize("case", ASKED)
def test_other_rows_for_one_name_of_a_tied_weight_ask_what_to_do(tmp_path: Path, case: str) -> None:
    _, base, adapter = folders(tmp_path, case, "F32", tied=True)
    with pytest.raises(NotMergeableError, match="ties='untie'"):
        plan(base, [Source(adapter)])


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_was_saved_whole_comes_before_the_rows(tmp_path: Path, tied: bool) -> None:
    model, base, _ = folders(tmp_path, "list", "F32", tied)
    tuned = peft.get_peft_model(made(lambda: llama(tie_word_embeddings=tied), "F32", seed=5), CASES["list"][0]())
    tuned.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    theirs = merged_by_peft(model, [tmp_path / "whole"])
    ours = carried_out(plan(base, [Source(tmp_path / "whole")], exact=True, ties="share"))
    assert not differing({name: theirs[name] for name in ours}, ours)
    assert differing({TABLE: array_of(model.state_dict()[TABLE])}, {TABLE: ours[TABLE]})[TABLE] > 1000


@pytest.mark.parametrize("targets", [None, ["embed_tokens"], ["lm_head"]], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_nothing_but_tokens_has_pefts_bits_on_a_tied_model_too(tmp_path: Path, tied: bool, targets: list[str] | None) -> None:
    model = made(lambda: llama(tie_word_embeddings=tied), "BF16")
    base = saved_base(model, tmp_path / "base")
    adapter = saved_adapter(model, peft.TrainableTokensConfig(token_indices=[99, 3], target_modules=targets), tmp_path / "adapter")
    theirs = merged_by_peft(model, [adapter])
    ours = carried_out(plan(base, [Source(adapter)], exact=True, ties="share" if targets == ["lm_head"] else "refuse"))
    assert not differing({name: theirs[name] for name in ours}, ours)


def test_a_head_whose_rows_are_saved_again_must_have_the_tables(tmp_path: Path) -> None:
    _, base, adapter = folders(tmp_path, "list", "F32", tied=True)
    file = open_adapter(adapter)
    tensors = {key: file.tensor(key) for key in file.entries}
    head = ROWS.replace("model.embed_tokens", "lm_head")
    save_tensors(tmp_path / "same", load_config(adapter), {**tensors, head: tensors[ROWS]}, {})
    plan(base, [Source(tmp_path / "same")])
    save_tensors(tmp_path / "other", load_config(adapter), {**tensors, head: tensors[ROWS] + 1}, {})
    with pytest.raises(KeyMismatchError, match="of one weight, and differ"):
        plan(base, [Source(tmp_path / "other")])
    for lazy in (False, True):
        with pytest.raises(KeyMismatchError, match="to which it is tied"):
            load_onto(adapt(CheckpointGraph(base)), tmp_path / "other", lazy=lazy)


def test_adapters_with_other_tokens_merge_together_and_with_the_same_ones_not(tmp_path: Path) -> None:
    model = made(llama, "BF16")
    base, folder = saved_base(model, tmp_path / "base"), dict[str, Path]()
    for seed, (name, options) in enumerate(
        {
            "a": {"trainable_token_indices": [3, 50]},
            "b": {"trainable_token_indices": [4]},
            "same": {"trainable_token_indices": [7, 50]},
            "table": {"target_modules": ["embed_tokens"]},
        }.items()
    ):
        folder[name] = saved_adapter(model, lora(**options), tmp_path / name, seed)
    theirs = merged_by_peft(model, [folder["a"], folder["b"]])
    ours = carried_out(plan(base, [Source(folder["a"]), Source(folder["b"])], exact=True))
    assert not differing({name: theirs[name] for name in ours}, ours)
    for other, said in (("same", "token 50"), ("table", "trains tokens of 'model.embed_tokens'")):
        with pytest.raises(ConfigError, match=said):
            plan(base, [Source(folder["a"]), Source(folder[other])])


@pytest.mark.parametrize(
    ("case", "called"),
    [("both alike", "the trainable_token_indices of its LORA"), ("adalora", "the trainable_token_indices of its ADALORA")],
)
def test_a_weight_other_than_1_is_refused_by_the_name_that_the_configuration_gives_the_rows(
    tmp_path: Path, case: str, called: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, base, adapter = folders(tmp_path, case, "F32")
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--weights", "0.5"]) == 1
    assert f"{adapter}: weight 0.5 with {called}: there is no delta that could be scaled.\n  Use weight 1." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def plain(model: Any, folder: Path, *lists: list[int], targets: Sequence[list[str] | None] = (None, None)) -> list[Path]:
    """An adapter of nothing but tokens for each list."""
    configs = [peft.TrainableTokensConfig(token_indices=a, target_modules=t) for a, t in zip(lists, targets, strict=True)]
    return [saved_adapter(model, config, folder / f"a{n}", seed=n) for n, config in enumerate(configs)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_adapters_of_nothing_but_tokens_merge_together_where_no_token_is_in_both(tmp_path: Path, dtype: str, tied: bool) -> None:
    model = made(lambda: llama(tie_word_embeddings=tied), dtype)
    base, adapters = saved_base(model, tmp_path / "base"), plain(model, tmp_path, [99, 3], [4, 50])
    theirs = merged_by_peft(model, adapters)
    ours = carried_out(plan(base, [Source(folder) for folder in adapters], exact=True))
    assert not differing({name: theirs[name] for name in ours}, ours)
    before = array_of(model.state_dict()[TABLE])
    assert np.flatnonzero((ours[TABLE] != before).any(axis=1)).tolist() == [3, 4, 50, 99]


@pytest.mark.parametrize("targets", [(None, None), (None, ["lm_head"])], ids=["table", "head"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_adapters_of_nothing_but_tokens_that_share_one_are_refused_before_anything_is_written(
    tmp_path: Path, tied: bool, targets: Sequence[list[str] | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that is tied to the table has the rows of the adapter on the table."""
    model = made(lambda: llama(tie_word_embeddings=tied), "F32")
    base, adapters = saved_base(model, tmp_path / "base"), plain(model, tmp_path, [99, 3], [4, 3], targets=targets)
    apart = not tied and targets[1] is not None
    with pytest.raises(KeyError if apart else ValueError, match="a1" if apart else "Only disjunct token indices"):
        merged_by_peft(model, adapters)
    if apart:  # each has its own module, which PEFT looks for both in
        plan(base, [Source(folder) for folder in adapters])
        return
    there = sorted(tmp_path.iterdir())
    assert main(["merge", str(base), *map(str, adapters), "-o", str(tmp_path / "out")]) == 1
    where = "lm_head" if targets[1] else "model.embed_tokens"
    assert f"a0 and {adapters[1]} both train token 3 of {where!r} and are merged together" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("no token 100 among 100 rows", lambda c: c.update(trainable_token_indices=[100, 3, 50])),
        ("no 'model.embed_tokens'|names 'wte'", lambda c: c.update(trainable_token_indices={"wte": [99, 3, 50]})),
        ("trainable_tokens_delta", lambda c: c.update(trainable_token_indices=[99, 3])),
        ("trainable_tokens_delta", lambda c: c.update(trainable_token_indices=None)),
        ("is a target of the adapter", lambda c: c.update(target_modules=["q_proj", "embed_tokens"])),
        ("trained in full", lambda c: c.update(modules_to_save=["embed_tokens", "norm"])),
    ],
)
def test_a_configuration_that_is_not_the_files_is_one_error(tmp_path: Path, said: str, change: Callable[[dict[str, Any]], None]) -> None:
    _, base, adapter = folders(tmp_path, "list", "F32")
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(config)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PeftRefError, match=said):
        plan(base, [Source(adapter)])


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], r".*(embed_tokens|lm_head)"], ids=str)
def test_a_head_that_is_named_beside_the_table_it_is_tied_to_is_one_error(
    tmp_path: Path, targets: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = peft.TrainableTokensConfig(token_indices=[99, 3], target_modules=targets)
    for tied in (False, True):
        model, folder = made(lambda tied=tied: llama(tie_word_embeddings=tied), "F32"), tmp_path / str(tied)
        base, adapter = saved_base(model, folder / "base"), saved_adapter(model, config, folder / "adapter")
        theirs = merged_by_peft(model, [adapter])
        if not tied:
            ours = carried_out(plan(base, [Source(adapter)], exact=True))
            assert not differing({name: theirs[name] for name in ours}, ours)
            assert not [finding for finding in fitted(inspect(adapter), CheckpointGraph(base)).findings if finding.level == WRONG]
    said = "names 'model.embed_tokens', and 'lm_head' too, which is tied to it (HF PEFT takes both, and cannot run)"
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["inspect", str(base), str(adapter)]) == 1
    assert said in " ".join(capsys.readouterr().out.split())


def test_rows_that_peft_saved_once_more_beside_a_second_adapter_are_merged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made(lambda: llama(tie_word_embeddings=True), "BF16")
    base, adapters = saved_base(model, tmp_path / "base"), plain(model, tmp_path, [99, 3], [4])
    live = peft.PeftModel.from_pretrained(made(lambda: llama(tie_word_embeddings=True), "BF16"), adapters[0])
    live.load_adapter(adapters[1], "second")
    live.save_pretrained(tmp_path / "both")
    file = open_adapter(tmp_path / "both")
    tensors = {key: file.tensor(key) for key in file.entries}
    again = "base_model.model.lm_head.base_layer.trainable_tokens_delta"
    assert again in tensors
    theirs = merged_by_peft(model, [adapters[0]])
    ours = carried_out(plan(base, [Source(tmp_path / "both")], exact=True))
    assert not differing({name: theirs[name] for name in ours}, ours)
    assert main(["inspect", str(base), str(tmp_path / "both")]) == 0
    assert f"{again} should be base_model.model.lm_head.trainable_tokens_delta once more" in " ".join(capsys.readouterr().out.split())
    save_tensors(tmp_path / "other", load_config(tmp_path / "both"), {**tensors, again: tensors[again] + 1}, {})
    with pytest.raises(KeyMismatchError, match=r"other: .*base_layer\.trainable_tokens_delta is not .*lm_head\.trainable_tokens_delta"):
        plan(base, [Source(tmp_path / "other")])


def test_rows_beside_bare_parameters_are_merged(tmp_path: Path) -> None:
    class Words(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(30, 48)

    model = made(Words, "BF16")
    base = saved_base(model, tmp_path / "base")
    (base / "config.json").write_text("{}")
    said = {"target_parameters": ["experts.down_proj"], "trainable_token_indices": {"embed_tokens": [29, 4]}}
    adapter = saved_adapter(model, lora(target_modules=["q"], **said), tmp_path / "adapter")
    theirs = merged_by_peft(model, [adapter])
    assert not differing(theirs, carried_out(plan(base, [Source(adapter)], exact=True)))
    kept = load(CheckpointGraph(base), adapter)
    assert kept.file.modules.keys() == {"layers.0.q", "layers.1.q", "embed_tokens"}
    save(tmp_path / "again", kept)
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_the_command_line_merges_verifies_and_inspects_it(tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, base, adapter = folders(tmp_path, "list", "BF16", tied)
    theirs = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with quietly():
        theirs.save_pretrained(tmp_path / "theirs")
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "ours"), "--exact"]) == 0
    weights = [(tmp_path / whose / "model.safetensors").read_bytes() for whose in ("ours", "theirs")]
    assert weights[0] == weights[1]
    assert main(["verify", str(base), str(adapter), str(tmp_path / "theirs")]) == 0
    capsys.readouterr()
    assert main(["verify", str(base), str(adapter), str(base)]) == 1
    assert "trainable_tokens: not-merged" in capsys.readouterr().out
    assert main(["inspect", str(base), str(adapter)]) == 0
    told = capsys.readouterr().out
    assert "trained tokens   [99, 3, 50]" in told
    assert "FINE" in told
    found = inspect(adapter)
    assert found.modules["model.embed_tokens"].parameters == 3 * 48
    assert [finding.said for finding in found.findings] == ["Dtypes of the tensors are mixed: 5 of F32, 5 of BF16."]  # modules_to_save


def test_a_pattern_of_targets_is_not_asked_about_the_rows(tmp_path: Path) -> None:
    said = lora(target_modules=r".*\.q_proj", trainable_token_indices=[3])
    adapter = saved_adapter(made(llama, "F32"), said, tmp_path / "adapter")
    assert inspect(adapter).findings == ()


def test_inspect_says_that_rows_are_missing(tmp_path: Path) -> None:
    _, base, adapter = folders(tmp_path, "list", "F32")
    file = open_adapter(adapter)
    tensors = {key: file.tensor(key) for key in file.entries if key != ROWS}
    save_tensors(tmp_path / "torn", load_config(adapter), tensors, {})
    assert any("the file has none" in finding.said for finding in inspect(tmp_path / "torn").findings)
    with pytest.raises(KeyMismatchError, match="trainable_tokens_delta"):
        plan(base, [Source(tmp_path / "torn")])


def test_inspect_beside_a_base_says_which_rows_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, base, adapter = folders(tmp_path, "both apart", "F32")
    file = open_adapter(adapter)
    tensors = {key: file.tensor(key) for key in file.entries if key != ROWS}
    save_tensors(tmp_path / "torn", load_config(adapter), tensors, {})
    assert main(["inspect", str(tmp_path / "torn")]) == 0
    assert main(["inspect", str(base), str(tmp_path / "torn")]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "1 of the 4 modules that target_modules matches or trainable_token_indices means in the base have no adapter" in told
