"""What HF PEFT has, what is built here, and how a method of one's own joins.

names      every method and task of PEFT 0.21.2, what a method's configuration is called and its parameters begin with in a checkpoint
complete   what a class needs to be a method
table      methods by name, which `register_method` opens to those of other packages
"""

from peft_ref.registry.names import CONFIG_NAMES, REMOVED, TUNER_PREFIXES, PeftType, TaskType
from peft_ref.registry.table import GROUP, Registry

__all__ = ["CONFIG_NAMES", "GROUP", "REMOVED", "TUNER_PREFIXES", "PeftType", "Registry", "TaskType"]
