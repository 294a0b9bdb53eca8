"""Whether a class is a complete method: a frozen dataclass of a contract, with all that the laws, the files and the judge ask of it."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from peft_ref.attending import AttentionMethod
from peft_ref.conditioned import Conditioned
from peft_ref.contracts import EVERY_KIND, Additive, Key, LowRank, Method, Reweight, WeightMethod
from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.layers import CONV_KINDS, Conv, Embedding, Layer, Linear
from peft_ref.norms import NORM, Norm
from peft_ref.parameters import declared
from peft_ref.prompts import EMBEDDING, PLACES, Prompt, TablePrompt

# Words of adapter_config.json that are not hyper-parameters of a method: where it goes, patterns, and what PEFT keeps beside.
RESERVED = frozenset(
    {"auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode"}
    | {"layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "alpha_pattern", "rank_pattern"}
    | {"revision", "target_modules", "target_parameters", "task_type"}
)
CONTRACTS = (
    "LowRank, Additive, Conditioned or Reweight (peft_ref.contracts), Prompt (peft_ref.prompts) or AttentionMethod (peft_ref.attending)"
)
_LAYERS: dict[str, Layer] = {
    "linear": Linear(in_features=24, out_features=48),
    "transposed_linear": Linear(in_features=24, out_features=48, transposed=True),
    "embedding": Embedding(num_embeddings=24, embedding_dim=48),
    NORM: Norm(features=48),
    **{kind: Conv(in_channels=24, out_channels=48, kernel_size=(1,) * n) for n, kind in enumerate(sorted(CONV_KINDS), 1)},
}


def check_complete(name: str, cls: type[Any]) -> None:
    """Raise `ConfigError` with all that is missing."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"a method cannot be called {name!r}.\n  Use lower-case letters, digits and underscores, like 'my_method'.")
    if missing := _missing(cls):
        raise ConfigError(f"{getattr(cls, '__name__', repr(cls))} is no complete method:\n  " + "\n  ".join(missing))


def keys_of(cls: type[Method]) -> frozenset[str]:
    """Every key that a parameter of the method can have in a checkpoint, after its module's name; a prompt has no module."""
    if not issubclass(cls, WeightMethod | AttentionMethod):
        return frozenset()
    hints = get_type_hints(cls.params_type, include_extras=True).values()
    return frozenset(extra.key for hint in hints for extra in get_args(hint)[1:] if isinstance(extra, Key))


def told_by_prefix(cls: type[Method]) -> frozenset[str]:
    """The keys that a file has below a module and that are told by their prefix: not a key of an attention block, which is told as a
    whole, as is that of what layers share; nor one that no file of the method has."""
    if not issubclass(cls, WeightMethod):
        return frozenset()
    keys, asked = (key for _, keys in declared(cls.params_type).values() for key in keys), field_names_of(cls)
    own = [key for key in keys if not key.shared and not key.derived]
    return frozenset(key.key for key in own if key.saved is None or key.saved in asked or getattr(cls, key.saved))


def field_names_of(cls: type[Any]) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _missing(cls: Any) -> list[str]:
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        return [f"it is no subclass of {CONTRACTS}"]
    found = (
        []
        if issubclass(cls, LowRank | Additive | Conditioned | Reweight | Prompt | AttentionMethod)
        else [f"it is of no contract: choose {CONTRACTS}"]
    )
    if abstract := sorted(cls.__abstractmethods__):
        found.append(f"not written: {', '.join(abstract)}")
    found += _class_variables(cls)
    if "__dataclass_fields__" not in vars(cls):
        return [*found, "it is no dataclass: decorate it with @dataclass(frozen=True, kw_only=True)"]
    if not vars(cls)["__dataclass_params__"].frozen:
        found.append("it can be changed: decorate it with @dataclass(frozen=True, kw_only=True)")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # a dataclass, as just seen
    if positional := [f.name for f in fields if not f.kw_only]:
        found.append(f"not keyword-only: {', '.join(positional)}. Use kw_only=True")
    bare = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if bare:
        found.append(f"no default: {', '.join(bare)}. A config that lacks the key must mean something")
    inherited = {f.name for f in dataclasses.fields(Prompt)} if issubclass(cls, Prompt) else set()
    if taken := sorted({f.name for f in fields} & RESERVED - inherited):
        found.append(f"{', '.join(taken)}: a word of adapter_config.json that means something else. Rename the hyper-parameter")
    if not found and issubclass(cls, WeightMethod):
        return _shapes(cls)
    if not found and issubclass(cls, AttentionMethod):
        return _attention_shapes(cls)
    return _prompt_shapes(cls) if not found and issubclass(cls, Prompt) else found


