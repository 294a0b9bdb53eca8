"""An adapter folder as one page that needs nothing else: what comes from the files is text on it, never markup."""

from __future__ import annotations

from importlib.resources import files

from peft_ref.checkpoints.inspecting import WRONG
from peft_ref.errors import ConfigError
from peft_ref.report.inspect_text import bars
from peft_ref.report.inspecting import ENERGIES, Row, Told, facts, headline, number, percent, profile, rows, span
from peft_ref.report.markup import e
from peft_ref.report.spectrum_svg import svg

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no request leaves the page
STYLE = "svg { max-width: 100%; height: auto; border-radius: 10px; }\n.bars { font-family: monospace; letter-spacing: 1px; }\n"


def render(told: Told, each: bool = False) -> str:
    """The page."""
    word, sentence = headline(told)
    how = "bad" if told.bad else "doubtful" if told.findings else "good"
    css = files("peft_ref.report").joinpath("page.css").read_text("utf-8")
    name = e(str(told.inspection.folder))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{e(word)}: {name}</title>\n<style>\n{css}{STYLE}</style></head>\n<body>\n"
        f'<header class="{how}"><div><p class="kicker">peft-ref inspect</p><h1>{name}</h1>'
        f'<p class="word">{e(word)}</p><p class="sentence">{e(sentence)}</p></div></header>\n<main>\n'
        f"{_facts(told)}{_findings(told)}{_elsewhere(told)}{_picture(told)}{_modules(told, each)}</main>\n</body></html>\n"
    )


def _facts(told: Told) -> str:
    body = "".join(f"<tr><td>{e(label)}</td><td>{e(text)}</td></tr>" for label, text in facts(told))
    return f'<h2>What it is</h2><table class="ledger">{body}</table>\n'


def _findings(told: Told) -> str:
    kinds = {f: "wrong" if f.level == WRONG else "undecidable" for f in told.findings}
    cards = "".join(
        f'<section class="card {kind}"><p class="kicker">{f.level}</p><pre>{e(f.said)}</pre></section>' for f, kind in kinds.items()
    )
    return f"<h2>What to know</h2>{cards}\n" if cards else ""


def _elsewhere(told: Told) -> str:
    out = []
    for program, found in told.elsewhere.items():
        items = "".join(
            f'<tr><td>{v.rule.outcome}</td><td>{e(v.rule.said)}<br><span class="soft">{e("; ".join(v.by))}</span></td>'
            f'<td><a href="{e(v.rule.source.url)}" rel="noreferrer">{e(str(v.rule.source))}</a></td></tr>'
            for v in found
        )
        body = f'<table class="list">{items}</table>' if items else "<p>Nothing that is known here stands in the way.</p>"
        out.append(f"<h2>For {e(program)}</h2>{body}\n")
    return "".join(out)


def _picture(told: Told) -> str:
    if told.measured is None:
        return ""
    try:
        return f"<h2>Singular values</h2>{svg(told.measured.deltas)}\n"
    except ConfigError:  # there are none
        return ""


def _modules(told: Told, each: bool) -> str:
    found = rows(told, each)
    if not found:
        return ""
    measured = ["|delta|", "of |W|", "effective rank", *(f"{share:.0%} energy" for share in ENERGIES), "singular values"]
    head = ["modules", "", "out x in", "rank", "scale", "from", "parameters", "dtypes", *(measured if told.measured else [])]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(row, told.measured is not None))}</tr>" for row in found)
    return (
        '<h2>Modules</h2><div class="scroll"><table class="list"><thead><tr>'
        f"{''.join(f'<th>{h}</th>' for h in head)}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def _cells(row: Row, measured: bool) -> list[str]:
    module = row.module
    scale = ("", "") if module.scale is None else (f"{module.scale.value:.6g}", e(module.scale.said()))
    cells = [f"<code>{e(row.name)}</code>", str(len(row.members)), row.size, str(module.rank or ""), *scale, number(row.parameters)]
    cells.append(e(", ".join(module.dtypes)))
    if not measured:
        return cells
    norms = [d.norm for d in row.deltas if d.norm is not None]
    shares = [d.relative for d in row.deltas if d.relative is not None]
    effective = [v for d in row.deltas if (v := d.effective_rank) is not None]
    energies = [[float(k) for d in row.deltas if (k := d.rank_of_energy(share)) is not None] for share in ENERGIES]
    cells += [span(norms) if norms else "", percent(shares) if shares else "", span(effective, ".1f") if effective else ""]
    cells += [span(found, ".0f") if found else "" for found in energies]
    return [*cells, f'<span class="bars">{bars(profile(row.deltas))}</span>']
