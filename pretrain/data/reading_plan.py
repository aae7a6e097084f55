"""How much of each source a run will read, worked out before it starts where the datasets lie at hand.

For `pretrain check` and the start of `pretrain train`; prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pretrain.config_data import DataSection
from pretrain.data.ledger import Given, ledger, reading_warnings, require_enough
from pretrain.data.open_datasets import open_datasets
from pretrain.data.training_rows import TrainingRows


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """What a whole run takes from each source, by name."""

    given: dict[str, Given]
    rows: dict[str, int]  # that each source has
    warnings: Sequence[str] = field(default_factory=list)


def plan_reading(
    data: DataSection, *, sequence_length: int, vocabulary_size: int, seed: int, total_samples: int
) -> ReadingPlan:
    """Work out what a run of so many rows reads.

    Raises:
        DataError: with every problem of the training datasets; the sources are used up before the end of the run.
    """
    training_only = data.model_copy(update={"validation": {}})
    opened = open_datasets(
        training_only, sequence_length=sequence_length, vocabulary_size=vocabulary_size, check_hashes=False
    )
    rows = TrainingRows(opened.training, seed=seed, phases=opened.phases)
    require_enough(rows, total_samples)
    return ReadingPlan(
        given=ledger(rows, total_samples),
        rows={source.name: source.rows for source in rows.sources},
        warnings=reading_warnings(rows, total_samples),
    )
