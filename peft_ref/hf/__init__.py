"""HF PEFT's names: whoever knows PEFT changes the import and goes on.

    from peft_ref.hf import BaseModel, LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(BaseModel.from_pretrained("folder"), LoraConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    model.save_pretrained("adapter")

A thin face over values: peft_ref.model (adapters on layers), peft_ref.prompts and peft_ref.splice (prompts), peft_ref.files, peft_ref.nn
(models that run). No mathematics is here. An argument that cannot be honoured is an error. What is the same as in PEFT, what is not and
what is left out: spec/hf_api.md.

config, configs    the configurations        base       a model that runs, as HF's
state, prompted    what a PeftModel holds    wrapped    what PeftModel and PeftMixedModel share
peft_model, mixed, auto, mapping, converting the classes and functions
"""

from peft_ref.hf.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from peft_ref.hf.base import BaseModel, ModelOutput
from peft_ref.hf.config import (
    CLASSES as PEFT_TYPE_TO_CONFIG_MAPPING,
)
from peft_ref.hf.config import (
    MultitaskPromptTuningInit,
    PeftConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningInit,
    get_peft_config,
)
from peft_ref.hf.configs import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft_ref.hf.configs_additive import (
    AdamssConfig,
    BeftConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    LNTuningConfig,
    ShiraConfig,
    SupertuningConfig,
    TrainableTokensConfig,
    WaveFTConfig,
)
from peft_ref.hf.configs_kin import GraloraConfig, HiraConfig, LoKrConfig, MissConfig
from peft_ref.hf.configs_rotating import (
    BOFTConfig,
    DeftConfig,
    GloraConfig,
    HRAConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PsoftConfig,
    RoadConfig,
)
from peft_ref.hf.configs_shared import FrodConfig, PveraConfig, RandLoraConfig, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig
from peft_ref.hf.converting import convert_to_lora, save_as_lora
from peft_ref.hf.mapping import (
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft_ref.hf.mixed import PeftMixedModel
from peft_ref.hf.peft_model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft_ref.methods.bdlora import BdLoraConfig
from peft_ref.methods.kasa import KasaConfig
from peft_ref.methods.monteclora import MontecloraConfig
from peft_ref.methods.velora import VeloraConfig
from peft_ref.registry import PeftType, TaskType

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdaLoraConfig",
    "AdamssConfig",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BaseModel",
    "BdLoraConfig",
    "BeftConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "DeftConfig",
    "DeloraConfig",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "KasaConfig",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "ModelOutput",
    "MontecloraConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "OSFConfig",
    "PeanutConfig",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "SupertuningConfig",
    "TaskType",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "VBLoRAConfig",
    "VeloraConfig",
    "VeraConfig",
    "WaveFTConfig",
    "convert_to_lora",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "save_as_lora",
    "set_peft_model_state_dict",
]
