"""Standard input as an input: put in a file beside the output first, so that workers share it and reruns go on.

The file is named after its content: a run that was killed is continued by giving the same content again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from xxhash import xxh3_128

from data_tools.errors import InputError, UsageError
from data_tools.file_kinds import kind_of, known_suffixes
from data_tools.pieces import Piece

STANDARD_INPUT = "-"
_BLOCK_BYTES = 1 << 20


@contextmanager
def with_standard_input(
    inputs: Sequence[str], stream: IO[bytes], output: Path, suffix: str
) -> Iterator[list[str | Piece]]:
    """Give the inputs with `-` replaced by a file that holds what the stream gave; it is gone afterwards.

    Args:
        inputs: words of the command line.
        stream: read to its end if `-` is among the inputs.
        output: the file is made beside it.
        suffix: what the stream's content would end in as a file.

    Raises:
        UsageError: `-` is given twice, the suffix is not known, or the stream is a terminal.
        InputError: the stream is empty.
    """
    if STANDARD_INPUT not in inputs:
        yield list(inputs)
        return
    if inputs.count(STANDARD_INPUT) > 1:
        raise UsageError("standard input (-) is given twice", "every input once", "give - once")
    if kind_of(Path(f"-{suffix}")) is None:
        raise UsageError(f"--stdin-suffix {suffix}", known_suffixes(), "say what its content would end in as a file")
    if stream.isatty():
        raise UsageError("standard input (-) is a terminal", "a pipe or a file", "pipe text into the command")
    file = _spool(stream, output, suffix)
    try:
        yield [Piece(file=file, name=STANDARD_INPUT) if word == STANDARD_INPUT else word for word in inputs]
    finally:
        file.unlink(missing_ok=True)


def _spool(stream: IO[bytes], output: Path, suffix: str) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.parent / f".{output.name}.stdin-{os.getpid()}.tmp"
    digest = xxh3_128()
    try:
        with staged.open("wb") as file:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
            size = file.tell()
        if not size:
            raise InputError("standard input (-) is empty", "at least one document", "pipe text into the command")
        # no two runs meet: what has the same name has the same content
        return staged.rename(output.parent / f".{output.name}.stdin-{digest.hexdigest()}{suffix}")
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
