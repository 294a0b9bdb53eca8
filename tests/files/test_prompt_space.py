"""What PEFT refuses of a prompt we refuse, what it accepts we accept, and alike: every word of a configuration and random ones, live.

PEFT is asked by making the configuration object and `get_peft_model` on a small model, which builds the encoder; we by reading the
configuration, taking its sizes from that model, and starting. Where the two differ on purpose, DIFFERENCES says why.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from peft_ref.errors import PeftRefError  # noqa: E402
from peft_ref.files.config import flatten, from_dict, parse, render  # noqa: E402
from peft_ref.files.safetensors import open_file, serialize  # noqa: E402
from peft_ref.methods.cpt import DELTA  # noqa: E402
from peft_ref.prompts import EMBEDDING, Prompt, Sources  # noqa: E402
from tests.files.config_space import explained  # noqa: E402
from tests.files.prompt_models import base  # noqa: E402
from tests.files.prompt_space import PICKLED, SOURCE, STARTS, TOKENIZER, every_single_prompt_change, random_prompt_config  # noqa: E402
from tests.methods.facts import Difference  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("quiet")]
RANDOM = 450
WORDS = {"[UNK]": 0, "say": 1, "it": 2}
LIKE = np.zeros(0, dtype=np.float32)


# spec/configs.md tells it to readers.
UNSEEN = "PEFT checks a value when an encoder asks for it, and here none did; a file is wrong all the same"
ENCODER = r"encoder_(hidden_size|num_layers|dropout|reparameterization_type)"
DIFFERENCES = (
    Difference("we", r"(prefix_projection|inference_mode)=('|\[).* expected bool", "a text or list as a switch: PEFT takes 'no' for true"),
    Difference("we", r"init_weights=(True|0) is of type", "a start that is no text: PEFT takes whatever is not 'zero' for a random one"),
    Difference("we", r"=True is of type bool", "a truth value as a number: PEFT computes with 1"),
    Difference(
        "we",
        r"(num_virtual_tokens|token_dim|num_transformer_submodules|encoder_hidden_size|num_ranks|num_tasks)=0: a pos",
        "a size of nothing: PEFT builds an empty encoder, whose prompt is no prompt",
    ),
    Difference("we", r"modules_to_save='lm_head' is not understood", "a text as a list: PEFT takes every letter for a name"),
    Difference(
        "we",
        r"prompt_tuning_init=(('random'|'MAGIC'|'') is not known|(None|3) is of type)",
        "PEFT takes a start that it does not know for RANDOM, without a word",
    ),
    Difference("we", r"(num_attention_heads|num_layers|token_dim|num_transformer_submodules)=.*(is of type|a positive number)", UNSEEN),
    Difference("we", rf"{ENCODER}=.*(is of type|a positive number|a share)", UNSEEN),
    Difference("we", r"prompt_tuning_init_(text|task|state_dict_path)=.* is of type", UNSEEN),
    Difference("we", r"num_frozen_tokens=1\.0 is of type float", "a number of tokens that is no whole number: PEFT cuts it off"),
    Difference(
        "we",
        r"cpt_(token_ids|mask|tokens_type_mask)=.*(whole numbers are needed|is of type)",
        "entries that are no whole numbers, and tokens below 0: PEFT cuts off what it reads, and does not read the rest",
    ),
    Difference("we", r"opt_weighted_loss_type=.*(not known|is of type)", "PEFT takes a loss that it does not know for none"),
    Difference("we", r"opt_(loss_decay_factor|projection_(format_)?epsilon)=.* is of type (str|NoneType)", UNSEEN),
    Difference("we", r"tokenizer_name_or_path=3 is of type int", UNSEEN),
    Difference("we", r"num_virtual_tokens=.* is of type", "CPT counts its tokens instead; a file is wrong all the same"),
    Difference(
        "PEFT",
        r"KeyError: None",
        "no task_type: get_peft_model wants one; from_pretrained does not, and then never uses the prompt. Here `splice` asks for it",
    ),
    Difference("PEFT", r"'str' object has no attribute 'value'", "its warning about an MLP's number of layers fails on the text of a file"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tokenizer, and another adapter's tensors, in the working folder."""
    place, before = tmp_path_factory.mktemp("space"), os.getcwd()
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(place / TOKENIZER)
    rng = np.random.default_rng(0)
    shapes = {"prompt_embeddings": (3, 12), "prefix_task_cols": (2, 3, 1), "prefix_task_rows": (2, 1, 12)}
    source = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    (place / SOURCE).write_bytes(serialize(source, {}))
    torch.save({name: torch.from_numpy(value) for name, value in source.items()}, place / PICKLED)
    os.chdir(place)
    try:
        yield place
    finally:
        os.chdir(before)


