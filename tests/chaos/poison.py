"""Rows that make one rank's activations NaN, and stay so: skipped by all ranks together, or left out after a rollback.

What must hold: the weights stay finite, whichever rank met the rows the end is the same to the last bit, and so is that
of a run that was killed in between.
"""

from __future__ import annotations

import dataclasses

from pretrain.training.incidents import FILE_NAME, ROLLBACK, read_incidents
from tests.chaos.case import OTHER, Case, at_event

MODES = (  # what is done, steps whose rows are bad, overrides
    ("skipped", (6,), ()),
    ("skipped", (7, 11), ()),
    ("rolled back", (10, 11), ("guard.max_skipped_in_a_row=2",)),
)


def run_case(case: Case) -> None:
    """Poison rows on any rank, kill sometimes, and compare with a run whose rank 0 met them."""
    layout, undisturbed = case.choose_layout()
    mode, steps, overrides = case.random.choice(MODES)
    rank = case.random.randrange(layout.ranks)
    name = f"{mode} at {' '.join(map(str, steps))}"
    final, log = case.bench.final_of(layout, name, *overrides, faults=[_bad_rows(0, steps)])
    case.group = mode
    case.what = f"{layout.name}: rows of steps {steps} are NaN on rank {rank}"
    faults = [_bad_rows(rank, steps)]
    if not all(f"step {step} was skipped" in log for step in steps):
        case.wrong(OTHER, "the skipped steps are not told")
    if case.random.random() < 0.5:
        event = case.random.choice([one for one in undisturbed.whole_events if one.name.startswith("train step")])
        case.what += f", all killed at {event.name}"
        case.live(layout, *overrides, faults=[*faults, at_event(event, "kill all")])
    case.finish(layout, dataclasses.replace(undisturbed, final=final), *overrides, faults=faults)
    case.faults_done += 1
    if not all(bool(tensor.isfinite().all()) for tensor in final.tensors.values()):
        case.wrong(OTHER, "weights are not finite")
    kinds = {incident["kind"] for incident in read_incidents(case.run_folder / FILE_NAME)}
    if (ROLLBACK in kinds) != (mode == "rolled back"):
        case.wrong(OTHER, f"incidents.jsonl tells of {sorted(kinds)}")


def _bad_rows(rank: int, steps: tuple[int, ...]) -> dict[str, object]:
    return {"rank": rank, "action": "poison", "steps": list(steps)}
