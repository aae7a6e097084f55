"""The commands that look at datasets and change nothing: inspect, stats, report; __main__.py registers them.

Parses and calls; what it calls is imported inside the commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_tools.command_options import Dataset


def register_looks(app: typer.Typer) -> None:
    """Add the commands to a command line."""
    app.command("inspect")(inspect_dataset)
    app.command()(stats)
    app.command()(report)


def inspect_dataset(
    dataset: Dataset,
    rows: Annotated[int, typer.Option(min=0, help="Rows of each split to decode.")] = 1,
    row: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens a row, if not packed.")] = None,
    histogram: Annotated[Path | None, typer.Option(help="Draw lengths and token frequencies as this .png.")] = None,
) -> None:
    """Show the manifest, rows as text with their boundaries, and the lengths of documents."""
    from data_tools.inspect import describe

    typer.echo(describe(dataset, rows=rows, first_row=row, sequence_length=sequence_length))
    if histogram is not None:
        from data_tools.histograms import draw_histograms

        draw_histograms(dataset, histogram)
        typer.echo(f"{histogram}: {histogram.stat().st_size:,} bytes")


def stats(
    dataset: Dataset,
    top: Annotated[int, typer.Option(min=0, help="Most frequent tokens to list.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count documents, tokens, lengths and frequencies, split by split."""
    from data_tools.inspect import describe_statistics, statistics

    numbers = statistics(dataset, top=top)
    typer.echo(json.dumps(numbers, ensure_ascii=False, indent=1) if as_json else describe_statistics(numbers))


def report(
    datasets: Annotated[list[Path], typer.Argument(metavar="DATASET...", help="Dataset folders, or splits of them.")],
    html: Annotated[Path | None, typer.Option(help="Write one page with plots, which needs no network.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each split to show on the page.")] = 6,
) -> None:
    """Look through datasets: lengths, languages, sources, tokens, duplicates, samples.

    Memory does not grow with the dataset.
    """
    from data_tools.corpus_page import table_lines, write_page
    from data_tools.corpus_survey import survey

    surveys = [split for dataset in datasets for split in survey(dataset, samples=samples)]
    for line in table_lines(surveys):
        typer.echo(line)
    if html is not None:
        write_page(surveys, html)
        typer.echo(f"{html}: {html.stat().st_size:,} bytes")
