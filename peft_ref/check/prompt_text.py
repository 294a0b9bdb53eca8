"""Questions about prompts that have no tolerance: which sizes a configuration has on a model, and under which keys a prompt is saved.

    config       adapter_config, model_config            -> {"sizes": {"rows": ..., "columns": ..., "token_dim": ..., ...}}
    state_dict   adapter_config, adapter_name, tensors   -> {"tensors": {key: array}}

`tensors` are those that are trained, by their names inside the encoder; their numbers are such that no encoder rounds its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from peft_ref.check.case import Case, NDArray, build_prompt, config_of, decode, encode
from peft_ref.check.prompting import PromptVariant, make_prompt_case
from peft_ref.prompts import EMBEDDING, SAVED, Context, Prompt, TablePrompt

Question: TypeAlias = Mapping[str, Any]
Sizes: TypeAlias = dict[str, int]
Named: TypeAlias = dict[str, tuple[str, Any]]  # a mistake's name -> its sentence, and what a port that makes it answers

GIVEN = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")


# ---- config


def _method(name: str, question: Question) -> Prompt:
    """The method of a file's configuration, which says more than its hyper-parameters."""
    return build_prompt(name, {k: v for k, v in question["adapter_config"].items() if k != "task_type"})


def _sized(name: str, question: Question) -> Prompt:
    return _method(name, question).sized(question["model_config"], question["adapter_config"].get("task_type"))


def sizes_of(method: Prompt) -> Sizes:
    """What a configuration comes to: its sizes, and those of the table that a file holds."""
    rows, columns = method.table_shape
    sizes = {"rows": rows, "columns": columns, **{name: method.size(name) for name in GIVEN[1:]}}
    return {**sizes, "encoder_hidden_size": method.size("encoder_hidden_size")} if hasattr(method, "encoder_hidden_size") else sizes


def right_sizes(case: Case) -> dict[str, Any]:
    return {"sizes": sizes_of(_sized(case.method, case.question))}


def grade_sizes(case: Case, answer: Mapping[str, Any]) -> str:
    right, got = right_sizes(case)["sizes"], answer.get("sizes")
    if not isinstance(got, Mapping):
        return 'the answer must hold "sizes", an object of numbers'
    if _same(right, got):
        return ""
    for name, (sentence, wrong) in size_mistakes(case).items():
        if _same(wrong, got):
            return f"{name}: {sentence}"
    return "; ".join(f"{name} is {got.get(name)}, expected {want}" for name, want in right.items() if got.get(name) != want)


def _same(want: Sizes, got: Mapping[str, Any]) -> bool:
    return all(got.get(name) == size and not isinstance(got.get(name), bool) for name, size in want.items())


