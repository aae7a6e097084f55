"""Shows surveys of datasets: one page with plots that needs no network, and a table for the terminal.

Counts nothing. Texts of the corpus are escaped: a web page inside it stays text.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.corpus_survey import PERCENTILES, Survey
from data_tools.errors import UsageError

COLOURS = ("#0b6bcb", "#c05717", "#1f7a4d", "#8a3ffc", "#b3261e", "#00696f")
MOST_BARS = 20
SAMPLE_CHARACTERS = 700
CURVE_POINTS = 300
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1f; background: #ffffff; margin: 2rem auto; max-width: 1100px;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; } 
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: 0.3rem 0.6rem;
  border-bottom: 1px solid #d0d0d8; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f7;
  padding: 0.6rem 0.8rem; border-radius: 4px; font-size: 0.85rem; } .quiet { color: #55555f; }
"""


def facts(survey: Survey) -> dict[str, str]:
    """The numbers of a split, as people read them."""
    estimated = "" if survey.hashed_share == 1 else f" (from {survey.hashed_share:.1%} of the documents)"
    return {
        "documents": f"{survey.documents:,}",
        "tokens": f"{survey.tokens:,}",
        "mean length": f"{survey.tokens / max(1, survey.documents):,.1f} tokens",
        **{f"{share}% are at most": f"{survey.percentile(share):,} tokens" for share in PERCENTILES},
        "longest": f"{survey.longest:,} tokens",
        "duplicates": f"{survey.duplicate_share:.2%} of documents, {survey.duplicate_token_share:.2%} of tokens"
        + estimated,
        "distinct tokens": f"{int((survey.token_counts > 0).sum()):,} of {len(survey.token_counts):,}",
        "unigram entropy": f"{survey.entropy_nats:.3f} nats a token",
        "sources": _ranked(survey.sources, survey.tokens),
        "languages": "not known: pip install 'athanor-pretrain[curate]'"
        if survey.languages is None
        else _ranked(survey.languages, sum(survey.languages.values())),
        **{f"metadata: {key}": _ranked(values, sum(values.values())) for key, values in survey.metadata.items()},
    }


def table_lines(surveys: Sequence[Survey]) -> Iterator[str]:
    """The facts of every split, for a terminal."""
    for survey in surveys:
        yield f"{survey.name}/{survey.split}"
        for name, value in facts(survey).items():
            yield f"  {name:<20} {value}"
        for repeated in survey.repeated:
            text = "" if repeated.text is None else f"  {' '.join(repeated.text.split())[:60]!r}"
            yield f"  {'repeated':<20} {repeated.count:,} times, {repeated.tokens:,} tokens{text}"


