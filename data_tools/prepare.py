"""From files of text to a dataset folder: cut in tasks, encode each, put their files together as shards, publish.

The parts do the work (ranges, worker_pool, task_encoding, shard_assembly, publish); this file owns their order, and
what a run that was stopped need not do again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from data_tools.choices import LONGEST_DOCUMENT_BYTES, Backend, BadLinePolicy
from data_tools.corpus import input_facts
from data_tools.document_tokenizer import DocumentTokenizer
from data_tools.documents import Keys
from data_tools.dropped_records import count_dropped, gather_quarantine
from data_tools.duplicate_ids import find_duplicate_ids
from data_tools.errors import DataToolsError, InputError, UsageError
from data_tools.input_files import find_inputs
from data_tools.journal import Journal
from data_tools.manifest import Manifest, ShardRecord, TokenizerIdentity, load_manifest, save_manifest, sync_folder
from data_tools.pieces import Piece
from data_tools.preparation_report import write_report
from data_tools.publish import Made, is_finished, staged_output
from data_tools.ranges import RANGE_BYTES, Task, plan_tasks
from data_tools.shard_assembly import SplitAssembly
from data_tools.shard_verify import split_folders
from data_tools.shard_writer import SHARD_TOKENS, token_dtype
from data_tools.shuffle import ShuffledAssembly
from data_tools.streamed_assembly import assemble_while_encoding
from data_tools.task_encoding import SPLITS, EncodingOptions, TaskResult, split_numbers, task_file
from data_tools.task_shares import adopt_shares, remove_shares
from data_tools.tokenizer import load_tokenizer
from data_tools.worker_host import WorkerHost, loading_host
from data_tools.worker_pool import HANG_SECONDS, EncodingPool, Finished

logger = logging.getLogger(__name__)

WORK_FOLDER = "work"  # in the staging folder: the files of tasks, and the journal
_DONE_FOLDER = "done"  # what it is called when all is written: files that are being removed are nothing to go on with


class Progress(Protocol):
    """Told how far the encoding is."""

    def start(self, total_bytes: int, finished_bytes: int) -> None:
        """The inputs have this many bytes on the disk; an earlier run has encoded some of them."""

    def advance(self, read_bytes: int, tokens: int) -> None:
        """So many more were read and made."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What decides the bytes of the dataset, beside its inputs and tokenizer."""

    text_key: str = "text"
    id_key: str = "id"
    metadata_keys: tuple[str, ...] = ()  # kept beside the tokens, a line of JSON a document
    max_document_bytes: int = LONGEST_DOCUMENT_BYTES  # a longer record is a bad one
    fractions: tuple[float, ...] = (0.98, 0.01, 0.01)  # of train, validation, test
    seed: int = 0  # of the split
    on_bad_line: BadLinePolicy = BadLinePolicy.FAIL
    eos_token: str | None = None  # None: as the tokenizer's configuration says
    shard_tokens: int = SHARD_TOKENS
    shuffle_seed: int | None = None  # of the order of the documents; None: that of the inputs


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
    return SPLITS[split_numbers([text.encode("utf-8")], fractions, seed)[0]]


