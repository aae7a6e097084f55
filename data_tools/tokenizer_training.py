"""Trains a tokenizer on text and saves it as a folder that AutoTokenizer loads.

Encoding documents with the result is tokenizer.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.choices import TokenizerType
from data_tools.corpus import Corpus, input_facts
from data_tools.errors import InputError, UsageError
from data_tools.publish import refuse_filled, staged_output
from data_tools.tokenizer import TOKENIZER_FILE, DocumentTokenizer, load_tokenizer, write_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256
RECORD_FILE = "training.json"  # what the tokenizer was trained on

SMALLEST_VOCABULARY = {TokenizerType.BPE: BYTES + 1, TokenizerType.SENTENCEPIECE: 2 * BYTES}
EOS_TOKENS = {TokenizerType.BPE: "<|endoftext|>", TokenizerType.SENTENCEPIECE: "</s>"}
_ASCII = [chr(code) for code in range(32, 127)]
# Byte pieces must lose against any spelling in known characters, or the text "<0x41>" would become one byte.
_BYTE_PIECE_SCORE = -1000.0


def make_tokenizer(
    corpus: Corpus, kind: TokenizerType, vocabulary_size: int, output: Path
) -> tuple[DocumentTokenizer, bool]:
    """Train on a corpus and publish the folder; return the tokenizer and whether an equal earlier run had made it.

    Raises:
        UsageError: the output holds something else, or the vocabulary is too small.
        InputError: the corpus cannot be read or is empty.
    """
    request = {"inputs": input_facts(corpus.pieces), "type": kind.value, "vocabulary_size": vocabulary_size}
    if _is_made(output, request):
        return load_tokenizer(output), True
    refuse_filled(output)
    with staged_output(output) as staging:
        corpus.quarantine = staging / "quarantine.jsonl"
        trained = train_tokenizer((document.text for _, document in corpus.documents()), kind, vocabulary_size)
        trained.save(str(staging / TOKENIZER_FILE))
        write_config(staging, EOS_TOKENS[kind])
        made = load_tokenizer(staging)
        record = {"request": request, "sha256": made.identity.sha256}
        (staging / RECORD_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return load_tokenizer(output), False


def train_tokenizer(texts: Iterable[str], kind: TokenizerType, vocabulary_size: int) -> Tokenizer:
    """Train a tokenizer with at most this many tokens, the end-of-document token included.

    Raises:
        UsageError: the vocabulary cannot hold all bytes.
        InputError: there is no text.
    """
    if vocabulary_size < SMALLEST_VOCABULARY[kind]:
        raise UsageError(
            f"--vocab-size {vocabulary_size} for --type {kind.value}",
            f"at least {SMALLEST_VOCABULARY[kind]}: every byte needs a token",
            "ask for a larger vocabulary",
        )
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise InputError("the inputs hold no text", "at least one document", "check the inputs and --text-key")
    train = _train_bpe if kind is TokenizerType.BPE else _train_unigram
    return train(chain([first], texts), vocabulary_size)


def _train_bpe(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[EOS_TOKENS[TokenizerType.BPE]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_unigram(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    # No prefix space and no normaliser, so that decoding gives the very text back (U+2581 alone becomes a space).
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary_size - BYTES - 1,
        special_tokens=["<unk>"],
        unk_token="<unk>",  # noqa: S106 - the name of a token, not a password
        initial_alphabet=_ASCII,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content["model"]["vocab"] += [[f"<0x{byte:02X}>", _BYTE_PIECE_SCORE] for byte in range(BYTES)]
    content["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    tokenizer.add_special_tokens([EOS_TOKENS[TokenizerType.SENTENCEPIECE]])  # not a piece that text could match
    return tokenizer


def _is_made(output: Path, request: dict[str, Any]) -> bool:
    """Whether the output holds the tokenizer that this request made, unchanged."""
    try:
        record = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))
        return bool(record["request"] == request and record["sha256"] == load_tokenizer(output).identity.sha256)
    except (OSError, ValueError, KeyError, InputError):
        return False
