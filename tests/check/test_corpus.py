"""A linter on the cases: the ten rules that known mistakes taught, and that the corpus does not change unnoticed.

After a wanted change:   python -m tests.check.frozen_corpus
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.check.attending import block_of
from peft_ref.check.case import (
    ARRAY_OPERATIONS,
    ATTENTION_OPERATIONS,
    LAYER_OPERATIONS,
    OPERATIONS,
    PROMPT_OPERATIONS,
    TRAINING_OPERATIONS,
    Case,
    build_method,
    from_json,
    map_arrays,
    to_json,
)
from peft_ref.check.corpus import corpus
from peft_ref.check.init_laws import shapes_of
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer, pose
from peft_ref.contracts import Additive, LowRank
from peft_ref.layers import Conv, Embedding, Layer
from peft_ref.methods import METHODS
from peft_ref.splice import TASKS
from tests.check.frozen_corpus import FILE, fingerprints
from tests.methods import facts
from tests.spec.pages import prefix

ARRAYS = tuple(c for c in corpus() if c.operation in ARRAY_OPERATIONS)
ADAPTERS = [(c, a) for c in ARRAYS for a in c.adapters]
SPEC = Path(__file__).parents[2] / "spec" / "methods"

# Where geometry forces sizes to meet. Everything else has to differ.
EQUAL_SIZES = {
    # A kernel of size 1 along one axis is what breaks merges that squeeze (peft#3768); in-channels 2 keep a 3-d case small.
    "conv3d": "kernel (2, 1, 3), 2 in, 3 out",
    # Groups divide both sides of the layer and the rank: 2 | 6, 10, 4.
    "groups": "2 groups, kernel (3, 2)",
    # OFT turns no convolution with a larger kernel; HRA knows only what is the same along both axes.
    "pointwise": "kernel (1, 1), 8 in",
    "square": "kernel (2, 2), stride (2, 2), padding (1, 1)",
}


def float_arrays(case: Case) -> dict[str, np.ndarray[Any, Any]]:
    named = {name: getattr(case, name) for name in ("weight", "bias", "x", "dy", "merged_weight", "merged_bias")}
    named |= {f"{i}.{key}": v for i, a in enumerate(case.adapters) for key, v in a.tensors.items()}
    asked: list[np.ndarray[Any, Any]] = []
    map_arrays(asked.append, case.question)
    named |= {f"asked {i}": v for i, v in enumerate(asked)}
    return {name: v for name, v in named.items() if v is not None and v.dtype.kind == "f"}


# ---- rules 1 to 4: nothing degenerate


def test_alpha_is_not_r_and_no_two_readings_of_the_scale_agree() -> None:
    for case, adapter in ADAPTERS:
        config = adapter.config
        if "r" not in config:
            continue
        alpha, r = config.get("lora_alpha", config.get("alpha")), config["r"]
        if alpha is None or not r:
            continue  # a method without a scale
        assert alpha != r, case.id
        readings = (alpha / r, alpha / math.sqrt(r), alpha, 1 / r, 1.0)
        assert all(a != b for a, b in combinations(readings, 2)), (case.id, readings)


def test_several_adapters_have_different_scales_and_ranks() -> None:
    for case in ARRAYS:
        if len(case.adapters) > 1 and case.adapters[0].config.get("r"):
            assert len({a.config["r"] for a in case.adapters}) == len(case.adapters), case.id
            methods = [build_method(case.method, a.config) for a in case.adapters]
            scales = {m.scale for m in methods if hasattr(m, "scale")}
            assert len(scales) in (0, len(case.adapters)), case.id


def test_no_factor_is_zero_anywhere_nor_the_identity() -> None:
    for case in ARRAYS:
        for name, v in float_arrays(case).items():
            measured = (name == "weight" and ".unit-norm." in case.id) or (case.method == "miss_bat" and name.endswith("miss_block"))
            if not measured:  # that weight, and blocks whose inverse is exact
                assert np.all(v != 0), (case.id, name)
            assert v.ndim < 2 or v.shape[0] != v.shape[1] or not np.array_equal(v, np.eye(len(v))), (case.id, name)
        for mask, p in (a.dropout for a in case.adapters if a.dropout):
            assert set(np.unique(mask)) == {0, 1}
            assert 0 < p < 1


@pytest.mark.parametrize("case", [c for c in ARRAYS if c.operation == "forward"], ids=lambda c: c.id)
def test_all_sizes_differ_and_none_is_one(case: Case) -> None:
    layer = case.layer
    assert layer is not None
    sizes = _sizes(layer)
    ranks = [a.config["r"] for a in case.adapters if a.config.get("r")]
    assert 1 not in (*sizes, *ranks)
    if ".linear-square." in case.id or layer.kind == "norm":  # on purpose: C3A's adapters chain, OSF's projections, IA3's sides
        return
    for one in (sizes, (*layer.shape, *ranks)):
        assert len(set(one)) == len(one), (case.id, one)
    assert case.x is not None
    assert 1 not in (n for axis, n in enumerate(case.x.shape) if axis < 2), "a batch of one hides a wrong sum over it"


def _sizes(layer: Layer) -> tuple[int, ...]:
    """What must not be confused: the two sides of the layer and, for a convolution, the sizes of its kernel among each other."""
    if isinstance(layer, Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if not isinstance(layer, Conv):
        return (layer.channels,) if layer.kind == "norm" else layer.shape
    kernel = layer.kernel_size if len(layer.kernel_size) < 3 else ()  # EQUAL_SIZES["conv3d"]
    square = layer.kernel_size == (2, 2)  # EQUAL_SIZES["square"]
    if math.prod(layer.kernel_size) == 1:  # EQUAL_SIZES["pointwise"]
        return layer.in_channels, layer.out_channels
    assert square or len(set(layer.kernel_size)) == len(layer.kernel_size)
    return (layer.in_channels, layer.out_channels) if kernel == () else (layer.shape[0], layer.shape[1], layer.channels)


def test_every_exception_from_different_sizes_is_one_that_exists() -> None:
    layers = {repr(c.layer) for c in ARRAYS}
    assert any("kernel_size=(2, 1, 3)" in text and "in_channels=2" in text for text in layers), EQUAL_SIZES["conv3d"]
    assert any("groups=2" in text for text in layers), EQUAL_SIZES["groups"]
    assert any("kernel_size=(1, 1)" in text and "in_channels=8" in text for text in layers), EQUAL_SIZES["pointwise"]
    assert any("kernel_size=(2, 2)" in text for text in layers), EQUAL_SIZES["square"]


def test_no_parameter_has_its_initial_value() -> None:
    for case, adapter in ADAPTERS:
        if case.method == "ia3":
            assert np.all(adapter.tensors["ia3_l"] != 1), case.id
        if case.method == "dora" and len(case.adapters) == 1:
            p = pose(case)
            method, params = p.adapters[0].method, p.adapters[0].params
            norms = np.linalg.norm(p.W + method.scale * (params.B @ params.A), axis=1)  # type: ignore[attr-defined]
            assert np.all(np.abs(params.m - norms) > 0.01 * norms), case.id


def test_dora_gains_differ_from_row_to_row() -> None:
    """One and the same gain everywhere would hide a gain along the wrong axis."""
    for case, adapter in ADAPTERS:
        if case.method == "dora":
            assert len(np.unique(adapter.tensors["lora_magnitude_vector"])) > 1, case.id


# ---- rules 6 to 9: absolute values, no round trips


def test_unmerge_is_not_asked_of_what_merge_gives() -> None:
    merged = {c.id.removesuffix("merge"): answer(c) for c in ARRAYS if c.operation == "merge"}
    for case in ARRAYS:
        if case.operation == "unmerge":
            given = case.merged_weight
            assert given is not None
            assert np.mean(given != merged[case.id.removesuffix("unmerge")]["weight"]) > 0.5, case.id


def test_no_case_tells_its_answer() -> None:
    for case in corpus():
        assert not {"expected", "answer", "right", "y"} & to_json(case).keys(), case.id


def test_every_answer_is_numbers_that_differ() -> None:
    for case in ARRAYS:
        for name, v in answer(case).items():
            assert np.all(np.isfinite(v)), (case.id, name)
            if not _alike_on_purpose(case, name):
                assert v.size > 1, (case.id, name)
                assert len(np.unique(v)) > 1, (case.id, name)
            elif name.endswith(ONE_NUMBER):
                assert np.all(v != 0), (case.id, name)


# Parameters that are one number, and so are their gradients: a gate, DeLoRA's strength, GLoRA's constants, FRoD's only place.
ONE_NUMBER = ("adaption_gate", "delora_lambda", "frod_lambda_s_values", "glora_A.X", "glora_B.X", "glora_D.X", "glora_E.X")
HELD = {("cartridge", "0.frozen_embedding"), ("cpt", "0.embedding.weight")}


def _alike_on_purpose(case: Case, name: str) -> bool:
    """A loss or gate is one number, the penalty gives E nothing, an orthonormal factor has no gradient, a module may lose all its E.

    The softmax of one logit is one (VB-LoRA's topk 1), and a series of one term is the identity (PSOFT's R): both have no gradient.

    Before its only row an LSTM has no output, so what is multiplied by it has no gradient. What a prompt holds constant has none.
    """
    held = (case.method, name) in HELD and case.operation == "prompt_backward"
    if (held and not case.adapters[0].config["inference_mode"]) or name.endswith("adaption_gate"):
        return True
    if name.endswith(ONE_NUMBER) and answer(case)[name].size <= 1:
        return True  # GLoRA's may also be a matrix
    if (case.method == "vblora" and "vblora_logits" in name and case.adapters[int(name[0])].config["topk"] == 1) or (
        case.id == "psoft.linear.terms-1.backward" and name == "0.psoft_R.weight"
    ):
        return not np.any(answer(case)[name])
    if "monteclora_sampler." in name:
        return True  # it is read in training alone
    if ".lstm-one-row." in case.id:
        return "weight_hh" in name
    if case.operation == "aux_loss":
        return name == "loss" or name.endswith("lora_E") or ".orthogonal." in case.id
    return case.operation == "allocate" and name.startswith("steps.") and name.endswith("lora_E")


def test_what_is_asked_of_all_modules_has_a_complete_configuration_and_modules_of_different_sizes() -> None:
    for case in (c for c in ARRAYS if c.operation in TRAINING_OPERATIONS):
        config = case.question["adapter_config"]
        assert {f.name for f in fields(build_method(case.method, config))} <= config.keys(), case.id  # type: ignore[arg-type]
        modules = case.question["parameters"] if case.operation == "aux_loss" else case.question["steps"][0]["parameters"]
        shapes = [(t["lora_A"].shape[1], t["lora_B"].shape[0]) for t in modules.values()]
        assert len(set(shapes)) == len(shapes) > 1, case.id
        for n_in, out in shapes:
            assert len({1, n_in, out, config["init_r"]}) == 4, case.id


# ---- what a port receives


def test_every_number_has_at_most_eight_significant_bits() -> None:
    """So that no format rounds a question: bfloat16 has eight."""
    for case in ARRAYS:
        for name, v in float_arrays(case).items():
            for number in v.reshape(-1).tolist():
                n = abs(number.as_integer_ratio()[0])
                assert (n // (n & -n) if n else 0).bit_length() <= 8, (case.id, name, number)


def test_a_case_survives_json() -> None:
    for case in corpus():
        text = json.dumps(to_json(case), allow_nan=False)
        again = from_json(json.loads(text))
        assert to_json(again) == json.loads(text) == to_json(case), case.id
        assert (again.id, again.method, again.operation, again.clause, again.layer) == (
            case.id,
            case.method,
            case.operation,
            case.clause,
            case.layer,
        )
        for name, v in float_arrays(case).items():
            w = float_arrays(again)[name]
            assert w.dtype == v.dtype == np.float64, (case.id, name)
            np.testing.assert_array_equal(w, v)
        if case.operation in ARRAY_OPERATIONS:
            for name, v in answer(case).items():
                np.testing.assert_array_equal(answer(again)[name], v, err_msg=case.id)


def test_a_configuration_in_a_case_is_complete() -> None:
    """Nothing is left to a port's defaults, but where defaults are the question."""
    for case, adapter in ADAPTERS:
        hyper_parameters = {f.name for f in fields(METHODS[case.method])}  # type: ignore[arg-type]  # every method is a dataclass
        assert hyper_parameters <= adapter.config.keys(), case.id
        wanted = {} if case.operation == "splice" else shapes_of(case)
        assert {key: v.shape for key, v in adapter.tensors.items()} == wanted or len(case.adapters) > 1, case.id