def prepare(
    inputs: Sequence[str | Path | Piece],
    tokenizer: Path,
    output: Path,
    options: PrepareOptions,
    *,
    workers: int = 1,
    backend: Backend = Backend.AUTO,
    range_bytes: int = RANGE_BYTES,
    hang_seconds: float = HANG_SECONDS,
    progress: Progress | None = None,
    host: WorkerHost | None = None,
) -> Made:
    """Make a dataset folder with a subfolder per split and the tokenizer; it appears when it is complete.

    The splits depend on inputs, tokenizer and options alone; a run that was stopped is continued by the same call.
    A `host` that has begun to load the tokenizer saves the time that it had; it ends with this call.

    Raises:
        InputError: there is no usable text, a bad record under the policy fail, or an unusable tokenizer.
        UsageError: the output holds something else, or the backend cannot be had.
        StorageError: another run is writing the output.
        WorkerError: a process that encoded died, or did nothing for `hang_seconds`.
    """
    files = find_inputs(inputs)
    with ExitStack() as stack:
        if host is None:  # it loads while this process does and the inputs are hashed
            host = stack.enter_context(loading_host(tokenizer, options.eos_token, backend, workers))
        loaded = load_tokenizer(tokenizer, options.eos_token)
        request, job = preparation_job(files, loaded.identity, options, backend, range_bytes)
        if is_finished(output, request):
            return Made(manifests={path.name: load_manifest(path) for path in split_folders(output)}, reused=True)
        draft = _draft(loaded, _command(inputs, tokenizer, options), request)
        tasks = plan_tasks(files, range_bytes)
        facts = _facts(request, backend, range_bytes)
        staging = stack.enter_context(
            staged_output(
                output, lambda staging: _is_complete(staging, request) or _goes_on(staging, job, facts, output)
            )
        )
        if _is_complete(staging, request):
            remove_shares(output)
            return _without_work(staging)
        work = staging / WORK_FOLDER
        work.mkdir(exist_ok=True)
        encoding = encoding_options(loaded.file, draft.dtype, options, backend, work)
        threads = max(1, workers // max(1, len(tasks)))
        with closing(Journal(work, job, facts)) as journal:
            pool = EncodingPool(options=replace(encoding, threads=threads), workers=workers, hang_seconds=hang_seconds)
            adopt_shares(output, job, work, journal)
            known = _finished_tasks(tasks, pool.options, journal, progress)
            assemblies = {name: _assembly(number, staging, draft, options) for number, name in enumerate(SPLITS)}
            at_once = len(SPLITS) if options.shuffle_seed is None else 1  # of shuffles each takes memory
            # closed at once when this fails: no worker may write into a folder that is being removed
            with closing(_encode(tasks, known, pool, journal, progress, host)) as encoded:
                results, shards = assemble_while_encoding(assemblies, tasks, known, encoded, journal, at_once)
            _save_manifests(tasks, results, shards, draft, staging)
        made = _finish(tasks, results, loaded, staging)
    remove_shares(output)
    return made


def _finish(tasks: Sequence[Task], results: Sequence[TaskResult], tokenizer: DocumentTokenizer, staging: Path) -> Made:
    """Write what lies beside the splits, then remove the files of the tasks."""
    work = staging / WORK_FOLDER
    gather_quarantine(tasks, results, work, staging / "quarantine.jsonl")
    shutil.rmtree(staging / "tokenizer", ignore_errors=True)  # of a run that was stopped here
    tokenizer.copy_to(staging / "tokenizer")
    write_report(staging, results, find_duplicate_ids(tasks, work))
    work.rename(staging / _DONE_FOLDER)
    return _without_work(staging)


def _is_complete(staging: Path, request: Mapping[str, Any]) -> bool:
    """Whether a folder holds all of this dataset, so that it lacks nothing but its name."""
    try:
        return not (staging / WORK_FOLDER).exists() and is_finished(staging, request)
    except DataToolsError:
        return False  # it holds something else


def _without_work(staging: Path) -> Made:
    """Remove what was needed on the way; return what there is then."""
    done = staging / _DONE_FOLDER
    if done.exists():
        sync_folder(staging)
        shutil.rmtree(done)
    return Made(manifests={path.name: load_manifest(path) for path in split_folders(staging)})


def _draft(tokenizer: DocumentTokenizer, command: str, request: Mapping[str, Any]) -> Manifest:
    """Return what the manifests of all splits share."""
    return Manifest(
        kind="documents",
        dtype=token_dtype(tokenizer.vocabulary_size),
        split="",
        tokenizer=tokenizer.identity,
        vocabulary_size=tokenizer.vocabulary_size,
        eos_id=tokenizer.eos_id,
        command=command,
        request=request,
    )


def preparation_job(
    files: Sequence[Piece], tokenizer: TokenizerIdentity, options: PrepareOptions, backend: Backend, range_bytes: int
) -> tuple[dict[str, Any], str]:
    """Return what decides the bytes of a dataset, and the name of the job: what decides the files of its tasks."""
    request = {
        "inputs": input_facts(files),
        "tokenizer": asdict(tokenizer),
        "options": {**asdict(options), "on_bad_line": options.on_bad_line.value},
    }
    return request, xxh3_128_hexdigest(json.dumps([request, backend.value, range_bytes]).encode())


def encoding_options(
    tokenizer: Path, dtype: str, options: PrepareOptions, backend: Backend, work: Path
) -> EncodingOptions:
    """Return what the processes need to know of a preparation whose tasks are written into a folder."""
    return EncodingOptions(
        tokenizer=tokenizer,
        eos_token=options.eos_token,
        dtype=dtype,
        keys=Keys(
            text=options.text_key,
            identifier=options.id_key,
            metadata=options.metadata_keys,
            longest_bytes=options.max_document_bytes,
        ),
        fractions=options.fractions,
        seed=options.seed,
        on_bad_line=options.on_bad_line,
        backend=backend,
        folder=work,
    )


def _facts(request: Mapping[str, Any], backend: Backend, range_bytes: int) -> dict[str, Any]:
    """Return what an unfinished run can be told apart by, in few words."""
    hashes = {name: xxh3_128_hexdigest(json.dumps(request[name]).encode()) for name in ("inputs", "tokenizer")}
    options = json.loads(json.dumps(request["options"]))
    return {**hashes, **options, "backend": backend.value, "range_bytes": range_bytes}


def _goes_on(staging: Path, job: str, facts: Mapping[str, Any], output: Path) -> bool:
    """Return whether a folder holds this job, begun; one of another job is told before it is discarded."""
    work = staging / WORK_FOLDER
    if (other := Journal.of_another_job(work, job)) is not None:
        before, finished = other
        names = sorted(name for name in {*facts, *before} if facts.get(name) != before.get(name))
        shown = [
            name if name in ("inputs", "tokenizer") else f"{name} was {before.get(name)!r}, is {facts.get(name)!r}"
            for name in names
        ]
        logger.warning(
            "an unfinished run for %s is discarded with its %d finished steps, because the request is another: %s",
            output,
            finished,
            "; ".join(shown) or "it was made by another version",
        )
    return Journal.belongs_to(work, job)


def _finished_tasks(
    tasks: Sequence[Task], options: EncodingOptions, journal: Journal, progress: Progress | None
) -> dict[int, TaskResult]:
    """Return the results that earlier runs have left, and begin to show progress."""
    for left_over in options.folder.glob("*.tmp"):
        left_over.unlink()
    results = {entry["task"]: TaskResult(**entry["result"]) for entry in journal.entries if "task" in entry}
    if progress is not None:
        finished = sum(task.disk_bytes for task in tasks if task.number in results)
        progress.start(sum(task.disk_bytes for task in tasks), finished)
    return results


def _encode(
    tasks: Sequence[Task],
    known: Mapping[int, TaskResult],
    pool: EncodingPool,
    journal: Journal,
    progress: Progress | None,
    host: WorkerHost | None,
) -> Generator[Finished, None, None]:
    """Encode the tasks that no earlier run has finished, and yield each when it is in the journal."""
    missing = [task for task in tasks if task.number not in known]
    on_progress = (lambda *_: None) if progress is None else progress.advance
    with closing(pool.run(missing, on_progress, host)) as finished_tasks:
        for task, result in finished_tasks:
            journal.append({"task": task.number, "result": asdict(result)})
            yield task, result


def _save_manifests(
    tasks: Sequence[Task],
    results: Sequence[TaskResult],
    shards: Mapping[str, Sequence[ShardRecord]],
    draft: Manifest,
    staging: Path,
) -> None:
    """Write the manifest of every split that has documents."""
    dropped, examples = count_dropped(tasks, results)
    if not shards[SPLITS[0]]:
        raise _nothing_to_train_on(dropped, examples, has_documents=any(shards.values()))
    counts = np.zeros(draft.vocabulary_size, np.int64)
    for task in tasks:
        counts += np.fromfile(task_file(staging / WORK_FOLDER, task.number, "counts"), np.int64)
    for name, records in shards.items():
        if not records:
            continue
        manifest = replace(
            draft.for_split(name),
            shards=tuple(records),
            dropped=dropped,
            dropped_examples=tuple(examples),
            unigram_entropy_nats=entropy_nats(counts),
        )
        save_manifest(manifest, staging / name)


def _assembly(split: int, staging: Path, draft: Manifest, options: PrepareOptions) -> SplitAssembly:
    in_order = SplitAssembly(
        split=split,
        parts=staging / WORK_FOLDER,
        folder=staging / SPLITS[split],
        draft=draft,
        shard_tokens=options.shard_tokens,
        has_metadata=bool(options.metadata_keys),
    )
    if options.shuffle_seed is None:
        return in_order
    return ShuffledAssembly(**vars(in_order), seed=options.shuffle_seed)


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """Return the entropy of one token, in nats, from the count of each."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _nothing_to_train_on(dropped: Mapping[str, int], examples: Sequence[str], *, has_documents: bool) -> InputError:
    found = "no document fell into the training split" if has_documents else "the inputs hold no document"
    if examples:
        found += f" ({sum(dropped.values())} records dropped, the first: {examples[0]})"
    return InputError(
        found, "at least one document for training", "check the inputs, --text-key and --split, or give more text"
    )


def _command(inputs: Sequence[str | Path | Piece], tokenizer: Path, options: PrepareOptions) -> str:
    """Return the words that decide the bytes; where they went and by how many workers is not among them."""
    words: list[Any] = ["data-tools", "prepare", *inputs, "--tokenizer", tokenizer]
    words += ["--text-key", options.text_key, "--id-key", options.id_key]
    words += ["--split", ",".join(map(str, options.fractions)), "--seed", options.seed]
    words += ["--on-bad-line", options.on_bad_line.value, "--max-document-bytes", options.max_document_bytes]
    words += ["--metadata", ",".join(options.metadata_keys)] if options.metadata_keys else []
    words += ["--shuffle-seed", options.shuffle_seed] if options.shuffle_seed is not None else []
    return " ".join(map(str, words))
