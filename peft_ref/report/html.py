"""The report as one page that needs nothing else: no request leaves it, and what comes from a port is text on it, never markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

from peft_ref.check.result import STATUSES, Diagnosis, Report, Verdict
from peft_ref.report import (
    Group,
    about,
    closeness,
    distance,
    element,
    headline,
    hidden,
    operations,
    page,
    port_name,
    reasons,
    title,
    undiagnosed,
)
from peft_ref.report.markup import e, example
from peft_ref.report.spec import clauses, formula, idea

MARKS = {"right": "", "wrong": "✗", "error": "!", "dialect": "~", "undecidable": "?", "skipped": "", "not asked": ""}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # no request leaves the page
LABELS = {"error": "no usable answer", "dialect": "in a dialect"}


def render(report: Report) -> str:
    """The page."""
    how, word, sentence = headline(report)
    who = e(port_name(report))
    kicker = f"peft-ref {report.verb}, {len(report.verdicts)} {report.thing}s in {report.seconds:.1f} s"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{e(word)}: {who}</title>\n<style>\n{_file('page.css')}</style></head>\n<body>\n"
        f'<header class="{how}"><div><p class="kicker">{kicker}</p>'
        f"<h1>{who} <small>{e(about(report))}</small> {_homepage(report)}</h1>"
        f'<p class="word">{e(word)}</p><p class="sentence">{e(sentence)}</p>{_bar(report)}</div></header>\n'
        f"<main>\n{_main(report)}\n<footer>The spec's pages are in <code>spec/</code> of peft_ref. Every number on this page is of float64"
        " unless the port's is meant.</footer></main>\n"
        f"<script>\n{_file('page.js')}</script>\n</body></html>\n"
    )


def _file(name: str) -> str:
    return files("peft_ref.report").joinpath(name).read_text("utf-8")


def _homepage(report: Report) -> str:
    url = report.port.homepage
    return f'<small><a href="{e(url)}" rel="noreferrer">{e(url)}</a></small>' if re.match(r"https?://\S+$", url) else ""


def _bar(report: Report) -> str:
    there = [(s, n) for s in STATUSES if (n := report.counts[s])]
    bar = "".join(f'<i class="{_class(s)}" style="flex:{n}"></i>' for s, n in there)
    legend = "".join(f'<li class="{_class(s)}"><i></i>{n} {LABELS.get(s, s)}</li>' for s, n in there)
    return f'<div class="bar">{bar}</div><ul class="legend">{legend}</ul>' if there else ""


def _main(report: Report) -> str:
    parts = [f"<h2>What happened</h2><pre>{e(report.broken)}</pre>" if report.broken else ""]
    wrong, dialects = [d for d in report.diagnoses if not d.dialect], [d for d in report.diagnoses if d.dialect]
    texts, errors = undiagnosed(report), reasons(report, "error")
    if wrong or texts:
        parts += ["<h2>What is wrong</h2>", *map(_diagnosis, wrong), *_texts(texts)]
    if dialects:
        parts += [
            "<h2>Dialects</h2><p>Another reading that its users rely on: named, and not counted as wrong.</p>",
            *map(_diagnosis, dialects),
        ]
    if errors:
        parts += [f"<h2>No usable answer, {report.counts['error']} cases</h2>", *(_card("error", "", _group(g)) for g in errors)]
    if report.verdicts:
        parts += [_map(report), _totals(report)]
    parts += [_hidden(report), _list(report)]
    return "\n".join(part for part in parts if part)


# ---- what is wrong


def _card(status: str, heading: str, body: str) -> str:
    return f'<section class="card {_class(status)}">{f"<h3>{heading}</h3>" if heading else ""}{body}</section>'


def _diagnosis(d: Diagnosis) -> str:
    where = ", ".join(d.operations) + (f" on {', '.join(d.layers)}" if d.layers else "")
    parts = [f'<p class="kicker">{e(d.method)}, {len(d.cases)} case{"s" if len(d.cases) > 1 else ""}: {e(where)}</p>']
    parts += [f"<h3>{e(title(d))}</h3>", f'<p class="what">{e(d.text)}</p>']
    parts.append(f'<h4>The rule</h4><p>{e(idea(d.method))}</p><pre class="formula">{e(formula(d.method))}</pre><div class="pair">')
    parts += [_clauses(d), f"<div>{_worst(d)}{_links(d.links)}</div></div>", example(d.counterexample) if d.counterexample else ""]
    parts.append(_cases(d.cases))
    return _card("dialect" if d.dialect else "wrong", "", "".join(parts))


def _clauses(d: Diagnosis) -> str:
    """What the spec says about the matter."""
    if not d.clause:
        return ""
    items = "".join(f"<li><b>{e(name)}</b> {_marked(text)}</li>" for name, text in clauses(d.method, d.clause))
    where = f"{e(d.clause)}, in <code>{e(page(d.method))}</code>"
    return f'<div><h4>What the spec says</h4><ul class="clauses">{items}</ul><p class="soft">{where}</p></div>'


def _marked(text: str) -> str:
    """A clause's code marks, the one piece of Markdown that clauses have."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", e(text))


def _worst(d: Diagnosis) -> str:
    if d.worst is None:
        return ""
    rows = f'<tr class="got"><td>got</td><td class="n">{e(d.worst.texts[0])}</td></tr>'
    rows += f'<tr class="want"><td>want</td><td class="n">{e(d.worst.texts[1])}</td></tr>'
    rows += f"<tr><td>off by</td><td>{e(distance(d.worst))}</td></tr>"
    return f'<h4>The worst element</h4><table class="ledger"><tr><td>at</td><td><code>{e(element(d.worst))}</code></td></tr>{rows}</table>'


