"""Batch arithmetic: tokens <-> rows (samples) <-> micro-batches <-> ranks <-> steps, in whole numbers only.

Knows nothing of what a row holds (data/) nor of how ranks find their coordinate (topology.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pretrain.config import BatchSection, ScheduleSection


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of steps with one global batch size; the last stage has no end."""

    first_step: int
    first_sample: int
    global_batch_size: int  # rows


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How rows are shared out; build it with `build_batch_plan`, which refuses sizes that do not divide.

    A sample index counts rows from the start of training, over all epochs: one integer is the whole position.
    """

    sequence_length: int  # tokens
    micro_batch_size: int  # rows
    data_parallel_size: int  # ranks
    stages: tuple[Stage, ...]  # by ascending first step and first sample; the first starts at 0
    total_steps: int
    warmup_steps: int

    @property
    def rows_per_round(self) -> int:
        """Rows of one micro-batch on every data-parallel rank."""
        return self.micro_batch_size * self.data_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Rows of a step once the ramp is over."""
        return self.stages[-1].global_batch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank reads for a step once the ramp is over."""
        return self.global_batch_size // self.rows_per_round

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step once the ramp is over."""
        return self.global_batch_size * self.sequence_length

    @property
    def total_samples(self) -> int:
        """Rows consumed by the whole run."""
        return self.step_to_samples(self.total_steps)

    @property
    def total_tokens(self) -> int:
        """Tokens consumed by the whole run."""
        return self.total_samples * self.sequence_length

    def global_batch_at(self, samples_consumed: int) -> int:
        """Rows of the step that starts at this sample."""
        return self._last_stage_with(lambda stage: stage.first_sample <= samples_consumed).global_batch_size

    def accumulation_at(self, samples_consumed: int) -> int:
        """Micro-batches that each rank reads for the step that starts at this sample."""
        return self.global_batch_at(samples_consumed) // self.rows_per_round

    def step_to_samples(self, step: int) -> int:
        """Samples consumed before the step of this index (so also: after that many steps)."""
        stage = self._last_stage_with(lambda stage: stage.first_step <= step)
        return stage.first_sample + (step - stage.first_step) * stage.global_batch_size

    def steps_for_samples(self, samples: int) -> int:
        """The fewest steps that consume at least so many samples."""
        return _steps_for_samples(self.stages, samples)

    def rank_samples(self, samples_consumed: int, rank: int, micro_batch: int) -> range:
        """Sample indices that a data-parallel rank reads as its micro-batch of the step that starts here."""
        assert 0 <= rank < self.data_parallel_size
        first = samples_consumed + micro_batch * self.rows_per_round + rank * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def _last_stage_with(self, condition: Callable[[Stage], bool]) -> Stage:
        return next(stage for stage in reversed(self.stages) if condition(stage))