def write_page(surveys: Sequence[Survey], path: Path) -> None:
    """Write the page in one move.

    Raises:
        UsageError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(
            "plotly is not installed", "the extra `plots`", "pip install 'athanor-pretrain[plots]', or leave --html out"
        ) from None
    names = sorted({survey.name for survey in surveys})
    body = [f"<h1>{html.escape(', '.join(names))}</h1>"]
    body += [
        _drawn(figure, f"all-{number}") for number, figure in enumerate((_lengths(surveys), _frequencies(surveys)))
    ]
    for number, survey in enumerate(surveys):
        body += _section(survey, number)
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<link rel='icon' href='data:,'><title>{html.escape(', '.join(names))}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(body)}</body></html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(page, encoding="utf-8")
    staged.replace(path)


def _section(survey: Survey, number: int) -> Iterator[str]:
    title = f"{survey.name}/{survey.split}"
    yield f"<h2>{html.escape(title)}</h2>"
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts(survey).items()
    )
    yield f"<table>{rows}</table>"
    bars: list[tuple[str, Mapping[str, int]]] = [("Tokens by source", survey.sources)]
    bars += [("Sampled documents by language", survey.languages)] if survey.languages else []
    bars += [(f"Documents by {key}", values) for key, values in survey.metadata.items()]
    bars.append(("Most frequent tokens", dict(survey.most_frequent)))
    for place, (heading, values) in enumerate(bars):
        if values:
            yield _drawn(_bars(values, heading), f"bars-{number}-{place}")
    for repeated in survey.repeated:
        text = repeated.text if repeated.text is not None else "(no tokenizer beside the dataset)"
        yield f"<h3>{repeated.count:,} times, {repeated.tokens:,} tokens</h3>"
        yield f"<pre>{html.escape(text[:SAMPLE_CHARACTERS])}</pre>"
    for place, text in enumerate(survey.samples, 1):
        shown = html.escape(text[:SAMPLE_CHARACTERS]) + ("…" if len(text) > SAMPLE_CHARACTERS else "")
        yield f"<h3>Sample {place} of {len(survey.samples)}</h3><pre>{shown}</pre>"


def _lengths(surveys: Sequence[Survey]) -> Any:
    """Documents by length, in steps of a quarter of a doubling, as shares so that splits compare."""
    from plotly import graph_objects as go

    figure = go.Figure()
    edges = np.unique(np.round(2 ** np.arange(0, 20.26, 0.25)).astype(int))
    for survey, colour in zip(surveys, _colours(), strict=False):
        totals = np.concatenate([[0], np.cumsum(survey.lengths)])
        counts = np.diff(totals[np.minimum(edges, len(totals) - 1)])
        places = np.sqrt(edges[:-1] * edges[1:])
        shares = counts / max(1, survey.documents)
        figure.add_trace(
            go.Scatter(
                x=places.tolist(),
                y=shares.tolist(),
                name=f"{survey.name}/{survey.split}",
                line={"color": colour, "shape": "hvh"},
            )
        )
    longest = max(survey.longest for survey in surveys)
    return _laid_out(
        figure,
        "Length of documents",
        "tokens",
        "share of documents",
        x_log=[0, float(np.log10(max(10, longest)) + 0.1)],
    )


def _frequencies(surveys: Sequence[Survey]) -> Any:
    """How often each token comes, by rank."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for survey, colour in zip(surveys, _colours(), strict=False):
        ranked = np.sort(survey.token_counts[survey.token_counts > 0])[::-1]
        ranks = np.unique(np.geomspace(1, max(1, len(ranked)), CURVE_POINTS).astype(int))
        shares = (ranked[ranks - 1] / max(1, ranked.sum())).tolist()
        figure.add_trace(
            go.Scatter(x=ranks.tolist(), y=shares, name=f"{survey.name}/{survey.split}", line={"color": colour})
        )
    figure.update_yaxes(type="log")
    return _laid_out(figure, "Tokens by rank", "rank of the token", "share of tokens", x_log=None)


def _bars(values: Mapping[str, int], title: str) -> Any:
    from plotly import graph_objects as go

    shown = dict(sorted(values.items(), key=lambda item: -item[1])[:MOST_BARS])
    names = [html.escape(name if len(name) <= 48 else "…" + name[-47:]) for name in shown]
    figure = go.Figure(go.Bar(x=list(shown.values()), y=names, orientation="h", marker={"color": COLOURS[0]}))
    figure.update_layout(
        title={"text": title},
        height=120 + 26 * len(shown),
        margin={"t": 50, "b": 40, "l": 20, "r": 20},
        template="plotly_white",
        font={"size": 14, "color": "#1b1b1f"},
        yaxis={"autorange": "reversed", "automargin": True, "type": "category"},
    )
    return figure


def _laid_out(figure: Any, title: str, across: str, up: str, *, x_log: list[float] | None) -> Any:
    figure.update_xaxes(type="log", title={"text": across}, range=x_log)
    figure.update_yaxes(title={"text": up})
    figure.update_layout(
        title={"text": title},
        height=400,
        margin={"t": 60, "b": 50, "l": 80, "r": 20},
        template="plotly_white",
        font={"size": 14, "color": "#1b1b1f"},
        showlegend=True,
    )
    return figure


def _drawn(figure: Any, name: str) -> str:
    drawn: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"responsive": True, "displaylogo": False}
    )
    return drawn


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def _ranked(counts: Mapping[str, int], whole: int) -> str:
    """The largest ones with their shares, in one line."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {count / max(1, whole):.1%}" for name, count in ranked[:5])
    return text + (f" and {len(ranked) - 5} more" if len(ranked) > 5 else "")
