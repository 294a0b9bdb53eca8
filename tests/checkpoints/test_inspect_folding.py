"""Folded names: short, and exactly the names that went in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peft_ref.checkpoints.folding import families, folded

PARTS = st.sampled_from(["layers", "0", "1", "2", "7", "10", "q_proj", "v_proj", "up", "mlp", ""])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=30)


@given(NAMES)
def test_folded_names_stand_for_each_name_once_and_for_no_other(names: list[str]) -> None:
    spelled = [name for members in families(names).values() for name in members]
    assert sorted(spelled) == sorted(set(names))


def test_layers_become_runs_and_words_what_differs() -> None:
    names = [f"model.layers.{n}.self_attn.{word}_proj" for n in range(32) for word in "qv"]
    assert folded([*names, "lm_head"]) == ["model.layers.{0..31}.self_attn.{q,v}_proj", "lm_head"]
    assert folded([f"h.{n}.q" for n in (0, 1, 2, 5)]) == ["h.{0..2,5}.q"]


def test_a_module_that_some_layers_lack_is_apart() -> None:
    assert folded(["h.0.q", "h.1.q", "h.0.v"]) == ["h.{0,1}.q", "h.0.v"]