# ---- nothing is left out


def test_every_method_is_asked_every_operation_on_every_kind_of_layer() -> None:
    asked = {(c.method, c.layer.kind, c.operation) for c in ARRAYS if c.layer is not None}
    wanted = set()
    for name, cls in METHODS.weights.items():
        no_delta = not issubclass(cls, LowRank | Additive) or name == "beft"  # which adds to the bias alone
        operations = {*LAYER_OPERATIONS} - ({"delta"} if no_delta else set())
        wanted |= {(name, kind, operation) for kind in cls.kinds for operation in operations}
    assert asked == wanted


def test_every_prompt_is_asked_every_operation_and_spliced_into_every_task() -> None:
    for name in METHODS.prompts:
        own = [c for c in ARRAYS if c.method == name]
        assert {c.operation for c in own} == set(PROMPT_OPERATIONS), name
        only = METHODS.prompts[name].only_task
        assert {c.question["task_type"] for c in own if c.operation == "splice"} == (set(TASKS) if only is None else {only}), name
        sides = {c.adapters[0].config["num_transformer_submodules"] for c in own}
        assert sides == ({1, 2} if only is None else {1}), name


def test_the_sizes_of_a_prompt_differ_and_none_is_one() -> None:
    for case in ARRAYS:
        for name, v in case.adapters[0].tensors.items() if case.operation in PROMPT_OPERATIONS else ():
            if not any(variant in case.id for variant in (".lstm-one-row.", ".one-of-each.")):  # one is what they are about
                assert 1 not in v.shape, (case.id, name)
            assert v.ndim < 2 or len(set(v.shape)) == v.ndim or "lstm" in name or "mlp_head" in name, (case.id, name)


