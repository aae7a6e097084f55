"""How far predictions of published runs are off: `python -m tests.benchmarks.planning.report [--plot FILE.html]`.

Every row is predicted by constants that were fitted without it (5 folds); then whole groups are left out. Beside it
stand two baselines under the same folds: one constant for each kind of GPU, and the nearest known row.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pretrain.planning.published_memory import published_memory
from pretrain.planning.published_runs import source_flops_per_token
from pretrain.planning.svg import COLOURS, Chart
from tests.benchmarks.planning.fit_constants import Case, fit_model, read_cases, shipped_values

FOLDS, SEEDS, ROUNDS = 5, (0, 1), 6
APART = 0.02  # pairs nearer than this are not ranked
Predictor = Callable[[Sequence[Case], Sequence[Case]], list[float]]
GROUPS: dict[str, tuple[Callable[[Case], bool], str]] = {
    "sizes 7b and 13b": (lambda case: case.run.cells["model"] in ("mpt-7b", "mpt-13b"), "7 / 15"),
    "sizes 30b and 70b": (lambda case: case.run.cells["model"] in ("mpt-30b", "mpt-70b"), "7 / 15"),
    "several nodes": (lambda case: case.run.devices > 8 and source(case) == "MPT", "5 / 10"),
    "rows over 8192": (lambda case: case.run.sequence_length > 8192, "7 / 12"),
    "Megatron": (lambda case: source(case) == "Megatron", "8 / 13"),
}


def source(case: Case) -> str:
    return "MPT" if "MPT" in case.run.cells["source"] else "Megatron"


def by_model(known: Sequence[Case], asked: Sequence[Case]) -> list[float]:
    model, _ = fit_model(known, start=shipped_values(), rounds=ROUNDS)
    return [case.predicted(model) for case in asked]


def by_constant(known: Sequence[Case], asked: Sequence[Case]) -> list[float]:
    """One utilisation for each kind of GPU and arithmetic: the median of the known rows."""
    found = []
    for case in asked:
        alike = [one for one in known if _kind(one) == _kind(case)] or list(known)
        found.append(float(np.median([_utilisation(one) for one in alike])) * case.run.peak_flops / _flops(case))
    return found


def by_nearest(known: Sequence[Case], asked: Sequence[Case]) -> list[float]:
    """The utilisation of the most similar known row."""

    def distance(one: Case, other: Case) -> float:
        mine, others = one.run, other.run
        return (
            10 * (_kind(one) != _kind(other))
            + abs(math.log(one.work.count.total / other.work.count.total))
            + 0.5 * abs(math.log(mine.sequence_length / others.sequence_length))
            + 0.2 * abs(math.log(mine.devices / others.devices))
            + (mine.recomputation != others.recomputation)
        )

    found = []
    for case in asked:
        nearest = min(known, key=lambda one: distance(case, one))
        found.append(_utilisation(nearest) * case.run.peak_flops / _flops(case))
    return found


def crossed(cases: Sequence[Case], predictor: Predictor) -> dict[int, list[float]]:
    """Predictions of every row, by line, from folds that leave it out."""
    found: dict[int, list[float]] = {case.run.line: [] for case in cases}
    for seed in SEEDS:
        order = list(cases)
        random.Random(seed).shuffle(order)
        for fold in range(FOLDS):
            asked = order[fold::FOLDS]
            known = [case for case in order if case not in asked]
            for case, rate in zip(asked, predictor(known, asked), strict=True):
                found[case.run.line].append(rate)
    return found


def errors(cases: Sequence[Case], rates: dict[int, list[float]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([abs(rate / case.observed - 1) for case in cases for rate in rates[case.run.line]])


def table(cases: Sequence[Case], predicted: dict[str, dict[int, list[float]]]) -> Iterator[str]:
    yield "| rows | count | " + " | ".join(f"{name}: median / p90, %" for name in predicted) + " |"
    yield "|---|---:|" + "---:|" * len(predicted)
    parts = {"all": list(cases)}
    for case in cases:
        parts.setdefault(f"{source(case)} on {case.run.device.name}, {case.run.cells['precision']}", []).append(case)
    for name, mine in parts.items():
        cells = []
        for rates in predicted.values():
            found = 100 * errors(mine, rates)
            cells.append(f"{np.median(found):.1f} / {np.quantile(found, 0.9):.1f}")
        yield f"| {name} | {len(mine)} | {' | '.join(cells)} |"


def group_lines(cases: Sequence[Case]) -> Iterator[str]:
    yield "| left out of the fit | rows | median / p90, % | aim |\n|---|---:|---:|---:|"
    for name, (belongs, aim) in GROUPS.items():
        asked = [case for case in cases if belongs(case)]
        rates = by_model([case for case in cases if not belongs(case)], asked)
        found = [100 * abs(rate / case.observed - 1) for case, rate in zip(asked, rates, strict=True)]
        yield f"| {name} | {len(asked)} | {np.median(found):.1f} / {np.quantile(found, 0.9):.1f} | {aim} |"


def ranked(cases: Sequence[Case], rates: dict[int, list[float]]) -> tuple[int, int]:
    """Pairs of the same model and GPU in the right order, and all such pairs."""
    right = total = 0
    for place, one in enumerate(cases):
        for other in cases[:place]:
            same = one.run.cells["model"] == other.run.cells["model"] and one.run.device == other.run.device
            if same and abs(one.observed / other.observed - 1) > APART:
                total += 1
                mine, others = rates[one.run.line][0], rates[other.run.line][0]
                right += (mine > others) == (one.observed > other.observed)
    return right, total


def memory_line(cases: Sequence[Case]) -> str:
    known = [case.run for case in cases if case.run.micro_batch_size]
    shares = []
    for times in (1, 2, 3):
        refused = [
            published_memory(run, times * (run.micro_batch_size or 1)) > run.device.usable_bytes for run in known
        ]
        shares.append(f"{np.mean(refused):.0%} at {times} x")
    return f"memory of {len(known)} runs that ran, refused: {', '.join(shares)} their micro-batch"


def scatter(cases: Sequence[Case], rates: dict[int, list[float]]) -> str:
    chart = Chart(
        title="tokens/s of one GPU: predicted by folds that leave the row out, and published",
        x_label="published",
        y_label="predicted",
        x_range=(10, 300_000),
        y_range=(10, 300_000),
        x_log=True,
        y_log=True,
        width=820,
        height=640,
    )
    chart.line((10, 300_000), (10, 300_000), name="equal", colour="#888", dashed=True)
    kinds = sorted({case.run.device.name for case in cases})
    for kind, colour in zip(kinds, COLOURS, strict=False):
        mine = [case for case in cases if case.run.device.name == kind]
        told = [rates[case.run.line][0] for case in mine]
        notes = [
            f"line {case.run.line}: {case.run.cells['model']}, {case.run.sequence_length} tokens, "
            f"{case.run.devices} GPUs: {rate / case.observed - 1:+.1%}"
            for case, rate in zip(mine, told, strict=True)
        ]
        chart.points([case.observed for case in mine], told, name=kind, colour=colour, notes=notes)
    return chart.text()


def _kind(case: Case) -> tuple[str, str]:
    return case.run.device.name, case.run.arithmetic


def _flops(case: Case) -> float:
    return source_flops_per_token(case.run)


def _utilisation(case: Case) -> float:
    return case.observed * _flops(case) / case.run.peak_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE.html")
    plot = parser.parse_args().plot
    cases = read_cases()
    predictors: dict[str, Predictor] = {
        "the model": by_model,
        "one constant a GPU kind": by_constant,
        "nearest row": by_nearest,
    }
    predicted = {name: crossed(cases, predictor) for name, predictor in predictors.items()}
    print("\n".join(table(cases, predicted)), flush=True)
    model = predicted["the model"]
    found = errors(cases, model)
    print(f"within 10%: {np.mean(found <= 0.1):.0%}; worst {found.max():.0%}")
    right, total = ranked(cases, model)
    print(f"pairs in the right order: {right} of {total} ({right / total:.1%})")
    print(memory_line(cases))
    if plot is not None:
        head = '<!doctype html><meta charset="utf-8"><title>Predicted and published</title>'
        plot.write_text(head + scatter(cases, model), encoding="utf-8")
    print("\n".join(group_lines(cases)), flush=True)


if __name__ == "__main__":
    main()
