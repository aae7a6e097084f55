"""Trains a tokenizer on a sample of text, saves it as a folder that AutoTokenizer loads, and says how well it packs.

Encoding documents with the result is tokenizer.py's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.choices import LONGEST_DOCUMENT_BYTES, SAMPLE_BYTES, BadLinePolicy, TokenizerType
from data_tools.corpus import Corpus, input_facts
from data_tools.documents import Keys
from data_tools.errors import InputError
from data_tools.input_files import find_inputs
from data_tools.pieces import Piece
from data_tools.publish import refuse_filled, staged_output
from data_tools.text_sample import TextSample, draw_sample
from data_tools.tokenizer import TOKENIZER_FILE, DocumentTokenizer, load_tokenizer, write_config
from data_tools.tokenizer_design import EOS_TOKENS, TokenizerDesign
from data_tools.unigram_training import train_unigram

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RECORD_FILE = "training.json"  # what the tokenizer was trained on, and how well it packs
_MEASURED_BYTES = 1 << 24  # of every source, to say how well it packs
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What decides the tokenizer, beside its inputs."""

    design: TokenizerDesign
    text_key: str = "text"
    on_bad_line: BadLinePolicy = BadLinePolicy.FAIL
    sample_bytes: int = SAMPLE_BYTES  # of text, at most
    sample_documents: int | None = None  # at most
    seed: int = 0  # of the sample
    max_document_bytes: int = LONGEST_DOCUMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class Density:
    """How many bytes of UTF-8 a token stands for, in the sampled text of one input."""

    source: str
    bytes: int
    tokens: int
    reference_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """A tokenizer that was made, or found made."""

    tokenizer: DocumentTokenizer
    record: dict[str, Any]
    reused: bool


def make_tokenizer(
    inputs: Sequence[str | Path | Piece], request: TrainingRequest, output: Path, reference: Path | None = None
) -> TrainedTokenizer:
    """Train on a sample of the inputs and publish the folder, unless an equal earlier run has made it.

    Raises:
        UsageError: the output holds something else, or the design cannot be.
        InputError: the inputs cannot be read, or hold no text.
    """
    request.design.check()
    found = [(str(word), piece) for word in inputs for piece in find_inputs([word])]
    pieces = find_inputs([piece for _, piece in found])  # all together: none may be there twice
    known = None if reference is None else load_tokenizer(reference)
    facts = {
        "inputs": input_facts(pieces),
        "training": json.loads(json.dumps(asdict(request))),
        "reference": None if known is None else known.identity.sha256,
    }
    record = _made_record(output, facts)
    if record is not None:
        return TrainedTokenizer(tokenizer=load_tokenizer(output), record=record, reused=True)
    refuse_filled(output)
    with staged_output(output) as staging:
        keys = Keys(text=request.text_key, longest_bytes=request.max_document_bytes)
        corpus = Corpus(pieces=pieces, keys=keys, on_bad_line=request.on_bad_line)
        corpus.quarantine = staging / "quarantine.jsonl"
        sample = draw_sample(
            corpus.documents(),
            most_bytes=request.sample_bytes,
            most_documents=request.sample_documents,
            seed=request.seed,
        )
        save_tokenizer(train_on((sampled.text for sampled in sample.texts), request.design), request.design, staging)
        made = load_tokenizer(staging)
        sources = [word for word, _ in found]
        record = {
            "request": facts,
            "sha256": made.identity.sha256,
            "corpus": {"documents": sample.documents, "bytes": sample.bytes},
            "sample": {
                "documents": len(sample.texts),
                "bytes": sum(len(sampled.text.encode("utf-8")) for sampled in sample.texts),
            },
            "dropped": dict(corpus.dropped),
            "densities": [asdict(density) for density in _measure(sample, sources, made, known)],
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (staging / RECORD_FILE).write_text(text, encoding="utf-8")
    return TrainedTokenizer(tokenizer=load_tokenizer(output), record=record, reused=False)


def train_tokenizer(texts: Iterable[str], kind: TokenizerType, vocabulary_size: int) -> Tokenizer:
    """Train a tokenizer of the plainest design; see `train_on`."""
    return train_on(texts, TokenizerDesign(kind=kind, vocabulary_size=vocabulary_size))


def train_on(texts: Iterable[str], design: TokenizerDesign) -> Tokenizer:
    """Train a tokenizer with at most the tokens asked for, special ones included.

    Raises:
        UsageError: the design cannot be.
        InputError: there is no text.
    """
    design.check()
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise InputError("the inputs hold no text", "at least one document", "check the inputs and --text-key")
    train = _train_bpe if design.kind is TokenizerType.BPE else train_unigram
    texts = chain([first], texts)
    return train(_parts(texts) if design.space_runs() else texts, design)


def save_tokenizer(tokenizer: Tokenizer, design: TokenizerDesign, folder: Path) -> None:
    """Write the files that AutoTokenizer needs."""
    tokenizer.save(str(folder / TOKENIZER_FILE))
    write_config(folder, EOS_TOKENS[design.kind])


def _train_bpe(texts: Iterable[str], design: TokenizerDesign) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = design.word_pattern()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = words
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=design.vocabulary_size - len(design.space_runs()),
        special_tokens=design.all_special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    design.add_tokens(tokenizer)
    return tokenizer


def _parts(texts: Iterable[str]) -> Iterator[str]:
    """Yield what lies between runs of spaces: they are tokens already, and nothing is to be learnt from them."""
    for text in texts:
        yield from filter(None, re.split(" {2,}", text))


def _measure(
    sample: TextSample, sources: Sequence[str], made: DocumentTokenizer, reference: DocumentTokenizer | None
) -> list[Density]:
    """Count bytes and tokens of the sampled text of every input, of long ones the beginning."""
    texts: dict[str, list[str]] = {source: [] for source in sources}
    sizes: Counter[str] = Counter()
    for sampled in sample.texts:
        source = sources[sampled.piece]
        if sizes[source] < _MEASURED_BYTES:
            texts[source].append(sampled.text)
            sizes[source] += len(sampled.text.encode("utf-8"))
    return [
        Density(
            source=source,
            bytes=sizes[source],
            tokens=_count_tokens(texts[source], made),
            reference_tokens=None if reference is None else _count_tokens(texts[source], reference),
        )
        for source in texts
        if texts[source]
    ]


def _count_tokens(texts: Sequence[str], tokenizer: DocumentTokenizer) -> int:
    """Count tokens without the ones that end documents."""
    batches = (texts[first : first + _BATCH] for first in range(0, len(texts), _BATCH))
    return sum(len(ids) - 1 for batch in batches for ids in tokenizer.encode_documents(batch))


def total_density(densities: Sequence[Density]) -> Density:
    """Add up all sources."""
    total = Density(source="all", bytes=sum(p.bytes for p in densities), tokens=sum(p.tokens for p in densities))
    references = [density.reference_tokens for density in densities]
    return replace(total, reference_tokens=None if None in references else sum(filter(None, references)))


def _made_record(output: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the output if it holds the tokenizer that this request made, unchanged."""
    try:
        record: dict[str, Any] = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))
        if record["request"] == facts and record["sha256"] == load_tokenizer(output).identity.sha256:
            return record
    except (OSError, ValueError, KeyError, InputError):
        return None
    return None
