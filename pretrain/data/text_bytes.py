"""How many bytes of text a token of a dataset stands for: what turns nats a token into bits a byte.

Measured on a sample of rows, by decoding them. Trains on nothing and encodes nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from pretrain.data.open_datasets import OpenedSource

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 1 << 16


def bytes_per_token(source: OpenedSource, tokenizer_folder: Path) -> float | None:
    """UTF-8 bytes of the text over the tokens, end-of-document tokens included; None where nothing can decode.

    Args:
        source: rows of it are taken at even distances, so that a sorted corpus counts as a whole.
        tokenizer_folder: of the run.
    """
    from tokenizers import Tokenizer

    file = tokenizer_folder / "tokenizer.json"
    if not file.is_file():
        logger.info("no bits per byte of %s: %s is not there", source.name, file)
        return None
    tokenizer = Tokenizer.from_file(str(file))
    count = min(source.rows, max(1, SAMPLE_TOKENS // source.sequence_length))
    places = np.unique(np.linspace(0, source.rows - 1, count, dtype=np.int64))
    rows = source.read(places.tolist())
    texts = tokenizer.decode_batch([row.tokens[: row.used].tolist() for row in rows], skip_special_tokens=True)
    text_bytes = sum(len(text.encode()) for text in texts)
    tokens = sum(row.used for row in rows)
    return text_bytes / tokens if text_bytes and tokens else None
