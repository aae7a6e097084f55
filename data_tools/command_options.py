"""Options that several commands take, each with its help: what they mean must not depend on the command.

Imports nothing slow: `--help` must not wait.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.choices import Backend, BadLinePolicy

_FILES = (
    "Files (.txt .jsonl .json .csv .tsv .parquet .arrow; text also .gz .zst), folders, 'patterns', folders of the "
    "datasets library, hf:NAME[:SPLIT], URLs (s3, gs, hf, http, https, file; copied into ~/.cache/athanor/inputs first)"
)
Inputs = Annotated[list[str], typer.Argument(help=f"{_FILES}, or - for standard input.")]
SharedInputs = Annotated[list[str], typer.Argument(help=f"{_FILES}; the same on every machine.")]
StdinSuffix = Annotated[str, typer.Option(help="What standard input (-) would end in as a file.")]
Output = Annotated[Path, typer.Option(help="Folder to make; it appears when it is complete.")]
Dataset = Annotated[Path, typer.Argument(help="A dataset folder, or one split of it.")]
TextKey = Annotated[str, typer.Option(help="Key of the text in a JSON line.")]
BadLine = Annotated[BadLinePolicy, typer.Option(help="What to do with a record that holds no usable text.")]
MaxDocumentBytes = Annotated[int, typer.Option(min=1, help="A longer record is a bad one; memory grows with it.")]

# Of the preparation, on one machine and on several.
TokenizerFile = Annotated[Path, typer.Option(help="tokenizer.json, a .model, a .tiktoken, or a folder with one.")]
IdKey = Annotated[str, typer.Option(help="Key of the document's name in a JSON line.")]
FRACTIONS = "0.98,0.01,0.01"
Fractions = Annotated[str, typer.Option(help="Shares of train, validation, test.")]
SplitSeed = Annotated[int, typer.Option(min=0, help="Seed of the split.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes that encode; default: one a core.")]
Library = Annotated[Backend, typer.Option(help="Library that encodes; the tokens are the same.")]
EosToken = Annotated[str | None, typer.Option(help="End of document; default: the tokenizer's own.")]
Metadata = Annotated[str, typer.Option(help="Keys to keep beside the tokens: KEY[,KEY...].")]
ShuffleSeed = Annotated[
    int | None, typer.Option(min=0, help="Shuffle all documents by this seed; default: the order of the inputs.")
]
