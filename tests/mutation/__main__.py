"""A mutation run.      python -m tests.mutation --method lora --method oft        python -m tests.mutation --core peft_ref.stack

Every mutant is asked of the tests that run its line until one fails. The results are appended to a file, so an interrupted run goes on
where it was; a mutant is asked again when its file has changed, or with --again when it survived. What survives and is not in
`equivalent/` is a hole in the tests: the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

from tests.mutation.equivalent import equivalents
from tests.mutation.evidence import gather
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.running import SURVIVED, UNRUN, Judge
from tests.mutation.sources import FILES, OF_CORE, OF_METHODS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--method", action="append", choices=OF_METHODS, help="a file of peft_ref/methods, as often as you like; else all of them"
    )
    files.add_argument("--core", action="append", choices=[*OF_CORE, "all"], help="instead: a file under them, or all")
    parser.add_argument("--results", type=Path, default=Path(".mutation/results.jsonl"))
    parser.add_argument("--again", action="store_true", help="ask those that survived once more")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of tests that a mutant is asked at most")
    parser.add_argument("--report", action="store_true", help="of the results that are there; nothing is run")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("tests", nargs="*", help="files of tests, instead of all that are evidence")
    given = parser.parse_args()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    mutated, evidence = (OF_CORE, "evidence-core.json") if given.core else (OF_METHODS, "evidence.json")
    asked = given.method or [name for name in given.core or mutated if name != "all"] or mutated
    wanted = {name: list(mutants(FILES[name])) for name in asked}
    if not given.report:
        gather(given.results.with_name(evidence), mutated, lambda found: run(found, wanted, given), given.tests)
    return report(wanted, results(given.results), given.json)


def identity(mutant: Mutant) -> str:
    return json.dumps([*mutant.key, mutant.lines[0], hash_of(mutant)])


def hash_of(mutant: Mutant) -> str:
    import hashlib

    return hashlib.sha256(mutant.source.encode()).hexdigest()[:12]


def results(file: Path) -> dict[str, dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return {row["mutant"]: row for row in map(json.loads, lines)}


def run(evidence: Any, wanted: dict[str, list[Mutant]], given: argparse.Namespace) -> None:
    known = results(given.results)
    judge = Judge(evidence, given.limit, {(row["file"], row["old"], row["new"]): row["by"] for row in known.values() if row.get("by")})
    with given.results.open("a") as out:
        for calls, stem in product((False, True), wanted):  # calls that lack an argument are the most, and say the least
            begin, counts = time.perf_counter(), Counter[str]()
            for mutant in wanted[stem]:
                done = known.get(identity(mutant))
                if mutant.call != calls or (done and not (given.again and done["outcome"] in (SURVIVED, UNRUN))):
                    continue
                result = judge.judge(mutant)
                counts[result.outcome] += 1
                row = {
                    "mutant": identity(mutant),
                    "file": stem,
                    "function": mutant.function,
                    "line": mutant.lines[0],
                    "old": mutant.old,
                    "new": mutant.new,
                }
                print(json.dumps({**row, **result._asdict()}), file=out, flush=True)
            print(f"{stem:24} {dict(counts)} in {time.perf_counter() - begin:.0f} s", flush=True)


def report(wanted: dict[str, list[Mutant]], known: dict[str, dict[str, Any]], as_json: bool) -> int:
    figures, holes, equal = {}, [], equivalents()
    for stem, all_of_it in wanted.items():
        rows = [(m, known.get(identity(m), {"outcome": "not asked", "seconds": 0.0})) for m in all_of_it]
        alive = [(m, row) for m, row in rows if row["outcome"] in (SURVIVED, UNRUN)]
        holes += [(m, row) for m, row in alive if m.key not in equal]
        figures[stem] = {
            "mutants": len(rows),
            "killed": sum(row["outcome"] not in (SURVIVED, UNRUN, "not asked") for _, row in rows),
            "timeouts": sum(row["outcome"] == "timeout" for _, row in rows),
            "equivalent": sum(m.key in equal for m, _ in alive),
            "survived": sum(m.key not in equal for m, _ in alive),
            "not asked": sum(row["outcome"] == "not asked" for _, row in rows),
            "seconds": round(sum(row["seconds"] for _, row in rows)),
        }
    total = {word: sum(f[word] for f in figures.values()) for word in next(iter(figures.values()))}
    if as_json:
        print(
            json.dumps(
                {
                    "files": figures,
                    "total": total,
                    "survived": [{"file": m.file, "line": m.lines[0], "old": m.old, "new": m.new} for m, _ in holes],
                },
                indent=1,
            )
        )
        return bool(holes)
    for m, row in holes:
        print(
            f"{m.file}.py:{m.lines[0]} {row['outcome']} ({row.get('tried', 0)} of {row.get('running', 0)} tests)\n  - {m.old}\n  + {m.new}"
        )
    print(f"{'':24}" + "".join(f"{word:>11}" for word in total))
    for name, row in [*figures.items(), ("total", total)]:
        print(f"{name:24}" + "".join(f"{n:11}" for n in row.values()))
    return bool(holes)


if __name__ == "__main__":
    sys.exit(main())
