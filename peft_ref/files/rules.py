"""What an adapter_config.json may say: PEFT's own refusals, what is not built here yet, and what an init means once an adapter is saved.

Loading a saved adapter runs its init again in PEFT, and then overwrites the parameters. So only what the init does to the frozen weight
is left of it:

    eva, lora_ga           need data; without it PEFT draws the default start and leaves the weight alone: read as True.  An adapter
                           trained from lora_ga belongs to a changed weight, which PEFT does not restore either
    pissa_niter_N          takes the best rank-r part off the weight, by a randomised SVD: read as pissa, which that SVD approximates
    corda, loftq           take off what only data, or a quantiser, can tell: kept by name. A model asks for the data, as PEFT does, or
                           quantises its weight again

PEFT asks switches for their truth only, so null, 0 and 1 are read as false and true; a text or a list is refused: "no" would be true.
What PEFT and this accept otherwise is a table in tests/files/test_config_space.py, and in test_prompt_space.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from peft_ref.contracts import Method
from peft_ref.errors import ConfigError, TargetError
from peft_ref.graph.pattern_keys import is_plain
from peft_ref.graph.patterns import LARGEST, check_length
from peft_ref.reading.header import LONGEST_NAME
from peft_ref.registry import TaskType

MOST = 250_000  # names in one list: a mixture of experts with 10^12 parameters has 70,000 layers
MOST_SAVED = 10_000  # that are compared with the ends of every name

TASK_TYPES = tuple(task.value for task in TaskType)

# Switches that change what an adapter computes. One that a method of `METHODS` has as its `flag` is built; any other is refused when on.
SWITCHES: Mapping[str, Mapping[str, str]] = {
    "LORA": {
        "alora_invocation_tokens": "aLoRA adapts only what follows its invocation tokens",
        "arrow_config": "Arrow routes between adapters",
        "enable_lora": "PEFT 0.2 adapted parts of a fused layer with a grouped convolution (MergedLinear)",
    },
    "ADALORA": {
        "target_parameters": "target_parameters adapts bare parameters such as fused experts",
    },
}

PATTERNED = ("DELORA", "HIRA", "LORA", "LOHA", "LOKR")  # whose every module looks its rank and scale up, so that null cannot be
BIASED = ("BOFT", "DEFT", "DELORA", "GLORA", "GRALORA", "HRA", "LORA", "MISS", "OFT")  # whose frozen biases may be trained
INITS_OF_ANY_CASE = ("gaussian", "olora")
INITS_AS_SAVED: Mapping[str, bool | str] = {"eva": True, "lora_ga": True}


def init_as_saved(init: Any, where: str) -> Any:
    """What `init_lora_weights` of a saved adapter means."""
    if init is None or init == 0 or init == "":
        return False  # PEFT leaves the factors as torch makes them
    if not isinstance(init, str):
        return init
    if init.lower() == "mica":
        return True  # in other letters it is LoRA with MiCA's start, and B is trained
    if re.fullmatch(r"pissa_niter_\d+", init):
        return "pissa"
    lower = init.lower() if init.lower() in INITS_OF_ANY_CASE else init
    return INITS_AS_SAVED.get(lower, lower)


def start_as_saved(init: Any, kind: str) -> Any:
    """What an `init_weights` that may be a name means."""
    if kind == "C3A":  # every start has its own name there
        return init
    if init is None or init == 0 or init == "":
        return False
    if kind == "HIRA":  # it asks whether the value is True, and takes any other for a name, in any case
        return init.lower() if isinstance(init, str) and init.lower() == "gaussian" else init
    return switch_as_saved(init)


def switch_as_saved(value: Any) -> Any:
    """null, 0 and 1 as the truth value that PEFT takes them for."""
    return bool(value) if value is None or (isinstance(value, int) and value in (0, 1)) else value


def check(data: Mapping[str, Any], where: str, built: frozenset[str | None]) -> None:
    """Raise `ConfigError` where PEFT refuses the configuration, or it asks for what is not built yet."""

    def refuse(problem: str, remedy: str) -> None:
        raise ConfigError(f"{where}: {problem} (HF PEFT refuses it too).\n  {remedy}")

    kind, targets = data["peft_type"], data.get("target_modules")
    for switch, what in SWITCHES.get(kind, {}).items():
        if data.get(switch) and switch not in built:
            raise ConfigError(f"{where}: {switch}={data[switch]!r:.60} is not built yet: {what}.\n  It would not be right as plain {kind}.")
    if (task := data.get("task_type")) is not None and task not in TASK_TYPES:
        refuse(f"task_type={task!r}", f"There are {', '.join(TASK_TYPES)}, and null.")
    if kind == "LORA":
        if data.get("lora_bias") and data.get("use_dora"):
            refuse("lora_bias with use_dora", "Choose one.")
        if data.get("megatron_config") and data.get("use_dora"):
            refuse("megatron_config with use_dora", "Choose one.")
        for name in ("eva_config", "corda_config", "lora_ga_config", "kasa_config", "use_bdlora", "velora_config", "arrow_config"):
            if not isinstance(data.get(name), Mapping | None):
                refuse(f"{name}={data[name]!r:.60}", "There are null and a map.")
        if data.get("init_lora_weights") == "loftq" and not data.get("loftq_config"):
            refuse("init_lora_weights='loftq' without loftq_config", "Give {'loftq_bits': 4, 'loftq_iter': 1}, its defaults.")
        eva = data.get("eva_config") or {}
        if not _number(eva.get("rho", 2)) >= 1 or not 0 <= _number(eva.get("tau", 0.5)) <= 1:
            refuse(f"eva_config={dict(eva)}", "rho is 1 or more, tau from 0 to 1.")
    if kind in BIASED:
        bias = data.get("bias", "none")
        if bias not in ("none", "all") and not (isinstance(bias, str) and bias.endswith("_only")):
            refuse(f"bias={bias!r}", "There are 'none', 'all' and what ends in '_only'.")
    if kind == "DEFT" and not _number(data.get("deft_dropout", 0)) <= 1:
        refuse(f"deft_dropout={data['deft_dropout']!r:.60}", "A probability is needed.")
    if kind == "ADALORA":
        if data.get("use_dora"):
            refuse("use_dora with AdaLoRA", "Leave it out.")
        if data.get("init_lora_weights") == "loftq":
            refuse("init_lora_weights='loftq' with AdaLoRA", "Use true; every other name means that too.")
    for name in ("rank_pattern", "alpha_pattern", "lambda_pattern"):
        if not isinstance(data.get(name, {}), Mapping) and (kind in PATTERNED or data[name] is not None):
            refuse(f"{name} is a {type(data[name]).__name__}, {data[name]!r:.60}", "Give a map from name patterns to numbers, {} for none.")
    feedforward = data.get("feedforward_modules")
    if kind == "IA3" and isinstance(feedforward, list) and isinstance(targets, list) and not set(feedforward) <= set(targets):
        refuse(f"feedforward_modules={feedforward} are not all in target_modules={targets}", "Target them too.")


def _number(value: Any) -> float:
    """`value`, or what fails every comparison where it is no number."""
    return value if isinstance(value, int | float) else math.nan


def check_pattern(pattern: str, where: str) -> None:
    if is_plain(pattern):
        return
    try:
        check_length(pattern)
        re.compile(rf"(.*\.)?({pattern})$")
    except TargetError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{where}: {pattern!r:.80} is no regular expression ({error}).\n  A module's name has its dots escaped: 'h\\.0'."
        ) from None


def check_kept(pattern: Mapping[str, Any], method: Any, ending: str, where: str) -> None:
    """Raise `ConfigError` where AdaLoRA's rank_pattern is not, for every module, a list that says which triplets stay."""
    for key, kept in pattern.items():
        if not key.endswith(f".{ending}"):
            raise ConfigError(f"{where}: {key!r} is no key of an AdaLoRA rank pattern, which is a module's name and '.{ending}'.")
        if not isinstance(kept, list) or not all(isinstance(v, bool) for v in kept):
            raise ConfigError(f"{where} of {key!r}: {kept!r:.60} is no list of true and false, one for each triplet.")
        if sum(kept) > method.init_r:
            raise ConfigError(f"{where} of {key!r}: {sum(kept)} triplets stay of init_r={method.init_r}.")


