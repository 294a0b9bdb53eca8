"""The question `config` about prompts: which sizes a configuration comes to on a model. There is no tolerance.

    adapter_config, model_config  -> {"sizes": {"rows": ..., "columns": ..., "token_dim": ..., ...}}

`rows` and `columns` are those of the table that a file holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from peft_ref.check.case import Case, build_prompt, config_of
from peft_ref.files.rules import field_names
from peft_ref.methods import METHODS
from peft_ref.prompts import Prompt

Question: TypeAlias = Mapping[str, Any]
Sizes: TypeAlias = dict[str, int]

# What a configuration may leave to the model.
LEFT_OUT = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")
HIDDEN = "encoder_hidden_size"


def right_sizes(case: Case) -> dict[str, Any]:
    return {"sizes": sizes_of(_sized(case.method, case.question))}


def sizes_of(method: Prompt) -> Sizes:
    rows, columns = method.table_shape
    sizes = {"rows": rows, "columns": columns, **{name: method.size(name) for name in LEFT_OUT}}
    return {**sizes, HIDDEN: method.size(HIDDEN)} if HIDDEN in field_names(type(method)) else sizes


def _sized(name: str, question: Question) -> Prompt:
    """The method on its model. A file's configuration also says the task, which is no hyper-parameter."""
    config = question["adapter_config"]
    method = build_prompt(name, {k: v for k, v in config.items() if k != "task_type"})
    return method.sized(question["model_config"], config.get("task_type"))


def grade_sizes(case: Case, answer: Mapping[str, Any]) -> str:
    right, got = right_sizes(case)["sizes"], answer.get("sizes")
    if not isinstance(got, Mapping):
        return 'the answer must hold "sizes", an object of numbers'
    if _same(right, got):
        return ""
    for name, (sentence, wrong) in size_mistakes(case).items():
        if _same(wrong, got):
            return f"{name}: {sentence}"
    return "; ".join(f"{name} is {got.get(name)}, expected {want}" for name, want in right.items() if not _same({name: want}, got))


def _same(want: Sizes, got: Mapping[str, Any]) -> bool:
    return all(got.get(name) == size and not isinstance(got.get(name), bool) for name, size in want.items())


# ---- what goes wrong


def size_mistakes(case: Case) -> dict[str, tuple[str, Sizes]]:
    """By name, a sentence and the sizes that a port which makes the mistake answers; only where they are others than the right ones."""
    right, of_keys = sizes_of(_sized(case.method, case.question)), METHODS.prompts[case.method].place == "cache"
    own = METHODS.prompts[case.method].own_sizes
    found = {
        **(_of_keys(case, right) if of_keys else _of_embeddings(case, right)),
        **({**_of_submodules(case, right, of_keys), **_of_the_model(case)} if own else _of_the_file(case, right)),
    }
    return {name: (sentence, wrong) for name, (sentence, wrong) in found.items() if not _same(right, wrong)}


def _asked(case: Case, config: Question | None = None, model: Question | None = None) -> Sizes:
    """The sizes of another configuration, or on another model."""
    question = case.question
    changed = {"adapter_config": config or question["adapter_config"], "model_config": model or question["model_config"]}
    return sizes_of(_sized(case.method, changed))


def _text(case: Case) -> Question:
    """The model's configuration, or where it has several parts that of the one for text."""
    model: Question = case.question["model_config"]
    return model.get("text_config") or model


