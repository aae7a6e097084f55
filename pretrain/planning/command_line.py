"""`pretrain plan`: its options, and which question each asks. Parse and call; the answers are the other files'.

Importing this file imports nothing heavy, so that the command line's help stays fast.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

CsvFile = Annotated[
    Path | None, typer.Option(metavar="RUNS.csv", help="Predict the runs of a CSV, written back on stdout.")
]
Words = Annotated[
    str | None,
    typer.Option(metavar="LAYOUT", help="Why one is refused or slow: zero=1,tensor=4,micro=2."),
]
Recipe = Annotated[Path | None, typer.Option(metavar="RECIPE.yaml", help="Write the best, or the explained one.")]


def plan(
    predict: CsvFile = None,
    model: Annotated[str | None, typer.Option(help="A preset, 8x7b, or a size such as 13b or 1T.")] = None,
    nodes: Annotated[int, typer.Option(min=1, max=100_000, help="Hosts.")] = 1,
    gpus: Annotated[str, typer.Option(help="GPUs of one host and their kind.")] = "8xA100-80",
    tokens: Annotated[str, typer.Option(help="Tokens of the whole run, as in 300B.")] = "300B",
    global_batch: Annotated[str | None, typer.Option(help="Tokens of a step, as in 4M; default: by size.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; default: up to 4096.")] = None,
    explain: Words = None,
    write: Annotated[
        Path | None, typer.Option(metavar="RECIPE.yaml", help="Write the best, or the explained one.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="US dollars of a GPU-hour.")] = None,
    failure_hours: Annotated[float | None, typer.Option(min=1.0, help="GPU-hours between failures.")] = None,
    restart_minutes: Annotated[float | None, typer.Option(min=0.0, help="From a failure to the next step.")] = None,
    storage_gbps: Annotated[float | None, typer.Option(min=1e-3, help="GB/s of a node's checkpoints.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a run before a GPU is rented.

    Which layouts fit, how fast each is, and what training costs; or what published runs should have reached.
    """
    if predict is not None:
        from pretrain.planning.predict import predict_file

        predict_file(predict, sys.stdout)
        return
    if model is None:
        raise typer.BadParameter("say what to plan: --model 13b, or --predict RUNS.csv")
    from pretrain.planning.request import build_request

    given = {
        "hourly_price": price,
        "failure_hours": failure_hours,
        "restart_minutes": restart_minutes,
        "storage_bandwidth": None if storage_gbps is None else storage_gbps * 1e9,
    }
    request = build_request(
        model=model,
        nodes=nodes,
        gpus=gpus,
        tokens=tokens,
        global_batch=global_batch,
        sequence_length=sequence_length,
        economy={name: value for name, value in given.items() if value is not None},
    )
    from pretrain.planning.answers import answer

    answer(request, explain=explain, write=write, as_json=as_json)
