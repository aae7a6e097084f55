"""`pretrain samples`: the rows of a step as they are trained on, with their sources, and what the run has read by then.

Works from the configuration and the datasets: the order is computed, so nothing has to be trained or saved first. Of a
run folder it takes what was left out after rollbacks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pretrain.batch_plan import build_batch_plan
from pretrain.config import load_config
from pretrain.data.ledger import ledger
from pretrain.data.open_datasets import open_datasets
from pretrain.data.skipped_windows import Window, merge_windows, order_place
from pretrain.data.training_rows import Location, TrainingRows
from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.training.incidents import FILE_NAME as INCIDENTS
from pretrain.training.incidents import ROLLBACK, Incident, read_incidents, windows_from

if TYPE_CHECKING:
    from data_tools.token_shards import Row

_RESOLVED = "config.yaml"
_TOKENIZER = "tokenizer.json"


class _Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


def sample_lines(
    run: Path, overrides: Sequence[str], *, step: int, count: int, taken_back: bool = False
) -> Iterator[str]:
    """Describe the first rows of the update that metrics.jsonl calls this step.

    Args:
        run: a run configuration, or a run folder.
        overrides: changes to the configuration.
        step: from 1.
        count: rows shown at most.
        taken_back: show the rows with which this step went wrong before the run rolled back.

    Raises:
        ConfigError: there is no such step, or the configuration is wrong.
        DataError: the datasets do not fit it.
    """
    config = load_config(run / _RESOLVED if run.is_dir() else run, overrides)
    # ranks only share rows out: which rows a step has is the same for one rank that reads them one by one
    batch = config.batch.model_copy(update={"micro_batch_size": 1})
    plan = build_batch_plan(batch, config.schedule, 1)
    if not 1 <= step <= plan.total_steps:
        raise ConfigError(Problem(f"step {step}", f"1 to {plan.total_steps}", "choose another --step"))
    opened = open_datasets(
        config.data.model_copy(update={"validation": {}}),
        sequence_length=config.batch.sequence_length,
        vocabulary_size=sys.maxsize,  # whether the model has room for all ids is for `pretrain check` to say
        check_hashes=False,
    )
    rows = TrainingRows(
        opened.training, seed=config.seed, phases=opened.phases, fill_in_the_middle=opened.fill_in_the_middle
    )
    decoder = _decoder(rows, config.data.tokenizer)
    known = list(read_incidents(run / INCIDENTS)) if run.is_dir() else []
    if run.is_dir():
        rows = rows.leaving_out(_skipped_windows(run, known))
    if taken_back:
        yield from _describe_taken_back(rows, [one for one in known if one["kind"] == ROLLBACK], step, count, decoder)
        return
    for incident in known:
        last_step = incident["last_step"] if incident["kind"] == ROLLBACK else incident["step"]
        if incident["step"] <= step <= last_step:
            yield _sentence(incident)
    yield from _describe(rows, plan.step_to_samples(step - 1), plan.step_to_samples(step), count, decoder)


def _skipped_windows(run: Path, known: Sequence[Incident]) -> tuple[Window, ...]:
    """What the run has left out: as its newest readable checkpoint says, and rollbacks since."""
    from pretrain.checkpoint.folder import list_checkpoints
    from pretrain.checkpoint.manifest import read_manifest

    for path in reversed(list_checkpoints(run / "checkpoints")):
        with suppress(CheckpointError):
            progress = read_manifest(path).progress
            recorded = merge_windows((first, end) for first, end in progress.get("skipped_windows", []))
            return windows_from(known, recorded, order_place(progress["samples_consumed"], recorded))
    return windows_from(known, (), 0)


def _sentence(incident: Incident) -> str:
    first, end = incident["rows"]
    if incident["kind"] != ROLLBACK:
        return f"step {incident['step']} ({incident['kind']}) was tried with rows {first:,} to {end - 1:,} of the order"
    return (
        f"{incident['reason']}: rolled back to step {incident['checkpoint_step']}; rows {incident['window'][0]:,} to "
        f"{incident['window'][1] - 1:,} of the order were left out (--taken-back shows them)"
    )


def _describe_taken_back(
    rows: TrainingRows, rollbacks: Sequence[Incident], step: int, count: int, decoder: _Decoder | None
) -> Iterator[str]:
    """The rows of every rollback whose bad steps hold this one."""
    import numpy as np

    for incident in rollbacks:
        if incident["step"] <= step <= incident["last_step"]:
            yield _sentence(incident)
            first, end = incident["rows"]
            places = rows.locate_in_order(np.arange(first, min(end, first + count)))
            for number, place, row in zip(range(first, end), places, rows.read(places), strict=False):
                yield from _describe_row(rows, f"place {number}", place, row, decoder)


def _describe(rows: TrainingRows, first: int, stop: int, count: int, decoder: _Decoder | None) -> Iterator[str]:
    import numpy as np

    yield f"samples {first:,} to {stop - 1:,} of the run; read before them:"
    for name, given in ledger(rows, first).items():
        yield f"  {name}: {given.rows:,} rows, {given.tokens:,} tokens, {given.epochs:.3f} epochs"
    places = rows.locate(np.arange(first, min(stop, first + count)))
    for sample, place, row in zip(range(first, stop), places, rows.read(places), strict=False):
        yield from _describe_row(rows, f"sample {sample}", place, row, decoder)


def _describe_row(rows: TrainingRows, title: str, place: Location, row: Row, decoder: _Decoder | None) -> Iterator[str]:
    name = rows.sources[place.source].name
    yield f"=== {title}: {name}, row {place.row}, epoch {place.epoch}: {row.used} tokens ==="
    for start, stop in zip(row.starts.tolist(), [*row.starts[1:].tolist(), row.used], strict=True):
        yield f"--- document or piece at {start} ({stop - start} tokens) ---"
        ids = row.tokens[start:stop].tolist()
        yield " ".join(map(str, ids)) if decoder is None else decoder.decode(ids, skip_special_tokens=False)


def _decoder(rows: TrainingRows, tokenizer: str | None) -> _Decoder | None:
    """The tokenizer given, else the one beside the data; None where it is no tokenizer.json: ids are shown then."""
    folder = rows.sources[0].dataset.folder
    places = [Path(tokenizer)] if tokenizer else [folder / "tokenizer", folder.parent / "tokenizer"]
    files = [place / _TOKENIZER if place.is_dir() else place for place in places]
    file = next((file for file in files if file.name == _TOKENIZER and file.is_file()), None)
    if file is None:
        return None
    from tokenizers import Tokenizer

    decoder: _Decoder = Tokenizer.from_file(str(file))
    return decoder
