"""What every source has given at some point of training, and whether a resumed run would have given the same.

Pure functions of the mixture and one integer: nothing is counted up, so nothing can be lost in a kill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.data.training_rows import TrainingRows
from pretrain.errors import ConfigError, DataError, Problem

MOST_EPOCHS = 4  # repeated more often, tokens are worth much less than new ones (Muennighoff et al. 2023, section 5)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What one source has given."""

    rows: int
    tokens: int  # rows x sequence length
    epochs: float  # rows / rows of the source


def ledger(rows: TrainingRows, samples_consumed: int) -> dict[str, Given]:
    """What each source, by name, has given once so many samples were read in all."""
    counts = rows.consumed(samples_consumed)
    return {
        source.name: Given(rows=count, tokens=count * rows.sequence_length, epochs=count / source.rows)
        for source, count in zip(rows.sources, counts, strict=True)
    }


def ledger_values(rows: TrainingRows, samples_consumed: int) -> dict[str, float | int]:
    """The ledger as values of a report."""
    values: dict[str, float | int] = {}
    for name, given in ledger(rows, samples_consumed).items():
        values[f"data/{name}/tokens"] = given.tokens
        values[f"data/{name}/epochs"] = given.epochs
    return values


def reading_warnings(rows: TrainingRows, total_samples: int) -> list[str]:
    """Sources that a run of so many samples would repeat too often."""
    return [
        f"{name} will be read {given.epochs:.1f} times; beyond {MOST_EPOCHS} repetitions add little "
        "(Muennighoff et al. 2023): add data, lower its weight, or set its max_epochs"
        for name, given in ledger(rows, total_samples).items()
        if given.epochs > MOST_EPOCHS
    ]


def require_enough(rows: TrainingRows, total_samples: int) -> None:
    """Refuse a run whose sources are used up before its end.

    Raises:
        DataError: with the number of tokens that there are.
    """
    total = rows.order_place(total_samples)
    available = rows.mixture.available(total)
    if available == total:
        return
    tokens, wanted = available * rows.sequence_length, total * rows.sequence_length
    limited = ", ".join(source.name for source in rows.sources if source.row_limit is not None)
    raise DataError(
        Problem(
            f"the run asks for {wanted:,} tokens, and every source that has a weight is used up after {tokens:,}",
            f"at most {tokens:,} tokens with these weights and max_epochs (of {limited})",
            "shorten the schedule, raise a max_epochs, or give a source without one a weight",
        )
    )


def order_record(rows: TrainingRows, samples_consumed: int) -> dict[str, Any]:
    """All that the rows read so far followed from, for a checkpoint's manifest."""
    return {
        "seed": rows.seed,
        "sequence_length": rows.sequence_length,
        "sources": [{"name": source.name, "rows": source.rows} for source in rows.sources],
        "segments": [
            {"first_sample": segment.first_sample, "weights": list(segment.weights)}
            for segment in rows.mixture.segments_before(rows.order_place(samples_consumed))
        ],
    }


def require_same_past(rows: TrainingRows, recorded: Mapping[str, Any], samples_consumed: int) -> None:
    """Refuse to go on with data that would have been read in another order up to here; the future is free to change.

    Sources may be added at the end of the list with weight 0 until now, and a source that has given nothing may be
    another.

    Raises:
        ConfigError: with every difference.
    """
    ours = order_record(rows, samples_consumed)
    given = rows.consumed(samples_consumed)
    problems = list(_differences(ours, recorded, given))
    if not problems and _padded(recorded, len(given)) != ours["segments"]:
        tokens = samples_consumed * rows.sequence_length
        problems.append(
            Problem(
                f"the weights, phases or max_epochs differ from those that the {tokens:,} tokens so far were read with",
                "the same past; weights may change from here on",
                f"restore them, and add the new ones as data.mixture.phases: [{{from_tokens: {tokens}, weights: ...}}]",
            )
        )
    if problems:
        raise ConfigError(*problems)


def _differences(ours: Mapping[str, Any], recorded: Mapping[str, Any], given: tuple[int, ...]) -> list[Problem]:
    problems = []
    for key in ("seed", "sequence_length"):
        if ours[key] != recorded[key]:
            change = "restore it, or start a new run from the weights of this one"
            found = f"{key} is {ours[key]}, the checkpoint's rows were read with {recorded[key]}"
            problems.append(Problem(found, f"{key} {recorded[key]}", change))
    for place, then in enumerate(recorded["sources"]):
        now = ours["sources"][place] if place < len(given) else None
        if now is None:
            found = f"data.train[{place}] ({then['name']}) was read by this run and is gone"
            change = "put it back in its place; a phase with weight 0 switches a source off"
            problems.append(Problem(found, "the sources of the run, in their order", change))
        elif given[place] and now["rows"] != then["rows"]:
            found = f"data.train[{place}] ({now['name']}) has {now['rows']:,} rows, and had {then['rows']:,}"
            change = "restore that dataset; add new data as a further source, with a phase that gives it a weight"
            problems.append(Problem(found, "the data that was read so far", change))
    return problems


def _padded(recorded: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The recorded segments with weight 0 for sources that came later."""
    return [
        {
            "first_sample": segment["first_sample"],
            "weights": segment["weights"] + [0] * (count - len(segment["weights"])),
        }
        for segment in recorded["segments"]
    ]
