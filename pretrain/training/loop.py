"""The training loop: what happens at each step, in order, read from top to bottom.

Owns the order of things, not their content: an engine runs the step, the reporter tells, the store saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pretrain.batch_plan import BatchPlan
from pretrain.best_metric import BestMetric, best_metric_of
from pretrain.config import RunConfig
from pretrain.engines.base import Engine, StepResult
from pretrain.errors import Preempted
from pretrain.models.batch import Batch
from pretrain.reporting.record import Value
from pretrain.reporting.reporter import Reporter
from pretrain.training.goodput import GoodputLedger
from pretrain.training.guard import Guard
from pretrain.training.health import RankHealth
from pretrain.training.metrics import StepMeter, perplexity
from pretrain.training.phases import Phases
from pretrain.training.progress import Progress
from pretrain.training.saving import Saves
from pretrain.training.stopping import StopRequest, should_stop_early
from pretrain.training.update_ratios import read_update_ratios


class SourceLines(Protocol):
    """What lines tell of the sources of data."""

    def of_training(self, progress: Progress, loss: float) -> dict[str, Value]:
        """Of a training line with this loss."""

    def of_validation(self, name: str, loss: float) -> dict[str, Value]:
        """Of a validation line with this loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingLoop:
    """One run from some progress to its last step. Every rank runs the same loop; what is collective stays in step."""

    config: RunConfig
    plan: BatchPlan
    engine: Engine
    schedule: Callable[[int], float]  # step -> learning-rate multiplier
    validation: Mapping[str, Callable[[], Iterator[Batch]]]  # name -> this rank's micro-batches of the set
    reporter: Reporter
    saves: Saves
    meter: StepMeter
    guard: Guard
    stop: StopRequest
    phases: Phases
    ledger: GoodputLedger
    health: RankHealth
    sources: SourceLines | None = None  # what lines tell of them; null on ranks that report nothing
    tasks: Callable[[], Mapping[str, float]] | None = None  # values of evaluation.tasks; nothing where they failed

    def run(self, progress: Progress, steps: Iterator[Sequence[Batch]]) -> Progress:
        """Train until the last step, an early stop, or a request to stop.

        Args:
            progress: where the run stands.
            steps: this rank's micro-batches of each step, from that place on.

        Raises:
            Preempted: after an orderly save, where the run was asked to stop before its last step.
            RollBack: where steps went wrong that must be taken back.
            DivergedError: where one went wrong and the policy is to stop.
            ReplicaError: where ranks that must hold the same state do not.
            StorageError: where the last save of the run failed.
        """
        progress = progress.judged_by(self._best_metric)
        first_step = progress.step + 1
        while not self._is_finished(progress):
            step = progress.step + 1
            self.phases.enter("first step" if step == first_step else "step", step)
            progress = self._step(progress, steps)
            with self.meter.paused():
                self.health.look(progress.step)
                self.saves.tell(progress)
            progress = self._evaluate(progress)
            self.phases.doing("agreeing")
            is_stopping = self.stop.is_agreed()
            is_best = progress.best_step == progress.step and self.config.checkpoint.keep_best > 0
            kept = self.config.checkpoint
            is_due = self._is_due(kept.every_steps, progress) or self._is_due(kept.durable_every_steps, progress)
            if is_stopping or is_best or is_due or self._is_finished(progress):
                progress = self._save(progress, is_best=is_best)
            if is_stopping and not self._is_finished(progress):
                self._finish_saves(progress)
                self.stop.leave()
                raise Preempted(f"asked to stop ({self.stop.reason or 'on another rank'}) at step {progress.step}")
        self._finish_saves(progress)
        return progress

    def _is_finished(self, progress: Progress) -> bool:
        """At the step to stop at, and where validation stopped improving; a run started again stays finished."""
        patience = self.config.evaluation.early_stopping_patience
        return progress.step >= self._last_step or should_stop_early(progress, patience)

    @property
    def _last_step(self) -> int:
        return min(self.plan.total_steps, self.config.schedule.stop_at_step or self.plan.total_steps)

    def _step(self, progress: Progress, steps: Iterator[Sequence[Batch]]) -> Progress:
        began = time.perf_counter()
        self.phases.doing("reading rows")
        micro_batches = next(steps)
        self.phases.doing("training")
        data_seconds = time.perf_counter() - began
        own_began = time.thread_time()
        multiplier = self.schedule(progress.step)
        self.engine.set_learning_rate_multiplier(multiplier)
        result = self.engine.train_step(micro_batches, progress.step)
        self.health.count_step(data_seconds=data_seconds, compute_seconds=time.thread_time() - own_began)
        rows = self.plan.global_batch_at(progress.samples_consumed)
        tokens = rows * self.plan.sequence_length
        first_row = progress.samples_consumed
        progress = progress.after_step(rows=rows, tokens=tokens)
        self.guard.observe(step=progress.step, first_row=first_row, end_row=first_row + rows, result=result)
        self.meter.count_step(tokens=tokens, data_seconds=data_seconds, source_sums=result.source_sums)
        self.ledger.count_step(progress.step)
        is_last = progress.step == self._last_step
        if is_last or self._is_due(self.config.reporting.every_steps, progress):
            return self._report(progress, result, multiplier)
        if self.guard.must_read:
            return progress.after_skipped(self.guard.read_skipped())
        return progress

    def _report(self, progress: Progress, result: StepResult, multiplier: float) -> Progress:
        progress = progress.after_skipped(self.guard.read_skipped())
        values = self.meter.read(
            result,
            tokens_seen=progress.tokens_seen,
            learning_rate=multiplier * self.config.optimizer.learning_rate,
            skipped_steps=progress.skipped_steps,
            part_seconds=self.engine.part_seconds(),
        )
        if self._is_due(self.config.reporting.update_ratios_every_steps, progress) and not bool(result.skipped):
            with self.meter.paused():
                values.update(read_update_ratios(self.engine, self.config.optimizer, multiplier, result.loss.device))
        if self.sources is not None:
            values.update(self.sources.of_training(progress, float(values["loss"])))
        self.reporter.report(progress.step, values)
        return progress

    def _evaluate(self, progress: Progress) -> Progress:
        """What is due: every validation set, and the tasks; one metric of them decides what is best."""
        section, is_last = self.config.evaluation, self._is_finished(progress)
        validates = is_last or self._is_due(section.every_steps, progress)
        asks = self.tasks is not None and (
            is_last or self._is_due(section.tasks_every_steps or section.every_steps, progress)
        )
        if not validates and not asks:
            return progress
        with self.phases.inside("evaluation"), self.meter.paused():
            values: dict[str, float] = {}
            for name, micro_batches in self.validation.items() if validates else ():
                self.phases.doing(f"validation set {name}")
                result = self.engine.evaluate(micro_batches())
                loss = result.loss_sum / max(1, result.target_count)
                found = {f"validation/{name}/loss": loss, f"validation/{name}/perplexity": perplexity(loss)}
                further = self.sources.of_validation(name, loss) if self.sources else {}
                self.reporter.report(progress.step, found | further)
                values |= found
            if asks and self.tasks is not None:
                self.phases.doing("tasks")
                found = dict(self.tasks())
                self.reporter.report(progress.step, found)
                values |= found
        metric = self._best_metric
        if metric is None or metric.name not in values:
            return progress
        return progress.after_evaluation(values[metric.name], metric)

    @property
    def _best_metric(self) -> BestMetric | None:
        return best_metric_of(self.config)

    def _save(self, progress: Progress, *, is_best: bool) -> Progress:
        with self.phases.inside("save"), self.meter.paused():
            progress = progress.after_skipped(self.guard.read_skipped())
            self.saves.begin(progress, is_best=is_best)
        self.ledger.write(progress.step)
        return progress

    def _finish_saves(self, progress: Progress) -> None:
        with self.phases.inside("save"), self.meter.paused():
            self.saves.finish(progress, is_last=self._is_finished(progress))

    @staticmethod
    def _is_due(every_steps: int | None, progress: Progress) -> bool:
        return every_steps is not None and progress.step % every_steps == 0
