"""The table of spec/merging.md, out of the code and of what the tests hold to.   python -m tests.checkpoints.merging_table   writes it."""

from __future__ import annotations

from pathlib import Path

from peft_ref.checkpoints.ways import ONCE, OWN, WAYS
from peft_ref.contracts import LowRank
from peft_ref.methods import METHODS
from tests.checkpoints.method_cases import BITS, MORE_PLACES, UNMERGED

PAGE = Path(__file__).resolve().parents[2] / "spec" / "merging.md"
BEGIN, END = "<!-- merging: written by tests/checkpoints/merging_table.py, do not edit -->", "<!-- end of merging -->"
BY_NUMBERS = frozenset({"IA3", "TrainableTokens"})  # one number of the tensor after the other


def row(name: str) -> str:
    cls = METHODS.weights[name]
    method = cls.__name__
    way = WAYS.get(method, ONCE)
    rounded = {(False, False): "no", (False, True): "safe merge", (True, True): "yes", (True, False): "default merge"}[way]
    if method in OWN:
        rounded = "after every step"
    if method == "LoRA":
        rounded += "; embeddings always"
    if method in UNMERGED:
        return f"| {method} | | | {UNMERGED[method]} | |"
    tiles = issubclass(cls, LowRank) or method in BY_NUMBERS
    held = "a tile" if tiles else "some rows of a linear layer" if cls.by_rows else "the tensor"
    if method in BITS:
        return f"| {method} | {rounded} | {held} | equal | equal |"
    half = f"up to {MORE_PLACES[method]:.0f} last places" if method in MORE_PLACES else "seldom 1 last place, or 2"
    return f"| {method} | {rounded} | {held} | {half} | float32 arithmetic in another order |"


def table() -> str:
    rows = [row(name) for name in METHODS.weights]
    head = ["| method | delta rounded before it is added | held in memory | bits in 16 bits | bits in float32 |", "|---|---|---|---|---|"]
    return "\n".join([BEGIN, *head, *rows, END])


def written() -> str:
    """The page with the table in it."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