def size_mistakes(case: Case) -> Named:
    """The sizes that a port may have answered instead, where they are others."""
    config, model = case.question["adapter_config"], case.question["model_config"]
    method = _sized(case.method, case.question)
    right, cache = sizes_of(method), method.place == "cache"

    def asked(config: Question = config, model: Question = model) -> Sizes:
        return sizes_of(_sized(case.method, {**case.question, "adapter_config": config, "model_config": model}))

    text = model.get("text_config") or model
    plain = {k: v for k, v in text.items() if k not in ("num_key_value_heads", "head_dim")}
    queries = asked(model=plain)
    width = queries["token_dim"] if config.get("token_dim") is None else config["token_dim"]
    found: Named = {}
    if "num_key_value_heads" in text and cache:
        kv = text["num_key_value_heads"]
        columns = 2 * right["num_layers"] * width
        found["grouped-queries-ignored"] = ("keys and values are given as many heads as queries have", queries)
        found["head-dim-ignored"] = (
            "head_dim is not read: a head is taken for hidden_size / num_attention_heads wide",
            asked(model={k: v for k, v in text.items() if k != "head_dim"}),
        )
        found["heads-of-queries"] = (
            "num_attention_heads counts the heads of queries, token_dim the numbers of keys",
            {**right, "num_attention_heads": queries["num_attention_heads"]},
        )
        found["token-dim-of-queries"] = (
            "token_dim is the model's hidden size instead of that of all heads of keys together",
            {
                **right,
                "token_dim": width,
                "columns": columns,
                "num_attention_heads": kv,
                "encoder_hidden_size": queries["encoder_hidden_size"],
            },
        )
        found["encoder-as-wide-as-the-model"] = (
            "encoder_hidden_size is the model's hidden size instead of token_dim",
            {**right, "encoder_hidden_size": queries["encoder_hidden_size"]},
        )
    if "num_key_value_heads" in text and not cache:
        kv_heads = text["num_key_value_heads"]
        narrow = kv_heads * text.get("head_dim", width // right["num_attention_heads"])
        found["keys-for-embeddings"] = (
            "token_dim is that of keys and values; a virtual token is as wide as the model's hidden size",
            {
                **right,
                "token_dim": narrow,
                "columns": narrow,
                "num_attention_heads": kv_heads,
                **({"encoder_hidden_size": narrow} if "encoder_hidden_size" in right else {}),
            },
        )
    one, two = {**config, "num_transformer_submodules": 1}, {**config, "num_transformer_submodules": 2}
    if config.get("num_transformer_submodules") is None:
        found["submodules-forgotten"] = ("an encoder-decoder has two submodules and got one", asked(one))
        found["submodules-always-two"] = ("a model that is no encoder-decoder has one submodule and got two", asked(two))
    found["rows-without-submodules"] = (
        "the table has a row for every virtual token alone, not for every submodule too",
        {**right, "rows": method.size("num_virtual_tokens")},
    )
    if cache:
        n, layers = method.size("num_virtual_tokens"), right["num_layers"]
        found["rows-times-submodules"] = (
            "a prefix has as many rows as virtual tokens, whatever the number of submodules",
            {**right, "rows": n * right["num_transformer_submodules"]},
        )
        found["keys-without-values"] = (
            "a row holds one vector for every layer instead of a key and a value",
            {**right, "columns": layers * right["token_dim"]},
        )
    left = {k: v for k, v in config.items() if k not in GIVEN[1:]}
    found["config-overridden"] = ("the sizes of adapter_config are overridden by the model's", asked(left))
    if "num_decoder_layers" in text and config.get("num_layers") is None:
        decoder = text["num_decoder_layers"]
        found["decoder-layers-counted"] = (
            "num_layers counts the decoder's layers instead of the encoder's",
            asked({**config, "num_layers": decoder}),
        )
    return {name: (sentence, wrong) for name, (sentence, wrong) in found.items() if not _same(right, wrong)}


# ---- state_dict


def _read(question: Question) -> dict[str, NDArray]:
    return {name: np.asarray(decode(value), dtype=np.float64) for name, value in question["tensors"].items()}


def right_prompt_tensors(case: Case) -> dict[str, Any]:
    saved = _method(case.method, case.question).saved(_read(case.question))
    return {"tensors": {key: encode(value) for key, value in saved.items()}}


def grade_prompt_tensors(case: Case, answer: Mapping[str, Any]) -> str:
    got = answer.get("tensors")
    if not isinstance(got, Mapping):
        return 'the answer must hold "tensors", an object of arrays under their keys'
    saved = {key: decode(value) for key, value in got.items()}
    right = {key: decode(value) for key, value in right_prompt_tensors(case)["tensors"].items()}
    if _equal(right, saved):
        return ""
    for name, (sentence, wrong) in saved_mistakes(case).items():
        if _equal(wrong, saved):
            return f"{name}: {sentence}"
    missing, extra = sorted(right.keys() - saved.keys()), sorted(saved.keys() - right.keys())
    if missing or extra:
        return "; ".join(f"{what}: {', '.join(keys[:6])}" for what, keys in (("missing", missing), ("too many", extra)) if keys)
    for key, want in right.items():
        if saved[key].shape != want.shape:
            return f"{key} has the shape {saved[key].shape}, expected {want.shape}"
    return f"{next(k for k, v in right.items() if not np.array_equal(saved[k], v))} holds other numbers than it should"


def _equal(want: Mapping[str, Any], got: Mapping[str, Any]) -> bool:
    return want.keys() == got.keys() and all(np.array_equal(want[key], got[key]) for key in want)


def saved_mistakes(case: Case) -> Named:
    """What a port may have saved instead, where it is something else."""
    adapter, given = case.question["adapter_name"], _read(case.question)
    method = _method(case.method, case.question)
    right = dict(method.saved(given))
    encoder = {name: value for name, value in given.items() if name not in (EMBEDDING, *right)}
    renamed: tuple[tuple[str, str, Callable[[str], str]], ...] = (
        ("key-prefix-added", "the keys begin with base_model.model.; those of a prompt are bare", lambda key: f"base_model.model.{key}"),
        ("key-of-the-module", "the keys begin with prompt_encoder., as in memory", lambda key: f"prompt_encoder.{adapter}.{key}"),
        ("adapter-name-in-key", "the adapter's name stays in the keys; a saved file has none", lambda key: f"{key}.{adapter}"),
        ("weight-suffix-added", "the keys end in .weight", lambda key: f"{key}.weight"),
        (
            "key-of-the-table",
            "the table is saved as embedding.weight; a file calls it prompt_embeddings",
            lambda key: EMBEDDING if key == SAVED else key,
        ),
        (
            "key-of-the-table-in-memory",
            "everything is saved under its key in memory",
            lambda key: f"prompt_encoder.{adapter}.{EMBEDDING if key == SAVED else key}",
        ),
    )
    found: Named = {name: (sentence, {rename(key): value for key, value in right.items()}) for name, sentence, rename in renamed}
    if encoder:
        found["encoder-saved"] = ("the encoder's tensors are saved too; a file holds what they make, not them", {**right, **encoder})
        found["encoder-instead-of-table"] = ("what is trained is saved instead of the table that it makes", given)
        found["table-not-encoded"] = (
            "the rows that enter the encoder are saved instead of those that leave it",
            {**right, SAVED: given[EMBEDDING]},
        )
    if isinstance(method, TablePrompt):
        found["example-axis-kept"] = (
            "the table is saved with an axis for the examples",
            {SAVED: np.asarray(method.prompt(given, Context(batch=1)))},
        )
    else:
        ids = np.zeros(1, dtype=np.int64)
        found["tasks-lost"] = ("only prompt_embeddings is saved; the matrices of the tasks belong to it", {SAVED: right[SAVED]})
        found["prompt-of-a-task-saved"] = (
            "prompt_embeddings is already multiplied by a task's matrices",
            {**right, SAVED: np.asarray(method.prompt(given, Context(1, ids)))[0]},
        )
    return {name: (sentence, wrong) for name, (sentence, wrong) in found.items() if not _equal(right, wrong)}


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
    "multitask_prompt_tuning": {"num_tasks": 3, "num_ranks": 2},
    "prefix_tuning": {"prefix_projection": True},
}


