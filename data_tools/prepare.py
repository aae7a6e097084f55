"""From files of text to a dataset folder: read, split by hash, encode, write, publish.

The parts do the work (corpus, tokenizer, shard_writer, publish); this file owns their order and the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from data_tools.choices import BadLinePolicy
from data_tools.corpus import Corpus
from data_tools.errors import InputError, UsageError
from data_tools.manifest import Manifest, SourceRange, load_manifest
from data_tools.publish import Made, is_finished, staged_output
from data_tools.readers import Document, find_inputs
from data_tools.shard_verify import split_folders
from data_tools.shard_writer import SHARD_TOKENS, ShardWriter, token_dtype
from data_tools.tokenizer import DocumentTokenizer, load_tokenizer

SPLITS = ("train", "validation", "test")
BATCH_CHARACTERS = 1 << 22  # encoded at a time: bounds the memory


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What decides the bytes of the dataset, beside its inputs and tokenizer."""

    text_key: str = "text"
    id_key: str = "id"
    fractions: tuple[float, ...] = (0.98, 0.01, 0.01)  # of train, validation, test
    seed: int = 0  # of the split
    on_bad_line: BadLinePolicy = BadLinePolicy.FAIL
    eos_token: str | None = None  # None: as the tokenizer's configuration says
    shard_tokens: int = SHARD_TOKENS


def parse_fractions(text: str) -> tuple[float, ...]:
    """Read "0.98,0.01,0.01": the shares of train, validation and test.

    Raises:
        UsageError: there are not one to three numbers, or they do not add up to 1.
    """
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = ()
    positive = all(fraction >= 0 for fraction in fractions) and fractions[:1] > (0,)
    if not 1 <= len(fractions) <= len(SPLITS) or not positive or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(
            f"--split {text}",
            "one to three shares for train, validation, test that add up to 1",
            "write for example --split 0.98,0.01,0.01",
        )
    return fractions


def split_of(text: str, fractions: Sequence[float], seed: int) -> str:
    """Return the split of a text: a function of its bytes alone, so equal texts never part and new data moves none."""
    share = xxh3_64_intdigest(text.encode("utf-8"), seed) / 2**64
    for name, fraction in zip(SPLITS, fractions, strict=False):
        share -= fraction
        if share < 0:
            return name
    return SPLITS[0]  # the rounding error at the very end


def prepare(inputs: Sequence[Path], tokenizer: Path, output: Path, options: PrepareOptions) -> Made:
    """Make a dataset folder with a subfolder per split and the tokenizer; it appears when it is complete.

    Raises:
        InputError: there is no usable text, a bad record under the policy fail, or an unusable tokenizer.
        UsageError: the output holds something else.
        StorageError: another run is writing the output.
    """
    loaded = load_tokenizer(tokenizer, options.eos_token)
    corpus = Corpus(
        files=find_inputs(inputs), text_key=options.text_key, id_key=options.id_key, on_bad_line=options.on_bad_line
    )
    request = {
        "inputs": corpus.facts(),
        "tokenizer": asdict(loaded.identity),
        "options": {**asdict(options), "on_bad_line": options.on_bad_line.value},
    }
    if is_finished(output, request):
        return Made(manifests={path.name: load_manifest(path) for path in split_folders(output)}, reused=True)
    draft = Manifest(
        kind="documents",
        dtype=token_dtype(loaded.vocabulary_size),
        split="",
        tokenizer=loaded.identity,
        vocabulary_size=loaded.vocabulary_size,
        eos_id=loaded.eos_id,
        command=_command(inputs, tokenizer, options),
        request=request,
    )
    with staged_output(output) as staging:
        corpus.quarantine = staging / "quarantine.jsonl"
        loaded.copy_to(staging / "tokenizer")
        return Made(manifests=_write_splits(corpus, loaded, draft, staging, options))


def _write_splits(
    corpus: Corpus, tokenizer: DocumentTokenizer, draft: Manifest, staging: Path, options: PrepareOptions
) -> dict[str, Manifest]:
    training_counts = np.zeros(tokenizer.vocabulary_size, np.int64)
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for batch in _batches(corpus.documents()):
            encoded = tokenizer.encode_documents([document.text for document in batch])
            for_training = [np.empty(0, np.int32)]
            for document, tokens in zip(batch, encoded, strict=True):
                name = split_of(document.text, options.fractions, options.seed)
                if name not in writers:
                    writer = ShardWriter(staging / name, draft.for_split(name), shard_tokens=options.shard_tokens)
                    writers[name] = stack.enter_context(writer)
                source = SourceRange(file=document.file, start=document.start, stop=document.stop)
                writers[name].append(tokens, source)
                if name == SPLITS[0]:
                    for_training.append(tokens)
            training_counts += np.bincount(np.concatenate(for_training), minlength=tokenizer.vocabulary_size)
        if SPLITS[0] not in writers:
            raise _nothing_to_train_on(corpus, has_documents=bool(writers))
        entropy = entropy_nats(training_counts)
        return {
            name: writers[name].finish(
                dropped=corpus.dropped, dropped_examples=corpus.examples, unigram_entropy_nats=entropy
            )
            for name in SPLITS
            if name in writers
        }


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """Return the entropy of one token, in nats, from the count of each."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _nothing_to_train_on(corpus: Corpus, *, has_documents: bool) -> InputError:
    found = "no document fell into the training split" if has_documents else "the inputs hold no document"
    if corpus.examples:
        found += f" ({sum(corpus.dropped.values())} records dropped, the first: {corpus.examples[0]})"
    return InputError(
        found, "at least one document for training", "check the inputs, --text-key and --split, or give more text"
    )


def _command(inputs: Sequence[Path], tokenizer: Path, options: PrepareOptions) -> str:
    """Return the words that decide the bytes; where they went and by how many workers is not among them."""
    words: list[Any] = ["data-tools", "prepare", *inputs, "--tokenizer", tokenizer]
    words += ["--text-key", options.text_key, "--id-key", options.id_key]
    words += ["--split", ",".join(map(str, options.fractions)), "--seed", options.seed]
    words += ["--on-bad-line", options.on_bad_line.value]
    return " ".join(map(str, words))