def _class_variables(cls: type[Any]) -> list[str]:
    found = []
    needed = ("peft_type", "tuner_prefix") if issubclass(cls, Prompt) else ("peft_type", "tuner_prefix", "params_type")
    absent = [name for name in needed if not hasattr(cls, name)]
    if absent:
        found.append(f"no class variable {', '.join(absent)}")
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", getattr(cls, "peft_type", "OK")):
        found.append(f"peft_type={cls.peft_type!r}: capital letters, digits and underscores, like 'MY_METHOD'")
    if not re.fullmatch(r"[a-z][a-z0-9_]*_", getattr(cls, "tuner_prefix", "ok_")):
        found.append(f"tuner_prefix={cls.tuner_prefix!r}: lower-case letters, ending with an underscore, like 'mine_'")
    if not (cls.flag is None or (isinstance(cls.flag, str) and cls.flag.isidentifier())):
        found.append(f"flag={cls.flag!r}: None, or the name of a switch in the config")
    if cls.flag_value is not True and not isinstance(cls.flag_value, str | type):
        found.append(f"flag_value={cls.flag_value!r}: True, or the text that the switch says")
    if isinstance(cls.flag_value, type) and not (dataclasses.is_dataclass(cls.flag_value) and cls.flag in field_names_of(cls)):
        found.append(f"flag_value={cls.flag_value!r}: a dataclass of what the map {cls.flag!r} says, which is a field of the method")
    if issubclass(cls, Prompt):
        keys = cls.file_keys
        if not keys or not all(isinstance(key, str) and not key.startswith("base_model.") for key in keys):
            found.append(
                f"file_keys={sorted(keys, key=str)}: the keys of what it saves; those of the model's own modules begin with 'base_model.'"
            )
        return found if cls.place in PLACES else [*found, f"place={cls.place!r}: one of {', '.join(PLACES)}"]
    if issubclass(cls, AttentionMethod):
        return found if "params_type" in absent else found + _params(cls)
    if not cls.kinds or not cls.kinds <= EVERY_KIND:
        found.append(f"kinds={sorted(cls.kinds)}: some of {', '.join(sorted(EVERY_KIND))}")
    if "params_type" not in absent:
        found += _params(cls)
    return found


def _params(cls: type[WeightMethod[Any] | AttentionMethod[Any]]) -> list[str]:
    params = cls.params_type
    if not (isinstance(params, type) and issubclass(params, tuple) and hasattr(params, "_fields")):
        return [f"params_type={params!r}: a NamedTuple of its parameters"]
    try:
        hints = get_type_hints(params, include_extras=True)
    except NameError as error:
        return [f"params_type: {error}; define the class and import its names at the top of a module"]
    found = []
    for name, hint in hints.items():
        said = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if len(said) < 2 or not isinstance(said[0], str) or not all(isinstance(key, Key) for key in said[1:]):
            found.append(f'{params.__name__}.{name}: say its shape and key, as Annotated[Array, "out r", Key("mine_{name}")]')
    return found


def _shapes(cls: type[WeightMethod[Any]]) -> list[str]:
    """Whether on every kind of layer it works on it has parameters, each under a key of its own, in shapes whose letters are known."""
    found = []
    try:
        method = cls()
    except PeftRefError:  # a hyper-parameter has no default, as AdaLoRA's total_step: its shapes show when it is used
        return []
    for kind in sorted(cls.kinds):
        try:
            specs = method.spec(_LAYERS[kind])
        except KeyError as error:
            found.append(f"the letter {error} of a shape is not in dims, nor out, in, channels or groups")
            continue
        except PeftRefError:  # it refuses this very layer, as it may
            continue
        keys = [s.key for s in specs]
        if not keys:
            found.append(f"no parameter has a key on a {kind} layer: Key(..., kinds=...) or conv_key")
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            found.append(f"the key {twice[0]!r} is there twice on a {kind} layer")
    return sorted(set(found))


def _attention_shapes(cls: type[AttentionMethod[Any]]) -> list[str]:
    """Whether its shapes are known, each parameter under a key of its own."""
    try:
        keys = [s.key for s in cls().spec(24)]
    except KeyError as error:
        return [f"the letter {error} of a shape is not in dims, nor hidden"]
    except PeftRefError:  # a hyper-parameter has no default: its shapes show when it is used
        return []
    twice = sorted({key for key in keys if keys.count(key) > 1})
    return [f"the key {twice[0]!r} is there twice"] if twice else []


def _prompt_shapes(cls: type[Prompt]) -> list[str]:
    """Whether it has tensors of known shapes; one table of every example, the table itself once it is saved."""
    found = []
    try:
        method = cls(num_virtual_tokens=2, token_dim=4, num_transformer_submodules=1, num_attention_heads=2, num_layers=3)
        sized = method.shapes()
        saved = method.in_inference().shapes() if issubclass(cls, TablePrompt) else {}
    except PeftRefError:  # a hyper-parameter has no default: its shapes show when it is used
        return []
    for name, shape in sized.items():
        if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            found.append(f"{name!r} has the shape {shape!r}: give positive sizes")
    if issubclass(cls, TablePrompt) and saved != {EMBEDDING: method.table_shape}:
        found.append(f"in inference mode its tensors are {saved}: a saved TablePrompt is {{{EMBEDDING!r}: (rows, columns)}} alone")
    return found or ([] if sized else ["it has no tensors"])
