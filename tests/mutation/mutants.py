"""The mutants of a file: what mutmut's operators make of each of its expressions, one change at a time.

Of a text one mutant is made, not three (in other letters too): whoever sees one sees all.
Not mutated: annotations, names of types and docstrings (nothing is computed with them), zip's `strict` (an assertion), and messages:
whatever stands in a `raise`, and texts of more than three words. mutmut leaves decorated functions and the bodies of classes alone, for the
sake of its trampolines. There are none here (`running.py` puts the mutant's code into the function that is there), so a property, a cached
function, a default and a table of a class are mutated like the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider, WhitespaceInclusivePositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_string

from tests.mutation.sources import name_of

INDENTS = tuple(" " * n for n in range(0, 24, 4))
UNTOUCHED = (cst.Annotation, cst.Raise, cst.Import, cst.ImportFrom, cst.Decorator)


@dataclass(frozen=True)
class Mutant:
    file: str  # its name in `sources.py`
    function: str  # its qualified name; empty for what stands in a class or in the module itself
    lines: tuple[int, int]  # where the changed expression stands; of a default all of its function, since the `def` runs on import
    old: str  # the changed lines, before and after
    new: str
    source: str  # of the whole file
    call: bool  # an argument was left out or is None, which most often is no longer a call at all

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is called in the list of equivalent mutants, which must outlive changes of the lines above it."""
        return self.file, self.old, self.new


class _Changes(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.functions = 0  # how deep in functions
        self.outermost: cst.FunctionDef | None = None
        self.defaults = False  # within its parameters
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, str, tuple[int, int], bool]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, UNTOUCHED) or _is_text(node) or _is_type_checking(node) or _names_a_type(node) or _is_strict(node):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            if not self.functions:  # one within another is a part of that one
                self.names.append(node.name.value)
                self.outermost = node if isinstance(node, cst.FunctionDef) else None
            self.functions += isinstance(node, cst.FunctionDef)
            return True
        if self.outermost and node is self.outermost.params:
            self.defaults = True
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changes = islice(operator(node), 1) if operator is operator_string else operator(node)
                self.found.extend(
                    (node, changed, self._function(node), self._lines(node), operator is operator_arg_removal)
                    for changed in changes
                    if _stricts(node) == _stricts(changed)
                )
        return not (isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in ("len", "isinstance"))

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.Parameters):
            self.defaults = False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.functions -= isinstance(node, cst.FunctionDef)
            if not self.functions:
                self.names.pop()

    def _function(self, node: cst.CSTNode) -> str:
        return ".".join(self.names) if self.functions else ""

    def _lines(self, node: cst.CSTNode) -> tuple[int, int]:
        at: Any = self.get_metadata(PositionProvider, (self.defaults and self.outermost) or node)
        return at.start.line, at.end.line


def _is_text(node: cst.CSTNode) -> bool:
    """A docstring, or a message: a text of several words."""
    if isinstance(node, cst.Expr):
        return isinstance(node.value, cst.SimpleString)
    return isinstance(node, cst.SimpleString) and " " in node.value.strip("\"'") and len(node.value.split()) > 3


def _is_type_checking(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING"


def _names_a_type(node: cst.CSTNode) -> bool:
    """`X: TypeAlias = ...`, `X = Literal[...]`, `X = TypeVar("X")`, `Annotated[...]`, and the text of `X = NamedTuple("X", ...)`."""
    match node:
        case cst.AnnAssign(annotation=cst.Annotation(annotation=cst.Name(value="TypeAlias"))):
            return True
        case cst.Assign(value=cst.Subscript(value=cst.Name(value="Literal")) | cst.Call(func=cst.Name(value="TypeVar"))):
            return True
        case cst.Subscript(value=cst.Name(value="Annotated")) | cst.Arg(value=cst.SimpleString(value='"Params"')):
            return True
    return False


def _is_strict(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict"


def _stricts(node: cst.CSTNode) -> list[str]:
    """The `strict` of a call and what it is."""
    return [cst.Module([]).code_for_node(arg.value) for arg in node.args if _is_strict(arg)] if isinstance(node, cst.Call) else []


def mutants(path: Path) -> Iterator[Mutant]:
    text = path.read_text("utf-8")
    wrapper, changes = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True), _Changes()
    module, spans = wrapper.module, wrapper.resolve(WhitespaceInclusivePositionProvider)
    wrapper.visit(changes)
    starts = list(accumulate((len(line) for line in text.splitlines(keepends=True)), initial=0))
    for node, changed, function, lines, call in changes.found:
        here = spans[node]
        first, last = (starts[at.line - 1] + at.column for at in (here.start, here.end))
        indent = next(n for n in INDENTS if text[first:last] == module.code_for_node(node).replace("\n", "\n" + n))
        head, tail = text.rindex("\n", 0, first) + 1 if "\n" in text[:first] else 0, text.find("\n", last)
        now = module.code_for_node(changed).replace("\n", "\n" + indent)
        old, new = text[head:tail], text[head:first] + now + text[last:tail]
        if old != new:
            yield Mutant(
                name_of(path), function, lines, " ".join(old.split()), " ".join(new.split()), text[:first] + now + text[last:], call
            )
