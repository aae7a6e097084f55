"""`pretrain plan`: its options, and which question each asks. Parse and call; the answers are the other files'.

Importing this file imports nothing heavy, so that the command line's help stays fast.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="With --fit: finished run folders.")]
CsvFile = Annotated[
    Path | None, typer.Option(metavar="RUNS.csv", help="Predict the runs of a CSV, written back on stdout.")
]
Words = Annotated[
    str | None, typer.Option(metavar="LAYOUT", help="Why one is refused or slow: zero=1,tensor=4,micro=2.")
]
Recipe = Annotated[Path | None, typer.Option(metavar="RECIPE.yaml", help="Write the best, or the explained one.")]
Page = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write pictures of a plan or a --fit.")]
Calibrated = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Of --calibrate; then --gpus 8xFILE.json plans with it.")
]
Flops = Annotated[str | None, typer.Option(help="What a budget of FLOPs buys, as in 1e23, by published laws.")]


def plan(
    runs: Runs = None,
    model: Annotated[str | None, typer.Option(help="A preset, 8x7b, or a size such as 13b or 1T.")] = None,
    nodes: Annotated[int, typer.Option(min=1, max=100_000, help="Hosts.")] = 1,
    gpus: Annotated[str, typer.Option(help="GPUs of one host and their kind.")] = "8xA100-80",
    tokens: Annotated[str, typer.Option(help="Tokens of the whole run, as in 300B.")] = "300B",
    global_batch: Annotated[str | None, typer.Option(help="Tokens of a step, as in 4M; default: by size.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; default: up to 4096.")] = None,
    explain: Words = None,
    write: Recipe = None,
    html: Page = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="US dollars of a GPU-hour.")] = None,
    failure_hours: Annotated[float | None, typer.Option(min=1.0, help="GPU-hours between failures.")] = None,
    restart_minutes: Annotated[float | None, typer.Option(min=0.0, help="From a failure to the next step.")] = None,
    storage_gbps: Annotated[float | None, typer.Option(min=1e-3, help="GB/s of a node's checkpoints.")] = None,
    at_scale: Annotated[bool, typer.Option("--at-scale", help="On 1,000 to 100,000 GPUs, simulated.")] = False,
    predict: CsvFile = None,
    flops: Flops = None,
    unique_tokens: Annotated[str | None, typer.Option(help="With --flops: tokens that there are, as in 100B.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Fit a scaling law on finished runs.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine's device.")] = False,
    output: Calibrated = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a run before a GPU is rented.

    Which layouts fit, how fast each is, and what training costs; what published runs should have reached; what a budget
    buys.
    """
    _refuse_mixtures(
        {"--model": model is not None, "--predict": predict is not None, "--flops": flops is not None, "--fit": fit}
        | {"--calibrate": calibrate},
        of_model={"--explain": explain, "--write": write, "--at-scale": at_scale or None, "--json": as_json or None},
        html=html,
    )
    stray_output, stray_tokens = (None if calibrate else output), (None if flops else unique_tokens)
    _refuse_strays(runs=None if fit else runs, output=stray_output, unique=stray_tokens)
    if model is None:
        place = (output or Path("calibration.json")) if calibrate else None
        _answer_without_model(predict, flops, unique_tokens, runs or [], html, place)
        return
    from pretrain.planning.answers import answer, print_scale
    from pretrain.planning.request import build_request

    request = build_request(
        model=model,
        nodes=nodes,
        gpus=gpus,
        tokens=tokens,
        global_batch=global_batch,
        sequence_length=sequence_length,
        economy=_economy(price, failure_hours, restart_minutes, storage_gbps),
    )
    if at_scale:
        print_scale(request)
    else:
        answer(request, explain=explain, write=write, page=html, as_json=as_json)


def _answer_without_model(
    predict: Path | None,
    flops: str | None,
    unique_tokens: str | None,
    runs: list[Path],
    html: Path | None,
    calibration: Path | None,
) -> None:
    if calibration is not None:
        from pretrain.planning.answers import print_calibration

        print_calibration(calibration)
        return
    if predict is not None:
        from pretrain.planning.predict import predict_file

        predict_file(predict, sys.stdout)
    elif flops is not None:
        from pretrain.planning.answers import print_budget

        print_budget(flops, unique_tokens)
    else:
        from pretrain.planning.answers import print_fit

        print_fit(runs, html)


def _refuse_strays(*, runs: list[Path] | None, output: Path | None, unique: str | None) -> None:
    """Options whose question was not asked."""
    if runs:
        raise typer.BadParameter(f"run folders ({runs[0]} ...) go with --fit")
    if output is not None:
        raise typer.BadParameter("--output goes with --calibrate")
    if unique is not None:
        raise typer.BadParameter("--unique-tokens goes with --flops")


def _economy(
    price: float | None, failure_hours: float | None, restart_minutes: float | None, storage_gbps: float | None
) -> dict[str, float]:
    """Those assumptions that were given."""
    given = {
        "hourly_price": price,
        "failure_hours": failure_hours,
        "restart_minutes": restart_minutes,
        "storage_bandwidth": None if storage_gbps is None else storage_gbps * 1e9,
    }
    return {name: value for name, value in given.items() if value is not None}


def _refuse_mixtures(questions: dict[str, bool], *, of_model: dict[str, object], html: Path | None) -> None:
    """One question at a time, and no option that its question would ignore."""
    asked = [name for name, is_asked in questions.items() if is_asked]
    if len(asked) != 1:
        found = " and ".join(asked) if asked else "nothing"
        raise typer.BadParameter(f"one of {', '.join(questions)} says what to plan; given: {found}")
    idle = [name for name, value in of_model.items() if value is not None and asked != ["--model"]]
    idle += ["--html"] if html is not None and asked[0] not in ("--model", "--fit") else []
    if idle:
        raise typer.BadParameter(f"{', '.join(idle)} says nothing beside {asked[0]}")
    if of_model["--at-scale"] and (html or any(of_model[name] for name in ("--explain", "--write", "--json"))):
        raise typer.BadParameter("--at-scale prints one report; it takes no --explain, --write, --html or --json")