def config_cases(name: str, clause: str) -> Iterator[Case]:
    peft_type = config_of(build_prompt(name, {}))["peft_type"]
    for label, (task, model) in MODELS.items():
        given = {"peft_type": peft_type, "task_type": task, "num_virtual_tokens": TOKENS, **OWN.get(name, {})}
        yield _config_case(name, clause, label, given, model)
    sizes = {"token_dim": 36, "num_attention_heads": 9, "num_layers": 2, "num_transformer_submodules": 1}
    given = {"peft_type": peft_type, "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": TOKENS, **OWN.get(name, {}), **sizes}
    yield _config_case(name, clause, "given", given, MODELS["t5"][1])


def _config_case(name: str, clause: str, label: str, given: Question, model: Question) -> Case:
    question = {"adapter_config": given, "model_config": model}
    return Case(id=f"{name}.config.{label}", method=name, operation="config", clause=clause, question=question)


def state_dict_cases(name: str, clause: str) -> Iterator[Case]:
    """The last layer of every encoder multiplies by zero, so that no table is rounded: its numbers are another operation's question."""
    sizes = {"num_virtual_tokens": 3, "token_dim": 4, "num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2}
    options: dict[str, dict[str, Mapping[str, Any]]] = {
        "multitask_prompt_tuning": {"plain": {"num_tasks": 3, "num_ranks": 2}},
        "p_tuning": {
            "mlp": {"encoder_hidden_size": 5},
            "lstm": {"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"},
            "inference": {"encoder_hidden_size": 5, "inference_mode": True},
        },
        "prefix_tuning": {
            "plain": {},
            "projected": {"prefix_projection": True, "encoder_hidden_size": 5},
            "inference": {"prefix_projection": True, "encoder_hidden_size": 5, "inference_mode": True},
        },
        "prompt_tuning": {"plain": {}, "two-sides": {"num_transformer_submodules": 2}},
    }
    for label, option in options[name].items():
        own = make_prompt_case(
            name, PromptVariant(name=f"state-dict-{label}", clause=clause, config={**sizes, **option}), "saved"
        ).adapters[0]
        last = max((key for key in own.tensors if key.startswith(("transform.", "mlp_head.")) and key.endswith(".weight")), default="")
        tensors = {key: 0 * value if key == last else value for key, value in own.tensors.items()}
        for adapter in ("default", "0"):
            question = {
                "adapter_config": own.config,
                "adapter_name": adapter,
                "tensors": {key: encode(value) for key, value in tensors.items()},
            }
            yield Case(id=f"{name}.state-dict.{label}.{adapter}", method=name, operation="state_dict", clause=clause, question=question)
