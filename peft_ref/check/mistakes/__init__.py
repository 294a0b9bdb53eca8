"""Every method's suite: what is asked about it, and its known mistakes. One module each, found by the method's name; `register_suite`
adds other packages'."""

from __future__ import annotations

from importlib import import_module

from peft_ref.check.suites import Suites
from peft_ref.methods import METHODS

SUITES = Suites(  # an ordinary mapping to whoever reads it
    {name: import_module(f"peft_ref.check.mistakes.{name}").SUITE for name in METHODS if name not in METHODS.registered}
)
register_suite = SUITES.register
