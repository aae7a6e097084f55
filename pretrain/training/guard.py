"""What happens when a step goes wrong: skipped steps and spikes are told, counted, and end in a rollback or the run.

Never makes the host wait before a line is due, changes no weight (engines skip), goes not back (run_training.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from pretrain.config import GuardSection
from pretrain.engines.base import StepResult
from pretrain.errors import DivergedError, Problem
from pretrain.training.incidents import Incident
from pretrain.training.rollback import RollBack
from pretrain.training.spikes import SpikeWindow

logger = logging.getLogger(__name__)

MOST_UNREAD_STEPS = 100  # however rare the lines are, this many steps at most go by unread
INCIDENTS_KEPT = 100  # in a checkpoint; the run folder's file has all

Fault = Literal["not finite", "held back", "spike"]


@dataclass(frozen=True, kw_only=True)
class _Unread:
    step: int
    first_row: int  # of the samples trained on
    end_row: int  # exclusive
    result: StepResult


@dataclass(frozen=True, kw_only=True)
class _Bad:
    step: int
    first_row: int
    end_row: int
    fault: Fault


class Guard:
    """Watches a run's steps. Equal on every rank, since all it reads was agreed on by all ranks within the engine.

    Args:
        config: the policies.
        record: told of every incident.
        order_place: sample number -> its place in the sample order.
    """

    def __init__(
        self,
        config: GuardSection,
        *,
        record: Callable[[Incident], None] = lambda incident: None,
        order_place: Callable[[int], int] = lambda sample: sample,
    ) -> None:
        self._config = config
        self._record = record
        self._order_place = order_place
        self._unread: list[_Unread] = []
        self._bad_in_a_row: list[_Bad] = []
        self._is_in_spike = False
        self._incidents: list[Incident] = []
        self._losses = SpikeWindow(config.spike_window_steps)
        self._norms = SpikeWindow(config.spike_window_steps)

    def observe(self, *, step: int, first_row: int, end_row: int, result: StepResult) -> None:
        """Remember a step over these samples, [first_row, end_row), without reading anything."""
        self._unread.append(_Unread(step=step, first_row=first_row, end_row=end_row, result=result))

    @property
    def must_read(self) -> bool:
        """True when `read_skipped` is due although no line is."""
        return len(self._unread) >= MOST_UNREAD_STEPS

    def read_skipped(self) -> int:
        """Steps skipped since the last call; the host waits for the device here.

        Raises:
            DivergedError: where the policy is to stop at once.
            RollBack: where it is to go back, or too many steps in a row went wrong.
        """
        count = 0
        unread, self._unread = self._unread, []
        for step, values in zip(unread, _read([step.result for step in unread]), strict=True):
            fault = self._fault_of(step, values)
            if fault is None:
                self._bad_in_a_row.clear()
                continue
            count += fault != "spike"
            bad = _Bad(step=step.step, first_row=step.first_row, end_row=step.end_row, fault=fault)
            self._bad_in_a_row.append(bad)
            self._tell(bad, values)
            self._require_few()
        return count

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint; nothing may be unread."""
        assert not self._unread, "read before saving"
        return {
            "losses": list(self._losses.values),
            "gradient_norms": list(self._norms.values),
            "bad_in_a_row": [asdict(bad) for bad in self._bad_in_a_row],
            "is_in_spike": self._is_in_spike,
            "incidents": self._incidents,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the guard that gave this state."""
        steps = self._config.spike_window_steps
        self._losses = SpikeWindow(steps, state["losses"])
        self._norms = SpikeWindow(steps, state["gradient_norms"])
        self._bad_in_a_row = [_Bad(**bad) for bad in state["bad_in_a_row"]]
        self._is_in_spike = state["is_in_spike"]
        self._incidents = list(state["incidents"])

    def _fault_of(self, step: _Unread, values: _Values) -> Fault | None:
        if values.spike:
            self._norms.add(values.gradient_norm)
            return "held back"
        if values.skipped:
            return "not finite"
        limit = self._config.spike_score
        scores = self._losses.score(values.loss), self._norms.score(values.gradient_norm)
        is_spike = max(scores) > limit
        if is_spike and not self._is_in_spike and self._config.on_spike != "ignore":
            name, value, window = (
                ("loss", values.loss, self._losses)
                if scores[0] > limit
                else ("gradient norm", values.gradient_norm, self._norms)
            )
            logger.warning(
                "step %d: %s %.4g is a spike, the median of the last %d is %.4g (rows %d to %d)",
                step.step, name, value, len(window.values), window.median, step.first_row, step.end_row - 1,
            )  # fmt: skip
        self._is_in_spike = is_spike
        self._losses.add(values.loss)
        self._norms.add(values.gradient_norm)
        return "spike" if is_spike and self._config.on_spike != "ignore" else None

    def _tell(self, bad: _Bad, values: _Values) -> None:
        rows = [self._order_place(bad.first_row), self._order_place(bad.end_row - 1) + 1]
        if bad.fault != "spike":
            why = (
                "its gradient is not finite"
                if bad.fault == "not finite"
                else f"its gradient norm {values.gradient_norm:.4g} is a spike"
            )
            logger.warning("step %d was skipped: %s (rows %d to %d)", bad.step, why, bad.first_row, bad.end_row - 1)
        incident: Incident = {"kind": bad.fault, "step": bad.step, "rows": rows}
        self._incidents = [*self._incidents[1 - INCIDENTS_KEPT :], incident]
        self._record(incident)

    def _require_few(self) -> None:
        """Raise where the row of bad steps is too long."""
        config, row = self._config, self._bad_in_a_row
        skipped = sum(bad.fault != "spike" for bad in row)
        stops = config.on_non_finite == "stop" and row[-1].fault == "not finite"
        most_skipped = 1 if config.on_non_finite == "rollback" and row[-1].fault == "not finite" else None
        most_skipped = most_skipped or config.max_skipped_in_a_row
        is_spiking = config.on_spike == "rollback" and len(row) >= config.spikes_before_rollback
        if not stops and skipped < most_skipped and not (is_spiking and row[-1].fault == "spike"):
            return
        steps = (
            f"step {row[0].step}" if len(row) == 1 else f"{len(row)} steps in a row ({row[0].step} to {row[-1].step})"
        )
        faults = sorted({bad.fault for bad in row})
        if stops:
            raise _stopped(f"{steps} had gradients that are not finite", row)
        raise RollBack(
            first_step=row[0].step,
            last_step=row[-1].step,
            first_row=row[0].first_row,
            end_row=row[-1].end_row,
            reason=f"{steps} went wrong ({' and '.join(_WORDS[fault] for fault in faults)})",
        )


_WORDS: Mapping[Fault, str] = {
    "not finite": "gradients that are not finite, not applied",
    "held back": "spikes of the gradient norm, not applied",
    "spike": "spikes",
}


@dataclass(frozen=True, kw_only=True)
class _Values:
    loss: float  # nats per token
    gradient_norm: float
    skipped: bool
    spike: bool


def _read(results: list[StepResult]) -> list[_Values]:
    """Read many steps with one wait."""
    if not results:
        return []
    device = results[0].loss.device
    columns = [
        torch.stack(
            [torch.as_tensor(getattr(result, name)).detach().reshape(()).double().to(device) for result in results]
        )
        for name in ("loss", "gradient_norm", "skipped", "spike")
    ]
    rows = torch.stack(columns, dim=1).tolist()
    return [
        _Values(loss=loss, gradient_norm=norm, skipped=bool(skipped), spike=bool(spike) and math.isfinite(norm))
        for loss, norm, skipped, spike in rows
    ]


def _stopped(found: str, row: list[_Bad]) -> DivergedError:
    return DivergedError(
        Problem(
            f"{found}, on rows {row[0].first_row} to {row[-1].end_row - 1} of the run; their updates were not applied",
            "guard.on_non_finite: stop allows none",
            "look at those rows (pretrain samples); lower optimizer.learning_rate or lengthen the warm-up; "
            "with fp16, try bf16; then resume from the last checkpoint",
        )
    )
