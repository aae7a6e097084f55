"""The report of a curation: one page that needs nothing but itself: charts, tables, dropped documents to look at.

Shows the numbers it is given and computes none but shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from data_tools.curation.accounting import Drop
from data_tools.curation.charts import bars, histograms, paired_bars
from data_tools.curation.totals import StepTotal
from data_tools.curation.wording import plain

MOST_REASONS = 30  # in the chart; the table of steps has the sum of all
MOST_LANGUAGES = 20
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Curation {title}</title><style>{style}</style></head>
<body><main>{body}</main></body></html>
"""
_STYLE = """
:root { --ink: #1c2330; --faint: #5b6576; --line: #d5dae2; --paper: #ffffff; --card: #f4f6f9;
  --first: #2563a8; --second: #e0a24a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebf0; --faint: #a3adbd; --line: #3a4352; --paper: #14181f;
  --card: #1e242e; --first: #6aa6e8; --second: #c98a3a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; }
p { margin: 4px 0; } .faint, figcaption + .faint { color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 20px 0; }
.card { background: var(--card); border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 24px; font-weight: 600; } .card span { color: var(--faint); font-size: 13px; }
figure { margin: 18px 0; background: var(--card); border-radius: 8px; padding: 14px 16px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 9px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; font-size: 13px; } th:first-child, td:first-child { text-align: left; }
details { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; margin: 8px 0; }
summary { cursor: pointer; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card);
  border-radius: 6px; padding: 10px 12px; margin: 4px 0 14px; font-size: 13px; max-height: 300px; overflow-y: auto; }
code { font-size: 13px; }
"""


def render(numbers: Mapping[str, Any], totals: Sequence[StepTotal]) -> str:
    """Return the page.

    Args:
        numbers: the content of curation.json.
        totals: of reading and of every step, with their times.
    """
    parts = [
        *_head(numbers),
        _kept_chart(totals),
        "<h2>Steps</h2>",
        _step_table(totals),
        *_reasons(totals),
        *_lengths(numbers["lengths"]),
        *_languages(totals),
        *_replaced(totals),
        *_samples(totals),
        *_provenance(numbers),
    ]
    return _PAGE.format(title=escape(numbers["name"]), style=_STYLE, body="\n".join(parts))