_ALLOWED: Mapping[Any, tuple[type, ...]] = {
    float: (int, float),
    int: (int,),
    bool: (bool,),
    str: (str,),
    bool | str: (bool, str),
    int | None: (int, type(None)),
    float | None: (int, float, type(None)),
    str | None: (str, type(None)),
    list[int] | None: (list, type(None)),
    dict[str, object] | None: (dict, type(None)),
}


@cache
def _hints(cls: type[Method]) -> Mapping[str, Any]:
    return get_type_hints(cls)


def check_numbers(value: Any, where: str) -> None:
    """Raise `ConfigError` for a number, or one within a list or map, that no arithmetic survives: it would make every weight NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value!r}: a finite number is needed.\n  HF PEFT takes it, and what it computes is NaN.")
    if isinstance(value, int) and not abs(value) < 2**63:
        raise ConfigError(f"{where} is a number of {value.bit_length()} bits, which fits into no integer of a library.")
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        check_numbers(inner, where)


def check_names(names: Any, where: str, most: int) -> None:
    """Raise `ConfigError` for a list of names, or the keys of a map, that would take for ever to be looked for in a model."""
    if not isinstance(names, list | tuple | Mapping):
        return
    if len(names) > most:
        raise ConfigError(f"{where} has {len(names):,} entries, at most {most:,} are read.\n  No model has as many layers.")
    if longest := next((name for name in names if isinstance(name, str) and len(name) > LONGEST_NAME and is_plain(name)), None):
        raise ConfigError(
            f"{where}: {longest!r:.60}... has {len(longest):,} letters, at most {LONGEST_NAME} are read.\n  No module is so called."
        )
    if (letters := sum(len(name) for name in names if isinstance(name, str) and not is_plain(name))) > LARGEST * 10:
        raise ConfigError(f"{where}: regular expressions of {letters:,} letters, at most {LARGEST * 10:,} are read.\n  Use plain names.")


def check_types(cls: type[Method], values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for a hyper-parameter that is of another type than its field."""
    hints = _hints(cls)
    for name, value in values.items():
        check_numbers(value, f"{where}: {name}")
        hint = hints[name]
        wanted = _ALLOWED.get(hint)
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            raise ConfigError(
                f"{where}: {name}={value!r:.60} is of type {type(value).__name__}, expected {' or '.join(t.__name__ for t in wanted)}."
            )


def field_names(cls: type[Any]) -> tuple[str, ...]:
    """The names of a frozen dataclass's fields."""
    return tuple(f.name for f in dataclasses.fields(cls))
