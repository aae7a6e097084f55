"""Compares a cell of the matrix with the plain engine, and keeps what was found for the parity report.

`python -m tests.pretrain.engines.parity` turns the findings of the last test runs into PARITY.md.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from pretrain.checkpoint.fragments import KINDS, MASTER
from pretrain.run_plan import plan_run
from tests.distributed.ranks import REPOSITORY, RankPool, run_on_ranks
from tests.pretrain.engines.cases import Case, Outcome, assemble, train_case
from tests.pretrain.engines.cell import Cell
from tests.pretrain.engines.matrix import CELLS

Pool = Callable[[int], RankPool]

FINDINGS = REPOSITORY / ".cache" / "parity.jsonl"
REPORT = Path(__file__).with_name("PARITY.md")
DEADLINE_SECONDS = 240


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Largest relative differences; of the state, the norm of the difference over the norm."""

    loss: float
    gradient_norm: float
    weights: float
    moments: float


# Moments remember single gradients, in which sums in another order show most; ZeRO-3 also leaves out the 1e-6 that is
# added to the norm in the clip coefficient elsewhere. bf16 rounds weights and micro-batch gradients at 2^-8, and tensor
# ranks each their part of a sum.
TOLERANCES = {
    "fp32": Differences(loss=1e-5, gradient_norm=1e-5, weights=1e-5, moments=5e-5),
    "bf16": Differences(loss=1e-4, gradient_norm=2e-3, weights=1e-2, moments=2e-2),
}


def compare(rank_pool: Pool, cell: Cell) -> Differences:
    """Train a cell and the reference; assert that they agree, on every rank, and write down how well."""
    if cell.fresh:
        outcomes = run_on_ranks(cell.ranks, train_case, cell.case, deadline_seconds=DEADLINE_SECONDS)
    else:
        outcomes = rank_pool(cell.ranks).run(train_case, cell.case, deadline_seconds=DEADLINE_SECONDS)
    reference = plain(rank_pool, cell.case)
    for outcome in outcomes:
        assert not any(outcome.skipped)
        assert outcome.losses == outcomes[0].losses, "ranks report different losses"
        assert outcome.norms == outcomes[0].norms, "ranks report different norms"
        assert outcome.evaluation[1] == reference.evaluation[1]
        assert outcome.scalars["optimizer_steps"] == reference.scalars["optimizer_steps"] == len(reference.losses)
    weights, moments = state_differences(outcomes, reference)
    differences = Differences(
        loss=max(
            _largest(outcomes[0].losses, reference.losses),
            _largest([outcomes[0].evaluation[0]], [reference.evaluation[0]]),
        ),
        gradient_norm=_largest(outcomes[0].norms, reference.norms),
        weights=weights,
        moments=moments,
    )
    _keep(cell, differences)
    allowed = asdict(TOLERANCES[cell.case.precision])
    assert {key: value for key, value in asdict(differences).items() if not value <= allowed[key]} == {}
    return differences


def state_differences(outcomes: list[Outcome], reference: Outcome) -> tuple[float, float]:
    """Of the logical weights and moments that the ranks hold together, against those of one process."""
    found, expected = assemble(outcomes), assemble([reference])
    assert found.keys() == expected.keys()
    relative = {}
    for kind in KINDS:
        keys = [key for key in expected if key[1] == kind]
        difference, size = (
            math.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in group))
            for group in ([found[key] - expected[key] for key in keys], [expected[key] for key in keys])
        )
        relative[kind] = difference / size
    return relative[MASTER], max(value for kind, value in relative.items() if kind != MASTER)


def plain(rank_pool: Pool, case: Case) -> Outcome:
    """The reference takes micro-batches of the same size: in bf16 each is rounded by itself."""
    usual = Case()
    layout = ("tensor", "pipeline", "sequence", "expert", "pipeline_schedule", "data_parallel")
    savings = ("zero_stage", "offload_optimizer", "offload_parameters", "recomputation", "recompute_every", "compile")
    file = ("ds_config", "sizes_divided_by")
    return _plain(
        rank_pool(1), replace(case, engine="plain", **{key: getattr(usual, key) for key in (*layout, *savings, *file)})
    )


@cache
def _plain(pool: RankPool, case: Case) -> Outcome:
    [outcome] = pool.run(train_case, case)
    return outcome


def _largest(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def _keep(cell: Cell, differences: Differences) -> None:
    FINDINGS.parent.mkdir(exist_ok=True)
    memory = plan_run(cell.case.config, cell.ranks).memory
    state = memory.weights + memory.gradients + memory.master_weights + memory.moments + memory.host
    finding = {
        "layout": str(cell),
        "precision": cell.case.precision,
        "ranks": cell.ranks,
        "commit": _commit(),
        **asdict(differences),
        "state": state,
    }
    with FINDINGS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finding) + "\n")


@cache
def _commit() -> str:
    """Of the code that gave the numbers, as far as git knows it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def main() -> None:
    """Write the report: the last finding of every cell of the matrix, and which have none."""
    found = {row["layout"]: row for row in map(json.loads, FINDINGS.read_text(encoding="utf-8").splitlines())}
    lines = [
        "# Parity of the layouts with one plain process",
        "",
        "Written by `python -m tests.pretrain.engines.parity` from the findings of the tests: five steps on packed",
        "documents with clipping active, then one evaluation. Largest relative differences; of weights and moments the",
        "norm of the difference over the norm. State: bytes of weights, gradients, masters and moments of one rank as",
        "`pretrain check` predicts them, which `test_memory_of_engines.py` holds against what the ranks hold. At: the",
        "commit of the code that gave the numbers.",
        "",
        "| layout | ranks | loss | gradient norm | weights | moments | state bytes a rank | at |",
        "|---|---|---|---|---|---|---|---|",
    ]
    layouts = sorted(str(cell) for cell in CELLS)
    for layout in [layout for layout in layouts if layout in found]:
        row = found[layout]
        numbers = " | ".join(f"{row[key]:.1e}" for key in ("loss", "gradient_norm", "weights", "moments"))
        name, commit = layout.rpartition(" ")[0] or "usual", row["commit"]
        lines.append(f"| {name} | {row['ranks']} | {numbers} | {row['state']:,} | {commit} |")
    missing = [layout for layout in layouts if layout not in found]
    if missing:
        lines += ["", "Not run: " + "; ".join(missing) + "."]
    lines += [
        "",
        "## One run on five layouts",
        "",
        "`python -m tests.launch.layout_changes DATASET FOLDER --plot FILE.png`: a run stops every 20 steps and",
        "goes on with the next layout; the grey line is one process that never stops.",
        "",
        "![losses of both runs](layout_changes.png)",
    ]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
