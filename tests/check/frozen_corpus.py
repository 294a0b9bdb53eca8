"""What the corpus was when it was last wanted so: a fingerprint per case.      python -m tests.check.frozen_corpus     freezes it anew.

Published cases must not change under the ports that were judged by them: a changed case is a new case, with a new id.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from peft_ref.check.case import to_json
from peft_ref.check.corpus import corpus

FILE = Path(__file__).with_suffix(".json")


def fingerprints() -> dict[str, str]:
    """Twelve hexadecimal digits of every case's question, by id. The clause is no part of it: clauses may be renumbered."""
    out = {}
    for case in corpus():
        question = {k: v for k, v in to_json(case).items() if k != "clause"}
        out[case.id] = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
    return out


if __name__ == "__main__":
    FILE.write_text(json.dumps(fingerprints(), indent=1) + "\n", encoding="utf-8")
    print(f"{len(fingerprints())} cases frozen in {FILE}")
