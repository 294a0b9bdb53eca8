"""RoAd, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.road import RoAd
from tests.methods.config_words import OWN_TARGETS, random_word
from tests.methods.facts import Facts, Tour


def as_made(module: Any, method: Any) -> bool:
    return bool((module.variant["default"], module.group_size["default"]) == (method.variant, method.group_size))


def road(**options: Any) -> Any:
    import peft

    return peft.RoadConfig(target_modules=["q"], **options)


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    own = {"variant": f"road_{random_word(rng, 1, 2, 4)}", "group_size": random_word(rng, 2, 10)}
    return road(**own, **{word: value for word, value in common.items() if word not in ("exclude_modules", "target_modules")})


FACTS = Facts(
    random=random_config,
    unable=lambda case, dtype: dtype == "float64" and case.endswith(".unmerge"),  # PEFT inverts in float32
    small={"group_size": 2},
    settings={
        **{f"road-{n}": RoAd(variant=f"road_{n}", group_size=4) for n in (1, 2, 4)},
        "road-pairs": RoAd(group_size=2),
    },
    fields={"variant": st.sampled_from(("road_1", "road_2", "road_4")), "group_size": st.sampled_from((2, 4))},
    few={"variant": st.sampled_from(("road_1", "road_2", "road_4")), "group_size": st.just(4)},
    layers={"linear": st.builds(lambda n, fours: Linear(in_features=n, out_features=4 * fours), st.integers(1, 6), st.integers(1, 3))},
    few_layers={"linear": Linear(in_features=5, out_features=8)},
    config={"peft_type": "ROAD", "group_size": 2, "target_modules": ["q"]},
    space=OWN_TARGETS
    | {
        "variant": ["road_1", "road_2", "road_4", "road_3", "", None, 1],
        "group_size": [2, 10, 4, 3, 0, -2, 64, "2", None],
        "init_weights": [True, False],
    },
    made=as_made,
    models={
        "road": (None, lambda: road(group_size=2, modules_to_save=["head"])),
        "road four": (None, lambda: road(variant="road_4", group_size=10)),
    },
    bits=None,  # cosines
    irrational=True,
    tour=Tour("RoadConfig", {"group_size": 2}, frozenset({"gpt2"})),  # no Conv1D
)