def size(number: float) -> str:
    """Return bytes in the unit that suits."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _head(numbers: Mapping[str, Any]) -> Iterator[str]:
    documents, kept = numbers["documents_in"], numbers["documents_out"]
    yield f"<h1>Curation: {escape(numbers['name'])}</h1>"
    yield (
        f'<p class="faint">{_counted(len(numbers["inputs"]), "input file")}, '
        f"{_counted(len(numbers['steps']) - 1, 'step')}, {_counted(len(numbers['files']), 'output file')}</p>"
    )
    cards = [
        (f"{documents:,}", "documents in"),
        (f"{kept:,}", f"documents out, {_share(kept, documents)}"),
        (f"{documents - kept:,}", f"documents dropped, {_share(documents - kept, documents)}"),
        (size(numbers["bytes_in"]), "of text in"),
        (size(numbers["bytes_out"]), f"of text out, {_share(numbers['bytes_out'], numbers['bytes_in'])}"),
    ]
    yield '<div class="cards">'
    yield from (f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards)
    yield "</div>"


def _kept_chart(totals: Sequence[StepTotal]) -> str:
    documents = max(1, totals[0].counts.documents_in)
    text = max(1, totals[0].counts.bytes_out)
    return paired_bars(
        [plain(total.name) for total in totals],
        [total.counts.documents_out / documents for total in totals],
        [total.counts.bytes_out / text for total in totals],
        names=("documents", "bytes of text"),
        title="What is left after each step",
    )


def _step_table(totals: Sequence[StepTotal]) -> str:
    head = ("step", "documents in", "dropped", "of them", "changed", "documents out", "text out", "seconds")
    rows = []
    for total in totals:
        counts = total.counts
        dropped = counts.documents_in - counts.documents_out
        cells = [
            escape(plain(total.name)),
            f"{counts.documents_in:,}",
            f"{dropped:,}",
            _share(dropped, counts.documents_in),
            f"{counts.changed:,}" if counts.changed else "",
            f"{counts.documents_out:,}",
            size(counts.bytes_out),
            f"{counts.seconds:,.1f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _reasons(totals: Sequence[StepTotal]) -> Iterator[str]:
    reasons = [
        (documents, f"{plain(total.name)}: {plain(reason)}")
        for total in totals
        for reason, documents in total.counts.dropped.items()
    ]
    if not reasons:
        return
    yield "<h2>Why documents were dropped</h2>"
    shown = sorted(reasons, key=lambda pair: -pair[0])[:MOST_REASONS]
    more = f", the {MOST_REASONS} commonest of {len(reasons)} reasons" if len(reasons) > MOST_REASONS else ""
    title = f"Documents dropped, by step and reason{more}"
    yield bars([name for _, name in shown], [count for count, _ in shown], title=title, shown=_whole)


def _lengths(lengths: Mapping[str, Any]) -> Iterator[str]:
    before, after = lengths["before"], lengths["after"]
    filled = [number for number, count in enumerate(before) if count or after[number]]
    if not filled:
        return
    first, last = filled[0], filled[-1] + 1
    edges = [_binary(2**number) for number in range(first, last)]
    yield "<h2>How long documents are</h2>"
    yield histograms(
        edges,
        before[first:last],
        after[first:last],
        title="Documents by length, before and after",
        unit="bytes, below (each bin begins where the one before ends)",
        shown=_whole,
    )


def _languages(totals: Sequence[StepTotal]) -> Iterator[str]:
    for total in totals:
        if total.name == "language" and total.counts.counts:
            ranked = sorted(total.counts.counts.items(), key=lambda pair: (-pair[1], pair[0]))
            yield "<h2>Languages</h2>"
            more = f", the {MOST_LANGUAGES} commonest of {len(ranked)}" if len(ranked) > MOST_LANGUAGES else ""
            title = f"Documents by language, before the filter{more}"
            shown = ranked[:MOST_LANGUAGES]
            yield bars([label for label, _ in shown], [count for _, count in shown], title=title, shown=_whole)


def _replaced(totals: Sequence[StepTotal]) -> Iterator[str]:
    rows = [
        f"<tr><td>{escape(plain(what))}</td><td>{count:,}</td></tr>"
        for total in totals
        if total.name in ("placeholders", "emoji")
        for what, count in sorted(total.counts.counts.items(), key=lambda pair: -pair[1])
    ]
    if rows:
        yield "<h2>What was replaced in texts</h2>"
        yield f"<table><tr><th>kind</th><th>times</th></tr>{''.join(rows)}</table>"


def _samples(totals: Sequence[StepTotal]) -> Iterator[str]:
    if any(total.counts.samples for total in totals):
        yield "<h2>Dropped documents to look at</h2>"
        yield '<p class="faint">The first of every reason, in the order of the corpus.</p>'
    for total in totals:
        for reason, samples in sorted(total.counts.samples.items(), key=lambda pair: -total.counts.dropped[pair[0]]):
            if not samples:
                continue
            count = total.counts.dropped[reason]
            yield (
                f"<details><summary><b>{escape(plain(total.name))}</b>: {escape(plain(reason))} "
                f'<span class="faint">({count:,} documents, {len(samples)} shown)</span></summary>'
            )
            yield from map(_sample, samples)
            yield "</details>"


def _sample(drop: Drop) -> str:
    where = drop.source if drop.source == drop.identifier else f"{drop.identifier} from {drop.source}"
    detail = f" | {drop.detail}" if drop.detail else ""
    cut = f"\n… ({drop.characters:,} characters in all)" if drop.characters > len(drop.text) else ""
    text = f"<pre>{escape(drop.text)}{cut}</pre>" if drop.text else ""
    return f'<p class="faint"><code>{escape(where + detail)}</code></p>{text}'


def _provenance(numbers: Mapping[str, Any]) -> Iterator[str]:
    packages = ", ".join(f"{name} {version}" for name, version in numbers["packages"].items())
    recipe = yaml.safe_dump(numbers["recipe"], sort_keys=False, allow_unicode=True)
    inputs = "".join(
        f"<tr><td>{escape(fact['file'])}</td><td>{size(fact['bytes'])}</td><td><code>{escape(fact['xxh3_128'])}</code></td></tr>"
        for fact in numbers["inputs"]
    )
    yield "<h2>Where it comes from</h2>"
    yield f'<p class="faint">{escape(packages)}</p>'
    yield f"<details><summary>Recipe, with every default</summary><pre>{escape(recipe)}</pre></details>"
    yield (
        '<details><summary>Inputs</summary><div class="scroll"><table><tr><th>file</th><th>on disk</th>'
        f"<th>xxh3</th></tr>{inputs}</table></div></details>"
    )


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _binary(number: int) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1024 or unit == "G":
            break
        number //= 1024
    return f"{number}{unit}"