def test_what_adds_to_attention_is_asked_forward_and_backward_on_every_kind_of_block() -> None:
    for name in METHODS.attention:
        own = [c for c in ARRAYS if c.method == name]
        assert {c.operation for c in own} == set(ATTENTION_OPERATIONS), name
        blocks = [block_of(c.question["attention"]) for c in own]
        assert {b.fused for b in blocks} == {True, False}
        assert {b.num_key_value_heads < b.num_attention_heads for b in blocks} == {True, False}
        biases = [part["bias"] is None for c in own for part in c.question["attention"]["projections"].values()]
        assert set(biases) == {True, False}


def test_the_sizes_of_a_question_about_attention_differ_and_none_is_one() -> None:
    for case in (c for c in ARRAYS if c.operation in ATTENTION_OPERATIONS):
        block, (batch, _, tokens, d) = block_of(case.question["attention"]), case.question["q"].shape
        n = case.adapters[0].config["adapter_len"]
        sizes = {block.num_attention_heads, block.num_key_value_heads, block.hidden_size, tokens, d, n}
        several = len({block.num_attention_heads, block.num_key_value_heads})
        assert len(sizes) == 4 + several, case.id
        assert 1 not in {batch, *sizes} - ({n} if ".one-row." in case.id else set()), case.id
        assert case.adapters[0].tensors["adaption_gate"] not in (0, 1), case.id


