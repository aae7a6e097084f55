"""Opens the datasets of a run and checks, before the first step, that they fit each other and the model.

Does not decide which rows are read when (training_rows.py), nor read any token itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.token_shards import (
    Row,
    ShardError,
    TokenDataset,
    TokenizerIdentity,
    find_split,
    open_dataset,
    verify_dataset,
)
from pretrain.config_data import DataSection, SpanCorruptionSection
from pretrain.data.fill_in_the_middle import FillInTheMiddle
from pretrain.data.mixture import Phase
from pretrain.data.mixture_plan import (
    first_sample,
    initial_weights,
    mixture_problems,
    phase_weights,
    row_limit,
    source_name,
)
from pretrain.data.sentinels import build_fill_in_the_middle
from pretrain.data.span_corruption import SpanCorruption
from pretrain.data.staging import StagedData, stage_remote
from pretrain.errors import DataError, Problem


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """A dataset that was checked."""

    name: str
    weight: float  # relative to the other training sources at the start; 1 for a validation set
    dataset: TokenDataset
    sequence_length: int  # tokens a row
    rows: int
    span_corruption: SpanCorruption | None = None  # of what an encoder-decoder reads
    row_limit: int | None = None  # rows that it may give to training; None: it is read again and again

    def row(self, index: int) -> Row:
        """Read one row, as `read` does."""
        return self.read((index,))[0]

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Read rows; safe to call from several threads.

        Raises:
            DataError: a shard was damaged or taken away since it was checked.
        """
        try:
            return self.dataset.rows(indices, self.sequence_length)
        except (ShardError, OSError) as error:
            if len(indices) > 1:
                return [self.row(index) for index in indices]  # one of them raises, by its number
            found = error.found if isinstance(error, ShardError) else str(error)
            change = "restore the files, then resume: the row is read again"
            problem = Problem(f"{self.name}, row {indices[0]}: {found}", "shards that stay whole", change)
            raise DataError(problem) from error


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """All datasets of a run, of one tokenizer."""

    training: tuple[OpenedSource, ...]
    validation: Mapping[str, OpenedSource]
    phases: tuple[Phase, ...] = ()  # other weights of the training sources, later on
    fill_in_the_middle: FillInTheMiddle | None = None  # of the training sources
    staged: StagedData = StagedData()  # what is behind URLs; held, so that nobody evicts it while it is read


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    place: str  # the key of the configuration, for messages
    name: str
    path: str
    split: str


def open_datasets(
    data: DataSection,
    *,
    sequence_length: int,
    vocabulary_size: int,
    check_hashes: bool | None = None,
    keeps_packed_length: bool = False,
) -> OpenedData:
    """Open the training sources and validation sets; every rank must call where some are behind URLs.

    Args:
        data: what to open.
        sequence_length: tokens of a row.
        keeps_packed_length: packed datasets are read as they were packed, whatever `sequence_length` says.
        vocabulary_size: of the model; it may be larger than the datasets'.
        check_hashes: read every byte and compare; default: as `data.verify` says. One rank of a node is enough.

    Raises:
        DataError: with every problem of every dataset.
    """
    if check_hashes is None:
        check_hashes = data.verify == "hashes"
    staged = stage_remote(data)
    wanted = [*_training_sources(data), *_validation_sets(data)]
    problems = mixture_problems(data)
    opened: dict[str, OpenedSource] = {}
    for source in wanted:
        try:
            local = replace(source, path=staged.local(source.path))
            opened[source.place] = _open(
                local, sequence_length, check_hashes=check_hashes, keeps_packed_length=keeps_packed_length
            )
        except DataError as error:
            problems += error.problems
    problems += _vocabulary_problems(opened, vocabulary_size)
    if data.span_corruption is not None and opened:
        opened = _with_spans(opened, data.span_corruption)
        problems += _sentinel_problems(opened, vocabulary_size)
    problems += _tokenizer_problems(opened, data.tokenizer)
    fill_in_the_middle = None
    try:
        if data.fill_in_the_middle is not None and opened:
            dataset = next(iter(opened.values())).dataset  # all have one tokenizer
            fill_in_the_middle = build_fill_in_the_middle(data.fill_in_the_middle, dataset, data.tokenizer)
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(*problems)
    training = [opened[source.place] for source in wanted if source.split == "train"]
    weights = initial_weights(data, [source.dataset.token_count for source in training])
    return OpenedData(
        training=tuple(
            replace(source, weight=weight, row_limit=row_limit(asked, source.rows))
            for source, weight, asked in zip(training, weights, data.sources, strict=True)
        ),
        validation={source.name: opened[source.place] for source in wanted if source.split == "validation"},
        phases=_phases(data, sequence_length),
        fill_in_the_middle=fill_in_the_middle,
        staged=staged,
    )


def _phases(data: DataSection, sequence_length: int) -> tuple[Phase, ...]:
    """Later weights by the row that they begin with; of two that begin with the same one, the second holds."""
    by_sample = {first_sample(phase, sequence_length): phase_weights(data, phase) for phase in data.mixture.phases}
    return tuple(Phase(first_sample=sample, weights=weights) for sample, weights in by_sample.items())


