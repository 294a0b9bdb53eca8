"""What became of every public name of PEFT 0.21.2 in peft_ref.hf, with the reason. `test_hf_api.py` writes spec/hf_api.md of it.

A name is Same, Different (it is there, and does something else, which is said) or Left (it is not there).
"""

from __future__ import annotations

from typing import NamedTuple


class Same(NamedTuple):
    note: str = ""


class Different(NamedTuple):
    because: str


class Left(NamedTuple):
    because: str


Row = Same | Different | Left

NOT_BUILT = "the method is not built here"
TUNER = "there is no model class for each method: PeftModel holds a value of peft_ref.model"
FROM_DATA = "LoraConfig keeps the map as it is; the start that it describes is made from data, by peft_ref.methods.{}"
TORCH = "torch's or a device's business"
AUTO = Different("the model is loaded from the folder that base_model_name_or_path names; there is no Hub")

# By the name of the method as PEFT spells it in ...Config and ...Model
NOT_BUILT_METHODS = (
    "Lily",
    "Poly",
    "Shadow",
    "XLora",
)
BUILT_METHODS = (
    "Adamss",
    "BOFT",
    "Beft",
    "C3A",
    "Deft",
    "Delora",
    "FourierFT",
    "Frod",
    "Glora",
    "HRA",
    "LNTuning",
    "OFT",
    "OSF",
    "Peanut",
    "Psoft",
    "Pvera",
    "RandLora",
    "Road",
    "Shira",
    "Supertuning",
    "TinyLora",
    "TrainableTokens",
    "UniLora",
    "VBLoRA",
    "Vera",
    "WaveFT",
)

CONFIG = Different(
    "fields by name only; a list of names stays a list; what is not built may only say that it is off; checked when it is made"
)

WITHIN = Different("fields by name only; a value, which is not written into; a key that it has not is an error; checked when it is made")