def test_every_method_is_asked_about_everything_else() -> None:
    asked = {(c.method, c.operation) for c in corpus()}
    assert {o for _, o in asked} == set(OPERATIONS)
    for name in METHODS:
        assert {(name, "init"), (name, "config"), (name, "state_dict")} <= asked


def test_several_adapters_biases_and_dropout_are_asked() -> None:
    for name in METHODS.weights:
        own = [c for c in ARRAYS if c.method == name]
        assert METHODS.weights[name].swaps or any(len(c.adapters) > 1 for c in own), name  # of those that swap layers, one acts
        assert any(c.bias is None and c.layer is not None and c.layer.kind != "embedding" for c in own), name
        assert any(c.bias is not None for c in own), name
    for name in ("lora", "dora"):
        assert any(a.dropout for c, a in ADAPTERS if c.method == name), name


def test_cases_with_bits_and_cases_with_tolerances_are_both_there() -> None:
    from peft_ref.check.diagnose import expected_answer

    # CPT and attention are irrational; prompt tuning and Cartridge only add up.
    for name in set(METHODS) - {"adaption_prompt", "cartridge", "cpt", "prompt_tuning", "trainable_tokens"}:
        narrow = "bfloat16" if name == "multitask_prompt_tuning" else facts(name).bits  # three numbers are multiplied, no more
        if narrow is None:
            continue
        kinds = Counter(expected_answer(c, narrow).exact for c in ARRAYS if c.method == name)
        assert kinds[True] > kinds[False] > 0, name


