"""OFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Conv, Embedding, Linear
from peft_ref.methods.oft import OFT
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS, flip
from tests.methods.facts import Difference, Facts, Tour


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    found = (module.oft_R if "default" in module.oft_R else module.oft_embedding_R)["default"]
    return bool(
        (module.r["default"], module.oft_block_size["default"]) == method.blocks(layer_of(module))
        and (bool(found.coft), found.eps, bool(found.block_share)) == (method.coft, method.eps, method.block_share)
        and (bool(found.use_cayley_neumann), found.num_cayley_neumann_terms) == (method.use_cayley_neumann, method.num_cayley_neumann_terms)
    )


def oft(**options: Any) -> Any:
    import peft

    return peft.OFTConfig(**{"target_modules": ["q"], **options})


def pointwise() -> Any:
    from torch import nn

    return nn.ModuleDict({"c": nn.Conv2d(4, 6, 1)})


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    """`coft` stays off: PEFT overwrites what it loaded, OFT-Q6."""
    size = {"r": int(rng.integers(1, 7)), "oft_block_size": 0} if flip(rng) else {"oft_block_size": int(rng.integers(1, 9))}
    ways = {"block_share": flip(rng), "use_cayley_neumann": flip(rng), "num_cayley_neumann_terms": int(rng.integers(1, 7))}
    return oft(**{**common, **size, **ways, "target_modules": ["q", "up"]})


FACTS = Facts(
    random=random_config,
    unable=lambda case, dtype: dtype == "float64" and case.endswith(".unmerge"),  # PEFT inverts in float32
    dialects={"adapters-reversed": lambda case, dtype: case.startswith("oft.linear-blocks.two-adapters.") and not case.endswith("merge")},
    small={"oft_block_size": 2},
    settings={
        "oft": OFT(oft_block_size=5),
        "oft-two": OFT(oft_block_size=2),
        "oft-r": OFT(r=3, oft_block_size=0, num_cayley_neumann_terms=3),
        "oft-solved": OFT(oft_block_size=5, use_cayley_neumann=False),
        "oft-shared": OFT(oft_block_size=2, block_share=True, num_cayley_neumann_terms=7),
        "oft-coft": OFT(oft_block_size=6, coft=True, eps=0.5, block_share=True),
        "oft-coft-apart": OFT(oft_block_size=2, coft=True, eps=0.1, num_cayley_neumann_terms=4),
        "oft-two-terms": OFT(oft_block_size=5, num_cayley_neumann_terms=2),
    },
    numbers=lambda name, values: values / 8,  # the series is nearly orthogonal only near zero
    chained_backwards=lambda layer: layer.kind != "embedding",  # OFT-Q3
    fields={
        "r": st.just(0),
        "oft_block_size": st.sampled_from((2, 4)),
        "eps": st.sampled_from((0.5, 8.0)),
        "num_cayley_neumann_terms": st.sampled_from((5, 1, 2, 3, 6)),
    },
    few={"r": st.just(0), "oft_block_size": st.just(2)},
    layers={
        "conv2d": st.builds(
            lambda n_in, out, s: Conv(in_channels=n_in, out_channels=out, kernel_size=(1, 1), stride=(s, 1)),
            st.integers(1, 6),
            st.integers(1, 4),
            st.integers(1, 3),
        )
    },
    few_layers={
        "embedding": Embedding(num_embeddings=5, embedding_dim=4),
        "linear": Linear(in_features=4, out_features=5),
        "conv2d": Conv(in_channels=4, out_channels=3, kernel_size=(1, 1), stride=(1, 2), padding=(1, 0)),
    },
    config={"peft_type": "OFT", "oft_block_size": 3, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": [0, *NUMBERS],
        "oft_block_size": NUMBERS,
        "module_dropout": [0.0, 0.5],
        "coft": SWITCH,
        "eps": [6e-5, 0.5, 1, None, "1"],
        "block_share": SWITCH,
        "use_cayley_neumann": SWITCH,
        "num_cayley_neumann_terms": [5, 1, 3, 0],
        "init_weights": [True, False],
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    differences=(Difference("we", r"OFT on a convolution with kernel_size=\(3, 2\)", "PEFT turns patches, which no merged weight does"),),
    models={
        "oft": (None, lambda: oft(oft_block_size=3, target_modules=["q", "up", "table"], modules_to_save=["head"])),
        "oft by number": (None, lambda: oft(r=3, oft_block_size=0, use_cayley_neumann=False, bias="all")),
        "oft conv": (pointwise, lambda: oft(oft_block_size=2, target_modules=["c"])),
        "oft shared": (None, lambda: oft(oft_block_size=3, block_share=True)),
    },
    tour=Tour("OFTConfig", {"oft_block_size": 2}, frozenset({"gpt2"})),  # no Conv1D
)