def _without(config: Question, *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


def _of_keys(case: Case, right: Sizes) -> dict[str, tuple[str, Sizes]]:
    text = _text(case)
    found = {
        "keys-without-values": (
            "a row holds one vector for every layer instead of a key and a value",
            {**right, "columns": right["columns"] // 2},
        )
    }
    if "num_key_value_heads" not in text:
        return found
    queries = _asked(case, model=_without(text, "num_key_value_heads", "head_dim"))
    encoder = (
        "encoder_hidden_size is the model's hidden size instead of token_dim",
        {**right, HIDDEN: queries.get(HIDDEN, 0)},
    )
    return found | {
        **({"encoder-as-wide-as-the-model": encoder} if HIDDEN in right else {}),
        "grouped-queries-ignored": ("keys and values are given as many heads as queries have", queries),
        "head-dim-ignored": (
            "head_dim is not read: a head is taken for hidden_size / num_attention_heads wide",
            _asked(case, model=_without(text, "head_dim")),
        ),
        "heads-of-queries": (
            "num_attention_heads counts the heads of queries, token_dim the numbers of keys",
            {**right, "num_attention_heads": queries["num_attention_heads"]},
        ),
        "token-dim-of-queries": (
            "token_dim is the model's hidden size instead of that of all heads of keys together",
            {**queries, "num_attention_heads": right["num_attention_heads"]},
        ),
    }


def _of_embeddings(case: Case, right: Sizes) -> dict[str, tuple[str, Sizes]]:
    text = _text(case)
    if "num_key_value_heads" not in text:
        return {}
    heads = text["num_key_value_heads"]
    width = heads * text.get("head_dim", right["token_dim"] // right["num_attention_heads"])
    narrow = {"token_dim": width, "columns": width, "num_attention_heads": heads, **({HIDDEN: width} if HIDDEN in right else {})}
    sentence = "token_dim is that of keys and values; a virtual token is as wide as the model's hidden size"
    return {"keys-for-embeddings": (sentence, {**right, **narrow})}


def _of_submodules(case: Case, right: Sizes, of_keys: bool) -> dict[str, tuple[str, Sizes]]:
    config, name = case.question["adapter_config"], "num_transformer_submodules"
    rows = config["num_virtual_tokens"]
    if of_keys:
        sentence = "a prefix has as many rows as virtual tokens, whatever the number of submodules"
        found = {"rows-times-submodules": (sentence, {**right, "rows": rows * right[name]})}
    else:
        sentence = "the table has a row for every virtual token alone, not for every submodule too"
        found = {"rows-without-submodules": (sentence, {**right, "rows": rows})}
    if config.get(name) is not None:
        return found
    return found | {
        "submodules-forgotten": ("an encoder-decoder has two submodules and got one", _asked(case, {**config, name: 1})),
        "submodules-always-two": ("a model that is no encoder-decoder has one submodule and got two", _asked(case, {**config, name: 2})),
    }


def _of_the_model(case: Case) -> dict[str, tuple[str, Sizes]]:
    config, text = case.question["adapter_config"], _text(case)
    found = {"config-overridden": ("the sizes of adapter_config are overridden by the model's", _asked(case, _without(config, *LEFT_OUT)))}
    if "num_decoder_layers" in text and config.get("num_layers") is None:
        found["decoder-layers-counted"] = (
            "num_layers counts the decoder's layers instead of the encoder's",
            _asked(case, {**config, "num_layers": text["num_decoder_layers"]}),
        )
    return found


def _of_the_file(case: Case, right: Sizes) -> dict[str, tuple[str, Sizes]]:
    """Where the sizes of a configuration do not count."""
    config = case.question["adapter_config"]
    columns = {"columns": config["token_dim"]} if config.get("token_dim") else {}
    given = {name: config[name] for name in LEFT_OUT if config.get(name) is not None}
    return {
        "sizes-of-the-file": ("the sizes that adapter_config gives count, where the model's do", {**right, **given, **columns}),
        "tokens-of-the-file": (
            "there are num_virtual_tokens rows instead of one for every entry of cpt_token_ids",
            {**right, "rows": config["num_virtual_tokens"]},
        ),
    }


# ---- what is asked

LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 13,
}
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("CAUSAL_LM", LLAMA),
    "llama-head-dim": ("CAUSAL_LM", {**LLAMA, "head_dim": 10}),
    "gpt2": ("CAUSAL_LM", {"model_type": "gpt2", "n_embd": 20, "n_layer": 3, "n_head": 4, "vocab_size": 13}),
    "t5": (
        "SEQ_2_SEQ_LM",
        {"model_type": "t5", "d_model": 18, "d_kv": 5, "num_layers": 5, "num_decoder_layers": 4, "num_heads": 3, "vocab_size": 13},
    ),
    "bert": (
        "SEQ_CLS",
        {"model_type": "bert", "hidden_size": 14, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 13},
    ),
    "llava": ("CAUSAL_LM", {"model_type": "llava", "text_config": LLAMA}),
}
TOKENS = 7
OWN: dict[str, Mapping[str, Any]] = {
    "cpt": {"cpt_token_ids": [3, 1, 4, 1, 5, 9, 2]},
    "multitask_prompt_tuning": {"num_tasks": 3, "num_ranks": 2},
    "prefix_tuning": {"prefix_projection": True},
}


def config_cases(name: str, clause: str) -> Iterator[Case]:
    peft_type = config_of(build_prompt(name, {}))["peft_type"]
    only = METHODS.prompts[name].only_task
    for label, (task, model) in MODELS.items():
        if only not in (None, task):
            continue
        given = {"peft_type": peft_type, "task_type": task, "num_virtual_tokens": TOKENS, **OWN.get(name, {})}
        yield _config_case(name, clause, label, given, model)
    sizes = {"token_dim": 36, "num_attention_heads": 9, "num_layers": 2, "num_transformer_submodules": 1}
    task, model = MODELS["t5" if only is None else "llama"]
    # What does not count says something else.
    tokens = TOKENS if METHODS.prompts[name].own_sizes else TOKENS + 4
    given = {"peft_type": peft_type, "task_type": task, "num_virtual_tokens": tokens, **OWN.get(name, {}), **sizes}
    yield _config_case(name, clause, "given", given, model)


def _config_case(name: str, clause: str, label: str, given: Question, model: Question) -> Case:
    question = {"adapter_config": given, "model_config": model}
    return Case(id=f"{name}.config.{label}", method=name, operation="config", clause=clause, question=question)