def _training_sources(data: DataSection) -> Iterator[_Wanted]:
    for index, source in enumerate(data.sources):
        place = "data.train" if isinstance(data.train, str) else f"data.train[{index}]"
        yield _Wanted(place=place, name=source_name(source), path=source.path, split="train")


def _validation_sets(data: DataSection) -> Iterator[_Wanted]:
    for name, path in data.validation.items():
        yield _Wanted(place=f"data.validation.{name}", name=name, path=path, split="validation")


def _open(
    source: _Wanted, sequence_length: int, *, check_hashes: bool, keeps_packed_length: bool = False
) -> OpenedSource:
    try:
        folder = find_split(source.path, source.split)
        dataset = open_dataset(folder)
        if keeps_packed_length:
            sequence_length = dataset.sequence_length or sequence_length
        rows = dataset.row_count(sequence_length)
        faults = verify_dataset(folder) if check_hashes else []
    except ShardError as error:
        raise DataError(Problem(f"{source.place}: {error.found}", error.allowed, error.change)) from error
    except OSError as error:
        found = f"{source.place}: {source.path} cannot be read ({error})"
        raise DataError(Problem(found, "a readable dataset folder", "check the path and its permissions")) from error
    problems = [
        Problem(f"{source.place}: {fault}", "what the manifest records", "restore the file, or make the dataset again")
        for fault in faults
    ]
    if rows == 0:
        found = f"{source.place}: {folder} holds no tokens"
        problems.append(Problem(found, "at least one document", "prepare it from texts, or with a larger split"))
    if problems:
        raise DataError(*problems)
    return OpenedSource(name=source.name, weight=1.0, dataset=dataset, sequence_length=sequence_length, rows=rows)


def _vocabulary_problems(opened: Mapping[str, OpenedSource], vocabulary_size: int) -> Iterator[Problem]:
    for place, source in opened.items():
        needed = source.dataset.manifest.vocabulary_size
        if needed > vocabulary_size:
            found = f"{place} has a vocabulary of {needed} ids, the model one of {vocabulary_size}"
            yield Problem(found, f"a model with at least {needed}", f"set model.vocab_size={needed}")


def _with_spans(opened: Mapping[str, OpenedSource], section: SpanCorruptionSection) -> dict[str, OpenedSource]:
    manifest = next(iter(opened.values())).dataset.manifest  # all have one tokenizer
    corruption = SpanCorruption(section=section, first_sentinel=manifest.vocabulary_size, eos_id=manifest.eos_id)
    return {place: replace(source, span_corruption=corruption) for place, source in opened.items()}


def _sentinel_problems(opened: Mapping[str, OpenedSource], vocabulary_size: int) -> Iterator[Problem]:
    longest = max(opened.values(), key=lambda source: source.sequence_length)
    if longest.sequence_length < 2:
        yield Problem("a row of one token has no span to take out", "two or more", "raise batch.sequence_length")
        return
    assert longest.span_corruption is not None, "all were given one"
    _, spans = longest.span_corruption.section.counts(longest.sequence_length)
    needed = longest.span_corruption.first_sentinel + spans
    if needed > vocabulary_size:
        yield Problem(
            f"{longest.sequence_length} tokens need sentinels up to id {needed - 1}, the model has {vocabulary_size}",
            f"a model with at least {needed}",
            f"set model.vocab_size={needed}, or the next number that your device likes",
        )


def _tokenizer_problems(opened: Mapping[str, OpenedSource], tokenizer: str | None) -> Iterator[Problem]:
    manifests = {place: source.dataset.manifest for place, source in opened.items()}
    if not manifests:
        return
    first_place, first = next(iter(manifests.items()))
    for place, manifest in manifests.items():
        theirs, ours = (manifest.tokenizer.sha256, manifest.eos_id), (first.tokenizer.sha256, first.eos_id)
        if theirs != ours:
            found = (
                f"{place} was made with tokenizer {manifest.tokenizer.name} ({theirs[0][:12]}, EOS {theirs[1]}), "
                f"{first_place} with {first.tokenizer.name} ({ours[0][:12]}, EOS {ours[1]})"
            )
            yield Problem(
                found, "one tokenizer and one EOS id for all datasets", f"prepare {place} again with the other"
            )
    if tokenizer is not None:
        yield from _given_tokenizer_problems(Path(tokenizer), first_place, first.tokenizer)


def _given_tokenizer_problems(path: Path, place: str, identity: TokenizerIdentity) -> Iterator[Problem]:
    file, wanted = path / identity.file if path.is_dir() else path, identity.sha256
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        yield Problem(
            f"data.tokenizer: {file} cannot be read ({error})", f"{identity.file}, or its folder", "check the path"
        )
        return
    if found != wanted:
        yield Problem(
            f"data.tokenizer: {file} has sha256 {found[:12]}, {place} was made with {wanted[:12]}",
            "the tokenizer that made the datasets",
            "give that one, or leave data.tokenizer out",
        )
