"""An adapter's folder alone: its configuration says which model it is for, and for which task. PEFT's AutoPeftModel and its like.

The model is the folder that base_model_name_or_path names: there is no Hub.
"""

from __future__ import annotations

import os
from typing import ClassVar, final

from peft_ref.errors import ConfigError
from peft_ref.files.adapter import DEFAULT
from peft_ref.hf.base import BaseModel
from peft_ref.hf.config import PeftConfig
from peft_ref.hf.peft_model import PeftModel


class AutoPeftModel:
    """Not made, but called: AutoPeftModel.from_pretrained(folder)."""

    task: ClassVar[str | None] = None  # what the adapter has to be for

    @classmethod
    @final
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        subfolder: str | None = None,
    ) -> PeftModel:
        said = PeftConfig.from_pretrained(pretrained_model_name_or_path, subfolder) if config is None else config
        if cls.task is not None and said.task_type != cls.task:
            raise ConfigError(
                f"{cls.__name__} is for task_type={cls.task!r}, the adapter's is {said.task_type!r} (HF PEFT refuses it too)."
            )
        if not said.base_model_name_or_path:
            raise ConfigError(
                "base_model_name_or_path is null: the adapter does not say its model.\n  PeftModel.from_pretrained takes both."
            )
        base = BaseModel.from_pretrained(said.base_model_name_or_path)
        return PeftModel.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, config, subfolder=subfolder)


@final
class AutoPeftModelForCausalLM(AutoPeftModel):
    task = "CAUSAL_LM"


@final
class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task = "SEQ_2_SEQ_LM"


@final
class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task = "SEQ_CLS"


@final
class AutoPeftModelForTokenClassification(AutoPeftModel):
    task = "TOKEN_CLS"


@final
class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task = "QUESTION_ANS"


@final
class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task = "FEATURE_EXTRACTION"