NAMES: dict[str, Row] = {
    # methods that are not built
    **{f"{name}Config": Left(NOT_BUILT) for name in NOT_BUILT_METHODS},
    **{f"{name}Model": Left(NOT_BUILT) for name in NOT_BUILT_METHODS},
    "ArrowConfig": Left("what it configures is not built here; LoraConfig refuses the option"),
    **{f"{name}Config": WITHIN for name in ("BdLora", "Kasa", "Monteclora", "Velora")},
    "EvaConfig": Left(FROM_DATA.format("eva_init")),
    "LoraGAConfig": Left(FROM_DATA.format("lora_ga_init")),
    "LoraRuntimeConfig": Left(TORCH),
    "LoftQConfig": Left("`loftq_config` is a map of its two keys, as PEFT keeps it"),
    # configurations
    **{f"{name}Config": CONFIG for name in BUILT_METHODS},
    **{f"{name}Model": Left(TUNER) for name in BUILT_METHODS},
    **{f"{name}Config": CONFIG for name in ("AdaLora", "AdaptionPrompt", "Gralora", "Hira", "IA3", "LoHa", "LoKr", "Lora", "Miss")},
    **{f"{name}Config": CONFIG for name in ("CPT", "Cartridge", "MultitaskPromptTuning", "PrefixTuning", "PromptEncoder", "PromptTuning")},
    "PeftConfig": Different(
        "read from a folder only, and what a newer PEFT added is kept for the file, where PEFT drops it with a warning"
    ),
    "PromptLearningConfig": Same(),
    "MultitaskPromptTuningInit": Same(),
    "PromptEncoderReparameterizationType": Same(),
    "PromptTuningInit": Same(),
    "PeftType": Same("a text, as there"),
    "TaskType": Same("a text, as there"),
    "get_peft_config": Same(),
    # models
    "get_peft_model": Different(
        "of a graph or a loaded model of peft_ref.nn, which stays as it is; draws from `rng`, seed 0 without one; the"
        " configuration's base_model_name_or_path is kept where the model has no name; adapters upon adapters are refused"
    ),
    "PeftModel": Different("made of a graph, and no torch module; see its methods below"),
    "PeftMixedModel": Different("made of a graph; neither saved nor asked for a status, as in PEFT"),
    "PeftModelForCausalLM": Different("task_type has to be said in the configuration"),
    "PeftModelForFeatureExtraction": Different(
        "task_type has to be said in the configuration; token types before a prompt are refused, not dropped"
    ),
    "PeftModelForQuestionAnswering": Different(
        "task_type has to be said in the configuration; token types and positions, which PEFT loses for every method, are used,"
        " and refused before a prompt"
    ),
    "PeftModelForSeq2SeqLM": Different(
        "task_type has to be said in the configuration; a multitask prompt takes decoder_input_ids, with which PEFT fails"
    ),
    "PeftModelForSequenceClassification": Different(
        "task_type has to be said in the configuration; a prompt's file names the head once, not twice"
    ),
    "PeftModelForTokenClassification": Different(
        "task_type has to be said in the configuration; a prompt's file names the head once, not twice"
    ),
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": Same(),
    "PEFT_TYPE_TO_CONFIG_MAPPING": Different("holds what is built"),
    **{f"AutoPeftModel{name}": AUTO for name in ("", "ForCausalLM", "ForFeatureExtraction", "ForQuestionAnswering", "ForSeq2SeqLM")},
    **{f"AutoPeftModel{name}": AUTO for name in ("ForSequenceClassification", "ForTokenClassification")},
    # functions
    "inject_adapter_in_model": Different("returns a model with the adapter in its layers; the one that was given stays as it is"),
    "get_peft_model_state_dict": Different("of the model's own numbers: a state_dict of somebody else's is refused"),
    "set_peft_model_state_dict": Different(
        "a tensor too few or too many is an error; so is a table for a prompt whose encoder is still there"
    ),
    "load_peft_weights": Different("from a folder's safetensors, as arrays; a pickle is refused"),
    "get_layer_status": Same("rows are NamedTuples; a module whose adapters are all gone has none"),
    "get_model_status": Same("a NamedTuple"),
    # what is PEFT's inside
    **{f"{name}Model": Left(TUNER) for name in ("AdaLora", "AdaptionPrompt", "Gralora", "Hira", "IA3", "LoHa", "LoKr", "Lora", "Miss")},
    "PEFT_TYPE_TO_TUNER_MAPPING": Left(TUNER),
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": Left(TUNER),
    **{
        name: Left("a torch module; the prompt's mathematics is a method of peft_ref")
        for name in ("CPTEmbedding", "CartridgeEncoder", "PrefixEncoder", "PromptEmbedding", "PromptEncoder")
    },
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": Left("for model families that peft_ref.nn has not"),
    "bloom_model_postprocess_past_key_value": Left("for a model family that peft_ref.nn has not"),
    "shift_tokens_right": Left("`shift_right` of an encoder-decoder of peft_ref.nn, which multitask prompts use"),
    **{
        name: Left("errors here are those of peft_ref.errors; nothing warns")
        for name in ("PeftError", "PeftWarning", "NoMatchingPeftModuleError")
    },
    # other business
    **{name: Left(TORCH) for name in ("cast_mixed_precision_params", "prepare_model_for_kbit_training")},
    **{
        name: Left("for sharded training; the graph shows the numbers")
        for name in ("get_base_model_state_dict", "set_base_model_state_dict")
    },
    **{name: Left(NOT_BUILT) for name in ("compose_cartridge_adapters", "create_arrow_model", "initialize_kv_prefix_from_past_key_values")},
    **{name: Left(NOT_BUILT) for name in ("initialize_kv_prefix_from_text", "prompt_embeddings_from_past_key_values")},
    **{
        name: Left("a start from data: functions of arrays in peft_ref.methods, and `starts` of peft_ref.model.add")
        for name in ("get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga")
    },
    "replace_lora_weights_loftq": Left("`correct` of peft_ref.methods.loftq_init; no model here is quantised"),
    "find_kappa_target_modules": Left("a choice of targets from the weights, which is not built here"),
    **{
        name: Different("of every method that changes weights; an int is the largest rank, and MiSS is brought to it too; no progress bar")
        for name in ("convert_to_lora", "save_as_lora")
    },
}