# ---- stable


def test_ids_are_unique_and_say_what_is_asked() -> None:
    ids = Counter(c.id for c in corpus())
    assert not [i for i, n in ids.items() if n > 1]
    for case in ARRAYS:
        assert (case.id.split(".")[0], case.id.split(".")[-1]) == (case.method, case.operation)


def test_no_case_has_changed_since_it_was_frozen() -> None:
    frozen, now = json.loads(FILE.read_text("utf-8")), fingerprints()
    gone, new = sorted(frozen.keys() - now.keys()), sorted(now.keys() - frozen.keys())
    changed = [i for i in now if i in frozen and now[i] != frozen[i]]
    assert (gone, new, changed) == ([], [], []), "wanted? then run: python -m tests.check.frozen_corpus"


def test_the_corpus_is_the_same_in_another_process() -> None:
    """Nothing of it may hang on hash seeds, on import order or on what was drawn before."""
    show = "import json; from tests.check.frozen_corpus import fingerprints; print(json.dumps(fingerprints()))"
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    out = subprocess.run([sys.executable, "-c", show], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == fingerprints()


def test_every_clause_that_is_cited_is_in_the_specification() -> None:
    cited = {c.clause for c in corpus()} | {m.clause for suite in SUITES.values() for m in suite.mistakes}
    cited |= {v.clause for suite in SUITES.values() for v in suite.variants}
    written: set[str] = set()
    for page in SPEC.glob("*.md"):
        text = page.read_text("utf-8")
        written |= set(re.findall(r"^- \*\*([A-Z0-9]+-C\d+)\*\*", text, re.MULTILINE))
    assert not sorted(cited - written)


def test_a_case_cites_its_own_method_or_the_family_it_belongs_to() -> None:
    family = {"dora": {"DORA", "LORA"}, **{name: {prefix(name), "PROMPTTUNING"} for name in METHODS.prompts}}
    family["cartridge"] = {"CARTRIDGE", "PREFIXTUNING"}
    for case in corpus():
        assert case.clause.split("-")[0] in family.get(case.method, {prefix(case.method)}), case.id
