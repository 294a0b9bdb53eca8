"""The plan of a merge: which tensors of the base change by what, and how the output is laid out. Headers and configurations are all it reads.

The order of what happens to one tensor is PEFT's, which loads all adapters before it merges them:

    what takes the place of a frozen weight (saved embeddings, trained biases), adapter by adapter
    what the adapters add to it, adapter by adapter, rounded to the stored dtype after each
    what takes the place of the result: modules_to_save
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

from peft_ref.checkpoints.base import Base
from peft_ref.checkpoints.changes import AddBias, AddLowRank, Replace
from peft_ref.checkpoints.output import written_shards
from peft_ref.checkpoints.pieces import FLOATS
from peft_ref.checkpoints.plan import Change, Plan, Planned, Rounding, Source
from peft_ref.checkpoints.sources import Adapter, OnModule, config_of, modules_in, read
from peft_ref.contracts import LowRank
from peft_ref.errors import ConfigError, FileFormatError, KeyMismatchError, NotMergeableError, ShapeError
from peft_ref.files.safetensors import BITS
from peft_ref.graph import under_live_names
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.ties import Ties, changed_name, check_ties

HALF = ("F16", "BF16")
