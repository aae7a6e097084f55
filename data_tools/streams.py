"""Opens a file so that its uncompressed bytes are read one after another, and names the file that is damaged.

Knows nothing of lines or documents.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from data_tools.errors import InputError
from data_tools.file_kinds import Compression

_BUFFER_BYTES = 1 << 18


def open_bytes(opened: IO[bytes], compression: Compression) -> IO[bytes]:
    """Return the uncompressed bytes of an open file; read within `decompression_of`."""
    if compression is Compression.GZIP:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=opened))
    if compression is Compression.ZSTD:
        import pyarrow

        stream: Any = pyarrow.CompressedInputStream(opened, "zstd")
        return cast("IO[bytes]", io.BufferedReader(stream, _BUFFER_BYTES))
    return opened


@contextmanager
def decompression_of(path: Path | str) -> Iterator[None]:
    """Turn what a damaged compressed file raises into an error that names it.

    Raises:
        InputError: the file cannot be decompressed.
    """
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise InputError(
            f"{path} cannot be decompressed ({error})", "a whole file", "copy or download the file again"
        ) from error
