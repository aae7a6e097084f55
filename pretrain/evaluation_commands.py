"""`pretrain evaluate` and `pretrain quantize`: their options, parsed and passed on.

Importing this file imports no torch; the work is run_evaluation.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A run folder, a checkpoint folder, or a Hugging Face model folder.")
]
Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="A dataset, or NAME=DATASET; may be given several times. Default: the run's validation."
    ),
]
Split = Annotated[str, typer.Option(help="Which split of those datasets.")]
MaxRows = Annotated[int | None, typer.Option(min=1, help="Rows of each set; default: all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def evaluate(
    source: Source,
    data: Datasets = None,
    split: Split = "validation",
    max_rows: MaxRows = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time; numbers do not depend on it.")] = 8,
    tasks: Annotated[str | None, typer.Option(help="NAME,NAME: of lm-evaluation-harness, or task files.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Of task files; they may run code beside them.")] = None,
    task_documents: Annotated[int | None, typer.Option(min=1, help="The first ones of each task.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question of a task.")] = None,
    add_bos: Annotated[bool, typer.Option(help="Begin tasks' texts with the tokenizer's own special tokens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure loss, perplexity and bits per byte, with 95 % intervals over documents; or run tasks.

    On one rank, or under a launcher on several, with the same numbers.
    """
    from pretrain.inference.harness import TaskRequest
    from pretrain.run_evaluation import EvaluationRequest
    from pretrain.run_evaluation import evaluate as run_evaluate

    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
    request = EvaluationRequest(
        source=source,
        data=data or [],
        split=split,
        max_rows=max_rows,
        rows_at_a_time=batch_size,
        tasks=None
        if tasks is None
        else TaskRequest(names=names, folder=task_folder, documents=task_documents, shots=shots),
        adds_bos=add_bos,
    )
    for line in run_evaluate(request, as_json=as_json):
        typer.echo(line)


def quantize(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    bits: Annotated[Literal["8", "4"], typer.Option(help="Of each weight of a linear layer.")] = "8",
    group_size: Annotated[int, typer.Option(min=1, help="Inputs that share a scale, at 4 bits.")] = 32,
    data: Datasets = None,
    split: Split = "validation",
    max_rows: MaxRows = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with smaller weights, and show size, speed and perplexity before and after.

    Token table and head stay as they are. `evaluate` and `generate` take the folder.
    """
    from pretrain.inference.quantize import Quantization
    from pretrain.run_evaluation import quantize as run_quantize

    how = Quantization(bits=8 if bits == "8" else 4, group_size=group_size)
    report = run_quantize(source, output, how, data=data or [], split=split, max_rows=max_rows)
    typer.echo(json.dumps(report.to_json(), indent=2) if as_json else str(report))