def build_batch_plan(batch: BatchSection, schedule: ScheduleSection, data_parallel_size: int) -> BatchPlan:
    """Work out the plan of a run; `data_parallel_size` counts the ranks that read different rows.

    Raises:
        ConfigError: with every number that does not fit and the nearest ones that do.
    """
    problems = [*_ramp_problems(batch), *_division_problems(batch, data_parallel_size)]
    if problems:
        raise ConfigError(*problems)
    stages = _build_stages(batch)

    def steps(count: int | None, tokens: int | None) -> int:
        if count is not None:
            return count
        return _steps_for_samples(stages, _divide_up(tokens or 0, batch.sequence_length))

    total_steps = steps(schedule.total_steps, schedule.total_tokens)
    warmup_steps = steps(schedule.warmup_steps, schedule.warmup_tokens)
    if warmup_steps > total_steps:
        found = f"warm-up takes {warmup_steps} steps, the whole run {total_steps}"
        raise ConfigError(
            Problem(found, f"at most {total_steps} steps of warm-up", "shorten schedule.warmup_steps or warmup_tokens")
        )
    return BatchPlan(
        sequence_length=batch.sequence_length,
        micro_batch_size=batch.micro_batch_size,
        data_parallel_size=data_parallel_size,
        stages=stages,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def _ramp_problems(batch: BatchSection) -> Iterator[Problem]:
    sizes = [stage.global_batch_size for stage in batch.ramp] + [batch.global_batch_size]
    for index, stage in enumerate(batch.ramp):
        place = f"batch.ramp[{index}]"
        if index and stage.until_tokens <= (before := batch.ramp[index - 1].until_tokens):
            found = f"{place}.until_tokens is {stage.until_tokens}, the stage before ends at {before}"
            yield Problem(found, f"more than {before}", "order the stages by until_tokens")
        if sizes[index] >= sizes[index + 1]:
            found = f"{place}.global_batch_size is {sizes[index]}, the size that follows is {sizes[index + 1]}"
            yield Problem(found, "sizes that grow", f"set {place}.global_batch_size below {sizes[index + 1]}")


def _division_problems(batch: BatchSection, data_parallel_size: int) -> Iterator[Problem]:
    sizes = {
        f"batch.ramp[{index}].global_batch_size": stage.global_batch_size for index, stage in enumerate(batch.ramp)
    }
    sizes["batch.global_batch_size"] = batch.global_batch_size
    rows = batch.micro_batch_size * data_parallel_size
    for place, size in sizes.items():
        if size % rows == 0:
            continue
        found = (
            f"{place} is {size} rows, which does not divide into micro-batches of {batch.micro_batch_size} rows "
            f"on {data_parallel_size} data-parallel ranks ({rows} rows at a time)"
        )
        below, above = size // rows * rows, _divide_up(size, rows) * rows
        nearest = f"{below} or {above}" if below else str(above)
        nearer = below if below and size - below < above - size else above
        kept = _micro_batch_hint(size, rows, batch) + _rank_hint(size, batch.micro_batch_size, data_parallel_size)
        yield Problem(found, f"a multiple of {rows}: {nearest}", f"set {place}={nearer}{kept}")


def _micro_batch_hint(size: int, rows: int, batch: BatchSection) -> str:
    """The largest smaller micro-batch that keeps the global batch as it is, if there is one."""
    data_parallel_size = rows // batch.micro_batch_size
    for candidate in range(batch.micro_batch_size - 1, 0, -1):
        if size % (candidate * data_parallel_size) == 0:
            return f", or batch.micro_batch_size={candidate}"
    return ""


def _rank_hint(size: int, micro_batch_size: int, data_parallel_size: int) -> str:
    """The nearest numbers of ranks that keep both batches as they are, as a run wants that goes on elsewhere."""
    legal = [ranks for ranks in range(1, size // micro_batch_size + 1) if size % (micro_batch_size * ranks) == 0]
    below = [ranks for ranks in legal if ranks < data_parallel_size][-1:]
    above = [ranks for ranks in legal if ranks > data_parallel_size][:1]
    nearest = " or ".join(map(str, below + above))
    return f", or start {nearest} data-parallel ranks, which leaves the batch as it is" if nearest else ""


def _build_stages(batch: BatchSection) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    step = sample = 0
    for ramp in batch.ramp:
        rows_left = _divide_up(ramp.until_tokens, batch.sequence_length) - sample
        if rows_left <= 0:  # the last step of the stage before went past the whole of this one
            continue
        stages.append(Stage(first_step=step, first_sample=sample, global_batch_size=ramp.global_batch_size))
        steps = _divide_up(rows_left, ramp.global_batch_size)
        step, sample = step + steps, sample + steps * ramp.global_batch_size
    return (*stages, Stage(first_step=step, first_sample=sample, global_batch_size=batch.global_batch_size))


def _steps_for_samples(stages: tuple[Stage, ...], samples: int) -> int:
    stage = next((stage for stage in reversed(stages) if stage.first_sample < samples), stages[0])
    return stage.first_step + _divide_up(samples - stage.first_sample, stage.global_batch_size)


def _divide_up(amount: int, size: int) -> int:
    return -(-amount // size)
