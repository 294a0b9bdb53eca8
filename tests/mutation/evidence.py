"""The evidence: pytest's own tests, with the lines of the mutated files that each of them runs, and how long it takes.

Nothing of it knows of mutants. A test that passes on the sound code and fails on a mutant kills it. The lines are kept in a file, by
test; what is known of a test is forgotten when its module, or one of those files that it runs, has changed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import coverage
import pytest

from tests.mutation.sources import OF_CORE, ROOT, module_of, name_of

# Laws by NumPy alone, live PEFT, the pages' numbers, files and configurations, starts, training. The judge's own oracle is the code that is
# mutated, so what only asks the judge is no evidence: `check` stands here for its laws of starts and its exact twins.
ELSEWHERE = {"test_on_backends", "test_starts_on_backends"}  # what other libraries do
LAWS = sorted(f"laws/{p.name}" for p in (ROOT / "tests" / "laws").glob("test_*.py") if p.stem not in ELSEWHERE)
FOLDERS = (
    *LAWS,
    *("hf", "spec", "files/test_hf_configs.py", "files/test_hf.py", "files/test_config.py", "files/test_config_space.py"),
    *("check/test_init_laws.py", "model/test_sharing.py", "model/test_tokens.py", "graph/test_live_order.py"),
)
OF_THE_CORE = (*FOLDERS, "registry", "files", "backends")  # what no method's own numbers show: switches, keys, what a library brings along
OPTIONS = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:warnings", "-q", "--backend", "numpy", "-m", "not sweep"]
Record = dict[str, Any]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""


class Evidence:
    """A plugin: pytest collects, and instead of a run `work` is done with the tests."""

    def __init__(self, file: Path, mutated: Mapping[str, Path], work: Any) -> None:
        self.file, self.mutated, self.work = file, mutated, work
        self.records: dict[str, Record] = json.loads(file.read_text()) if file.is_file() else {}
        self.items: dict[str, pytest.Item] = {}
        self.digests: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.caches = [
            o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper and o.__module__.startswith(("peft_ref", "tests"))
        ]
        self.learn()
        self.work(self)
        return True

    def learn(self) -> None:
        unknown = [item for name, item in self.items.items() if not self.known(name)]
        print(f"{len(self.items)} tests, {len(unknown)} of them new", flush=True)
        tracer = coverage.Coverage(data_file=None, config_file=False, include=[str(path) for path in self.mutated.values()])
        tracer.start()
        for n, item in enumerate(unknown):
            self.forget()
            tracer.switch_context(item.nodeid)
            begin = time.perf_counter()
            passed = runs(item, unknown[n + 1] if n + 1 < len(unknown) else None)
            self.records[item.nodeid] = {"passed": passed, "seconds": round(time.perf_counter() - begin, 4)}
            if n % 500 == 499 or n + 1 == len(unknown):
                self.keep(tracer, [i.nodeid for i in unknown[n - n % 500 : n + 1]])
                print(f"{n + 1} of {len(unknown)} new tests run", flush=True)
        tracer.stop()

    def keep(self, tracer: coverage.Coverage, names: list[str]) -> None:
        lines: dict[str, dict[str, list[int]]] = {name: {} for name in names}
        data = tracer.get_data()
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                for name in contexts:
                    if name in lines:
                        lines[name].setdefault(name_of(Path(file)), []).append(line)
        for name in names:
            self.records[name] |= {"lines": lines[name], "of": {p: self.digest(p) for p in self.sources(name, lines[name])}}
        self.file.write_text(json.dumps(self.records))

    def sources(self, name: str, files: Any) -> Iterator[str]:
        """Below the repository's root, so that another checkout may go on from the same file."""
        yield name.partition("::")[0]
        yield from (str(self.mutated[file].relative_to(ROOT)) for file in files)

    def known(self, name: str) -> bool:
        return name in self.records and all(self.digest(path) == was for path, was in self.records[name].get("of", {"": "-"}).items())

    def digest(self, path: str) -> str:
        return self.digests.setdefault(path, digest(ROOT / path))

    def forget(self) -> None:
        """What a cache holds was computed by the sound code, or by a mutant."""
        for cache in self.caches:
            cache.cache_clear()

    def running(self, file: str, lines: tuple[int, int]) -> list[pytest.Item]:
        """The tests that run one of these lines of a file."""
        wanted = range(lines[0], lines[1] + 1)
        return [item for item, ran in self._passing() if any(n in wanted for n in ran.get(file, ()))]

    def using(self, file: str) -> list[pytest.Item]:
        """The tests that run a file, or one that imports from it: what stands in a module runs when it is imported.

        And those that run none: they look at the classes themselves.
        """
        package, _, stem = module_of(file).rpartition(".")
        name = re.compile(rf"{re.escape(package)}(\.{stem}\b| import .*\b{stem}\b)")
        files = {file, *(other for other, path in self.mutated.items() if name.search(path.read_text("utf-8")))}
        return [item for item, ran in self._passing() if not ran or not files.isdisjoint(ran)]

    def _passing(self) -> Iterator[tuple[pytest.Item, dict[str, list[int]]]]:
        return ((item, r["lines"]) for name, item in self.items.items() if (r := self.records[name])["passed"])


def runs(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Whether a test passes; one that is skipped says nothing, so it does not."""
    passed = True
    try:
        item.ihook.pytest_runtest_setup(item=item)
        item.ihook.pytest_runtest_call(item=item)
    except (Exception, pytest.skip.Exception, pytest.fail.Exception):
        passed = False
    with contextlib.suppress(Exception):
        item.ihook.pytest_runtest_teardown(item=item, nextitem=following)
    return passed


def gather(file: Path, mutated: Mapping[str, Path], work: Any, only: list[str]) -> int:
    from hypothesis import Phase, settings

    settings.register_profile(
        "mutation", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False
    )
    settings.load_profile("mutation")
    folders = OF_THE_CORE if mutated is OF_CORE else FOLDERS
    return int(pytest.main([*OPTIONS, *(only or (str(ROOT / "tests" / f) for f in folders))], plugins=[Evidence(file, mutated, work)]))
