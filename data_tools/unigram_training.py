"""Trains unigram pieces with sentencepiece's trainer and makes a tokenizer.json of them that loses no text.

Reproducible: neither the order of hash tables nor the number of processors counts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from data_tools.choices import Digits
from data_tools.errors import UsageError
from data_tools.tokenizer_design import BYTES, TokenizerDesign

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNKNOWN = "<unk>"
_SPACE = "▁"
_ASCII = "".join(chr(code) for code in range(33, 127))
_THREADS = 16  # the sums of the trainer depend on it: one number for every machine
_LONGEST_SENTENCE_BYTES = 4096  # the trainer skips longer ones: they are cut
_CUT = "\x01"  # told to the trainer as the border of pieces
_DIGIT_GROUPS = re.compile(r"\d{1,3}")
# Byte pieces must lose against any spelling in known characters, or the text "<0x41>" would become one byte.
_BYTE_PIECE_SCORE = -1000.0
_NEW_LINES = [("\n" * count, -1.0) for count in (1, 2, 4, 8)]  # alone among themselves: the fewest pieces win


def train_unigram(texts: Iterable[str], design: TokenizerDesign) -> Tokenizer:
    """Train on texts; the memory is that of their different words.

    Raises:
        UsageError: the vocabulary cannot hold the characters of the texts.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    fixed = len(design.all_special_tokens()) + len(design.space_runs()) + BYTES + len(_NEW_LINES)
    learnt = _learn(_sentences(texts, design), design.vocabulary_size - fixed)
    byte_pieces = [(f"<0x{byte:02X}>", _BYTE_PIECE_SCORE) for byte in range(BYTES)]
    pieces = [(_UNKNOWN, 0.0), *learnt, *_NEW_LINES, *byte_pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    # No prefix space and no normaliser, so that decoding gives the very text back (U+2581 alone becomes a space).
    steps = [
        pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
        pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never"),
        *design.digit_steps(),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(_SPACE, " ")])
    design.add_tokens(tokenizer)  # not pieces, which text could match
    return tokenizer


def _learn(sentences: Iterator[str], count: int) -> list[tuple[str, float]]:
    """Return at most so many pieces and their scores, best first."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="unigram",
            vocab_size=count,
            hard_vocab_limit=False,  # less text, fewer pieces
            num_threads=_THREADS,
            required_chars=_ASCII,
            character_coverage=0.9995,  # the rest is spelt in bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=_LONGEST_SENTENCE_BYTES * 2,
            pretokenization_delimiter=_CUT,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(
            f"sentencepiece cannot learn {count} pieces from this text ({str(error).strip().splitlines()[-1]})",
            "a vocabulary with room for every character of the text",
            "ask for a larger --vocab-size",
        ) from error
    trained = SentencePieceProcessor(model_proto=model.getvalue())
    numbers = range(1, trained.GetPieceSize())
    return [(trained.IdToPiece(number), trained.GetScore(number)) for number in numbers]


def _sentences(texts: Iterable[str], design: TokenizerDesign) -> Iterator[str]:
    """Yield the lines of all texts, long ones in parts, cut as the tokenizer will cut them."""
    for text in texts:
        for line in text.replace(_CUT, " ").splitlines():
            for first in range(0, len(line), _LONGEST_SENTENCE_BYTES // 4):
                part = line[first : first + _LONGEST_SENTENCE_BYTES // 4]
                if design.digits is Digits.INDIVIDUAL:
                    part = re.sub(r"\d", rf"{_CUT}\g<0>{_CUT}", part)
                elif design.digits is Digits.GROUPS_OF_3:
                    part = _DIGIT_GROUPS.sub(rf"{_CUT}\g<0>{_CUT}", part)
                if part.strip():
                    yield part