# Of PeftModel itself
METHODS: dict[str, Row] = {
    "forward": Different(
        "in evaluation; arguments by their names, those that transformers' models have. A graph that holds arrays alone does not run."
        " AdaLoRA's penalty is in the loss as in PEFT, which raises once an adapter is read; with adapter_names there is no loss"
    ),
    "from_pretrained": Different("from a folder; `subfolder`, `rng` and `ties` by name; no offloading, no key_mapping"),
    "save_pretrained": Different(
        "no model card; a pickle is refused; patterns keep their order; the folder of an initial adapter is read, and not written to"
    ),
    "add_adapter": Different("draws from `rng`, or the model's own generator; low_cpu_mem_usage is refused"),
    "load_adapter": Different("returns nothing: what does not fit is an error. low_cpu_mem_usage leaves the tensors in the file"),
    "set_adapter": Different("also several, as PEFT's base_model.set_adapter"),
    "delete_adapter": Same(),
    "disable_adapter": Same("what is merged is unmerged at once, not by the next call"),
    "active_adapters": Same(),
    "active_adapter": Different("a list where several are active, or none"),
    "active_peft_config": Same(),
    "peft_config": Different("what is written into a configuration later is saved if it computes nothing, and else refused"),
    "peft_type": Same(),
    "modules_to_save": Same(),
    "has_active_enabled_adapter": Different("false where no adapter is active, where PEFT's is true"),
    "get_base_model": Different("the model as it was, which no adapter changes, as a BaseModel"),
    "get_nb_trainable_parameters": Same(),
    "print_trainable_parameters": Same(),
    "get_layer_status": Same(),
    "get_model_status": Same(),
    "set_requires_grad": Same(),
    "get_prompt": Different("a prefix is one array (layers, 2, batch, heads, tokens, head_dim), no cache object"),
    "base_model": Left("there is no layer between: what PEFT's users call on it is a method of PeftModel"),
    "generate": Different("greedy and sampled; no beams. What is drawn comes from `rng`, or the model's own generator. A prefix stays"),
    "get_prompt_embedding_to_save": Left("get_peft_model_state_dict has it"),
    "base_model_torch_dtype": Left(TORCH),
    "prepare_model_for_gradient_checkpointing": Left(TORCH),
    "create_or_update_model_card": Left("there is no model card"),
    "push_to_hub": Left("there is no Hub"),
    "supports_lora_conversion": Left("convert_to_lora converts, or says why not"),
}

# Of PeftModel by way of the tuner that it wraps, as `model.merge_adapter()`
THROUGH: dict[str, Row] = {
    "merge_adapter": Different(
        "a tied weight is refused unless `ties` says what becomes of its second name; merges follow the order of acting"
    ),
    "unmerge_adapter": Different("gives the very same numbers back"),
    "merge_and_unload": Different("a new model; this one stays as it was. No progress bar"),
    "unload": Different("a new model; this one stays as it was"),
    "add_weighted_adapter": Different(
        "an existing name is refused; the DARE types draw from `rng`; no svd_driver; a file says the ranks it has"
    ),
    "disable_adapter_layers": Same("what is merged is unmerged at once"),
    "enable_adapter_layers": Same(),
    "inject_adapter": Left("inject_adapter_in_model"),
    "get_model_config": Left("`config` is the model's config.json"),
    "subtract_mutated_init": Left("save_pretrained with path_initial_model_for_weight_conversion does that"),
    **{name: Left(TUNER) for name in ("layers_mapping", "prefix", "target_module_mapping", "tuner_layer_cls", "uses_shared_state")},
}