def theirs(data: dict[str, Any]) -> dict[str, tuple[int, ...]] | str:
    """The shapes of the encoder's tensors, or why PEFT refuses."""
    try:
        config = peft.PeftConfig.from_peft_type(**copy.deepcopy(data))
        model = peft.get_peft_model(base("CAUSAL_LM"), config)
    except Exception as error:  # PEFT raises whatever the wrong value leads to
        return f"{type(error).__name__}: {error}"
    shapes = {name: tuple(value.shape) for name, value in model.prompt_encoder["default"].state_dict().items()}
    return _saved(config, shapes) if config.inference_mode else shapes


def _saved(config: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The table alone, which is all that is used once it is saved."""
    if config.peft_type == "CARTRIDGE":
        return {EMBEDDING: (sum(rows for rows, _ in shapes.values()), next(iter(shapes.values()))[1])}
    return {name: shape for name, shape in shapes.items() if name != DELTA}


@cache
def known() -> tuple[Any, dict[str, Any]]:
    """The model's word embeddings and its configuration."""
    model = base("CAUSAL_LM")
    return model.get_input_embeddings().weight.detach().numpy(), model.config.to_dict()


def ours(data: dict[str, Any]) -> dict[str, tuple[int, ...]] | str:
    """The same, or why we refuse. Anything but our own errors is a bug."""
    words, model = known()
    path = data.get("prompt_tuning_init_state_dict_path")
    tensors = None
    if isinstance(path, str) and Path(path).is_file():  # a pickle is for its owner to read
        tensors = {k: v.numpy() for k, v in torch.load(path).items()} if path == PICKLED else _read(path)
    try:
        method: Any = from_dict(data).method
        sized: Prompt = method.sized(model, data.get("task_type"))
        start = sized.init(LIKE, np.random.default_rng(0), Sources(words, lambda text: [WORDS.get(w, 0) for w in text.split()], tensors))
        sized.check(start)
    except PeftRefError as error:
        return f"{type(error).__name__}: {error}"
    return {name: tuple(value.shape) for name, value in start.items()}


def _read(path: str) -> dict[str, Any]:
    file = open_file(Path(path))
    return {key: file.read(key) for key in file.entries}


def test_both_refuse_the_same_and_accept_the_same_and_mean_the_same(folder: Path) -> None:
    rng = np.random.default_rng(17)
    outcomes: Counter[tuple[str, str, bool]] = Counter()
    used: set[Difference] = set()
    configs = [*every_single_prompt_change(), *(random_prompt_config(rng) for _ in range(RANDOM))]
    for data in configs:
        peft_says, we_say = theirs(data), ours(data)
        if isinstance(peft_says, str) != isinstance(we_say, str):
            used.add(explained(DIFFERENCES, data, peft_says, we_say))
        elif isinstance(we_say, dict):
            assert peft_says == we_say, data
        outcomes[data["peft_type"], "refused" if isinstance(peft_says, str) else "accepted", isinstance(we_say, str)] += 1
    for kind in STARTS:
        assert outcomes[kind, "refused", True] > 40, "the space must hold what both refuse"
        assert outcomes[kind, "accepted", False] > 60, "and what both accept"
    assert used == set(DIFFERENCES), f"no longer seen: {set(DIFFERENCES) - used}"


def test_what_is_accepted_is_written_back_as_it_was() -> None:
    rng = np.random.default_rng(18)
    kept = 0
    for _ in range(300):
        data = random_prompt_config(rng)
        try:
            config = from_dict(data)
        except PeftRefError:
            continue
        kept += 1
        assert flatten(config) == data
        assert parse(render(config)) == config
    assert kept > 100
