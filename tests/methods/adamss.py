"""AdaMSS, as the tests need to know it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.adamss import AdaMSS
from tests.methods.config_words import LAYERS, NUMBERS, OWN_TARGETS, SWITCH
from tests.methods.facts import Difference, Facts, Tour


def clustered(tuner: Any, adapter: str, method: AdaMSS) -> AdaMSS:
    """The method with PEFT's clusters and ranks, which no file and no configuration tells."""
    of = {int(row): i for i, rows in tuner.seg_result[adapter].items() for row in rows}
    ranks = tuple(int(A.shape[0]) for A in tuner.adamss_A[adapter])
    return replace(method, clusters=tuple(of[row] for row in range(len(of))), ranks=ranks if method.use_dynamic_rank else ())


def impose(tuner: Any, adapter: str, method: AdaMSS) -> None:
    import torch

    of = method.clusters
    tuner.scatter_index[adapter] = torch.tensor(sorted(range(len(of)), key=lambda row: (of[row], row)))


def options(method: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {word: value for word, value in asdict(method).items() if word not in ("clusters", "ranks")}


def adamss(**options: Any) -> Any:
    import peft

    return peft.AdamssConfig(**{"num_subspaces": 1, "target_modules": ["q", "up"], **options})


FACTS = Facts(
    # Two directions that are nearly as strong are told apart by a rounding: what they span is the same everywhere.
    without_signs=lambda p: {"onto": p["N"].T @ p["N"], **{k: v for k, v in p.items() if k.startswith("B")}},
    settings={
        "adamss": AdaMSS(r=4, num_subspaces=3, subspace_rank=2),
        "adamss-all": AdaMSS(),
        "adamss-dynamic": AdaMSS(r=5, num_subspaces=2, subspace_rank=3, use_dynamic_rank=True, svd_threshold=0.5),
    },
    peft_options=options,
    as_made_by=clustered,
    impose=impose,
    # k-means is PEFT's own: its starts are those of clusters that no case can ask for. Its forward wants a leading axis of x.
    unable=lambda case, dtype: case.startswith(("adamss.linear.init", "adamss.linear.vector")),
    fields={
        "r": st.sampled_from((3, 5, 100)),
        "num_subspaces": st.sampled_from((2, 1, 5)),
        "subspace_rank": st.sampled_from((1, 2)),
        "use_asa": st.just(False),
        "use_dynamic_rank": st.just(False),
    },
    config={"peft_type": "ADAMSS", "r": 4, "num_subspaces": 2, "target_modules": ["q", "up"]},
    space=OWN_TARGETS | LAYERS | {"r": NUMBERS, "use_asa": SWITCH, "init_weights": ["orthogonal", None, False, "kaiming"]},
    differences=(Difference("we", r"use_asa=('|\[).* expected bool", "a text or list as a switch: PEFT takes 'no' for true"),),
    # With one subspace nothing depends on k-means.
    models={
        "adamss": (None, lambda: adamss(r=3, subspace_rank=2, modules_to_save=["head"])),
    },
    tour=Tour("AdamssConfig", {"r": 3, "num_subspaces": 1}, frozenset({"gpt2"})),  # no Conv1D
    made=lambda module, method: bool(module.num_subspaces["default"] == min(method.num_subspaces, module.out_features)),
)
