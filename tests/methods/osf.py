"""OSF, as the tests need to know it."""

from __future__ import annotations

from peft_ref.methods.osf import OSF
from tests.methods.facts import Facts

FACTS = Facts(
    settings={"osf": OSF(), "osf-one": OSF(effective_rank=1), "osf-share": OSF(effective_rank=0.7)},
    several=False,
)
