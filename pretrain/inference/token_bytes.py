"""How many bytes of text each token of a vocabulary stands for, so that losses of different tokenizers compare.

Owns the reading of token spellings; what is divided by it is evaluate.py's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPACE = "▁"  # how sentencepiece spells it
SINGLE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> NDArray[np.int64] | None:
    """UTF-8 bytes of the text of each id, (size,); special tokens and ids that mean nothing have 0.

    None for kinds of tokenizers whose tokens do not say it (not byte-level, not sentencepiece).
    """
    kinds = _decoder_kinds(tokenizer)
    count: Callable[[str], int]
    if "ByteLevel" in kinds:
        count = len  # each character of a spelling stands for one byte
    elif kinds & {"Metaspace", "ByteFallback"}:
        count = _count_sentencepiece
    else:
        logger.warning("bytes of tokens are not known for this tokenizer: %s", ", ".join(sorted(kinds)) or "no decoder")
        return None
    found = np.zeros(size, np.int64)
    added = tokenizer.added_tokens_decoder
    for number, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))):
        if number in added:
            found[number] = 0 if added[number].special else len(piece.encode())
        elif piece is not None:
            found[number] = count(piece)
    return found


def _count_sentencepiece(piece: str) -> int:
    return 1 if SINGLE_BYTE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return {part["type"] for part in (decoder, *decoder.get("decoders", ())) if "type" in part}
