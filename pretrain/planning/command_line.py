"""`pretrain plan`: its options, and which question each asks. Parse and call; the answers are the other files'.

Importing this file imports nothing heavy, so that the command line's help stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    predict: Annotated[
        Path | None,
        typer.Option(metavar="RUNS.csv", help="Predict the runs of a CSV, written back on stdout."),
    ] = None,
) -> None:
    """Plan a run before a GPU is rented.

    Which layouts fit, how fast each is, and what training costs; or what published runs should have reached.
    """
    import sys

    if predict is not None:
        from pretrain.planning.predict import predict_file

        predict_file(predict, sys.stdout)
        return
    raise typer.BadParameter("say what to plan: --predict RUNS.csv")
