"""Operations about text: targets, config, state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_ref.check.case import Case


def grade_text(case: Case, answer: Mapping[str, Any]) -> str:
    raise NotImplementedError(case.id, answer)