def _links(links: Sequence[str]) -> str:
    items = "".join(f'<li><a href="{e(link)}" rel="noreferrer">{e(link)}</a></li>' for link in links)
    return f'<h4>Seen before</h4><ul class="clauses">{items}</ul>' if links else ""


def _texts(groups: Sequence[Group]) -> Iterable[str]:
    for where in dict.fromkeys((g.method, g.operation) for g in groups):
        members = [g for g in groups if (g.method, g.operation) == where]
        n = sum(len(g.cases) for g in members)
        kicker = f'<p class="kicker">{e(where[0])}, {n} case{"s" if n > 1 else ""}</p><h3>{e(where[1])}</h3>'
        yield _card("wrong", "", kicker + "".join(map(_group, members)))


def _group(group: Group) -> str:
    return f"<pre>{e(group.reason)}</pre>{_cases(group.cases)}"


def _cases(cases: Sequence[str]) -> str:
    items = "".join(f'<li><a href="#{_anchor(case)}">{e(case)}</a></li>' for case in cases)
    return f"<details><summary>{len(cases)} case{'s' if len(cases) > 1 else ''}</summary><ul>{items}</ul></details>"


# ---- the map


def _map(report: Report) -> str:
    """methods x operations x layers: a square for every case."""
    columns = operations(report.verdicts)
    head = "".join(f"<th>{e(o)}</th>" for o in columns)
    cells: dict[tuple[str, str, str], list[Verdict]] = {}
    for v in report.verdicts:
        cells.setdefault((v.method, v.layer, v.operation), []).append(v)
    rows = []
    methods = list(dict.fromkeys(v.method for v in report.verdicts))
    asked = [m for m in methods if any(v.status != "not asked" for v in report.verdicts if v.method == m)]
    for method in asked:
        rows.append(f'<tr><th colspan="{len(columns) + 1}">{e(method)}</th></tr>')
        for layer in dict.fromkeys(v.layer for v in report.verdicts if v.method == method):
            squares = "".join(f"<td>{''.join(map(_square, cells.get((method, layer, o), ())))}</td>" for o in columns)
            rows.append(f"<tr><th>{e(layer or 'names and files')}</th>{squares}</tr>")
    return (
        f'<h2>The map</h2><p class="soft">One square for every case. Point at it for its story, click for its place in the list.</p>'
        f'<div class="scroll"><table class="map"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        + (f'<p class="soft">Not asked: {e(", ".join(m for m in methods if m not in asked))}.</p>' if len(asked) < len(methods) else "")
    )


def _square(v: Verdict) -> str:
    told = e(f"{v.case}: {v.status}" + (f"\n{v.reason[:300]}" if v.reason else ""))
    return f'<a class="{_class(v.status)}" href="#{_anchor(v.case)}" title="{told}">{MARKS.get(v.status, "")}</a>'


# ---- the totals and the list


def _totals(report: Report) -> str:
    n = report.counts
    executed = sum(n[s] for s in ("right", "wrong", "dialect", "undecidable"))
    rows = [("executed", executed, "" if executed else "nothing was executed: this says nothing about the port")]
    rows += [(LABELS.get(s, s), n[s], "") for s in ("right", "wrong", "dialect", "error") if n[s]]
    for status in ("undecidable", "skipped", "not asked"):
        rows += [(status, len(g.cases), g.reason) for g in reasons(report, status)]
    close = closeness(report)
    if close.exact + close.within:
        rows.append(("right to the bit", close.exact, "where nothing may round, bits must match"))
        at = f", at most {close.worst.worst.ratio:.2g} of it ({close.worst.case})" if close.worst and close.worst.worst else ""
        rows.append(("right within tolerance", close.within, f"the tolerance is derived for each number from its own formula{at}"))
    body = "".join(f'<tr><td>{e(label)}</td><td>{count}</td><td class="soft">{e(told)}</td></tr>' for label, count, told in rows)
    return f'<h2>Totals</h2><table class="totals">{body}</table>'


def _hidden(report: Report) -> str:
    mistakes = hidden(report)
    if not mistakes:
        return ""
    rows = "".join(
        f"<tr><td>{e(method)}</td><td>{''.join(f'<span class=chip>{e(name)}</span>' for name in names)}</td></tr>"
        for method, names in mistakes.items()
    )
    return (
        "<h2>What could not have been seen</h2>"
        f"<p>In {e(report.port.dtype)} the cases that are right would not have shown these mistakes.</p>"
        f'<table class="ledger">{rows}</table>'
    )


def _list(report: Report) -> str:
    body = "".join(map(_row, sorted(report.verdicts, key=lambda v: STATUSES.index(v.status))))
    head = "".join(f"<th>{name}</th>" for name in (report.thing, "status", "clause", "of tolerance", "reason"))
    return (
        f'<h2>Every {report.thing}</h2><details id="cases"><summary>{len(report.verdicts)} {report.thing}s, worst first</summary>'
        '<input type="search" id="find" placeholder="words of a case, a status or a reason" aria-label="filter the cases">'
        f'<div class="scroll"><table class="list"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _row(v: Verdict) -> str:
    ratio = "bits" if v.exact else "" if v.worst is None else f"{v.worst.ratio:.2g}"
    return (
        f'<tr class="{_class(v.status)}" id="{_anchor(v.case)}"><td>{e(v.case)}</td><td>{e(LABELS.get(v.status, v.status))}</td>'
        f'<td>{e(v.clause)}</td><td class="n">{e(ratio)}</td><td>{e(v.reason[:600])}</td></tr>'
    )


def _class(status: str) -> str:
    return status.replace(" ", "-")


def _anchor(case: str) -> str:
    return e(re.sub(r"[^\w.-]", "-", case))
