"""A scaling law fitted on the user's own small runs, with confidence bands.

Reads run folders and fits; the form of the law is scaling_laws.py's, the picture pages.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import load_config
from pretrain.errors import ConfigError, DataError, Problem
from pretrain.models.architecture import UnknownFamily, resolve_architecture
from pretrain.models.parameter_count import count_parameters
from pretrain.planning.least_squares import Matrix, Vector, fit_least_squares
from pretrain.planning.scaling_laws import FLOPS_PER_TOKEN, ScalingLaw, best_point

FEWEST = 4  # runs
LAST_SHARE = 0.05  # of the training lines, whose mean is the loss of a run that was never validated
NOISE = 0.01  # of a loss, as a share: two seeds of a small run
DRAWS = 400  # of laws from the fit's uncertainty
BAND = (5.0, 95.0)  # percentiles
EXPONENT = (0.35, 0.08)  # prior of both exponents and its deviation: the published ones lie between 0.28 and 0.37


@dataclass(frozen=True, kw_only=True)
class RunPoint:
    """How one run ended."""

    name: str
    parameters: int
    tokens: int
    loss: float  # nats per token
    is_validated: bool

    @property
    def flops(self) -> float:
        """Of its training, as the laws count."""
        return FLOPS_PER_TOKEN * self.parameters * self.tokens


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """The law that fits best, and laws that fit nearly as well."""

    law: ScalingLaw
    draws: tuple[ScalingLaw, ...]
    points: tuple[RunPoint, ...]
    relative_errors: Vector

    def band(self, flops: float) -> tuple[float, float]:
        """Nine tenths of the expected losses at the optimum of a budget."""
        size = self.law.best_parameters(flops)
        losses = [draw.loss(size, flops / FLOPS_PER_TOKEN / size) for draw in self.draws]
        low, high = np.percentile(losses, BAND)
        return float(low), float(high)

    def size_band(self, flops: float) -> tuple[float, float]:
        """Nine tenths of the best sizes for a budget."""
        low, high = np.percentile([draw.best_parameters(flops) for draw in self.draws], BAND)
        return float(low), float(high)


def read_points(folders: Sequence[Path]) -> list[RunPoint]:
    """The ends of runs.

    Raises:
        DataError: folders are no runs, or hold no loss; all of them are named.
    """
    points, problems = [], []
    for folder in folders:
        try:
            points.append(_read_point(folder))
        except (ConfigError, DataError) as error:
            problems += [
                Problem(f"{folder}: {problem.found}", problem.allowed, problem.change) for problem in error.problems
            ]
        except UnknownFamily as family:
            problems.append(Problem(f"{folder}: model_type {family}", "a family of families.py", "leave it out"))
    if problems:
        raise DataError(*problems)
    return points


def fit_runs(points: Sequence[RunPoint]) -> FittedLaw:
    """Fit floor, terms and exponents on the logarithm of the losses, as Hoffmann et al. 2022 (section 3.3) do.

    The exponents are held near published ones, so that few runs still give a law, with wide bands.

    Raises:
        DataError: too few runs, or all of one size or one length.
    """
    _enough(points)
    sizes, tokens, losses = (
        np.array([getattr(point, name) for point in points], dtype=np.float64)
        for name in ("parameters", "tokens", "loss")
    )
    center = (float(np.exp(np.log(sizes).mean())), float(np.exp(np.log(tokens).mean())))

    def law_of(values: Vector) -> ScalingLaw:
        floor, size_part, data_part = (float(value) for value in np.exp(values[:3]))
        alpha, beta = (float(value) for value in values[3:])
        return ScalingLaw(
            name="own runs",
            source=f"{len(points)} runs",
            floor=floor,
            size_term=size_part * center[0] ** alpha,
            size_exponent=alpha,
            data_term=data_part * center[1] ** beta,
            data_exponent=beta,
        )

    def residuals(values: Vector) -> Vector:
        law = law_of(values)
        with np.errstate(over="ignore", invalid="ignore"):
            predicted = law.floor + law.size_term / sizes**law.size_exponent + law.data_term / tokens**law.data_exponent
            return np.asarray(np.log(predicted) - np.log(losses))

    least = float(losses.min())
    start = np.array([np.log(0.6 * least), np.log(0.2 * least), np.log(0.2 * least), EXPONENT[0], EXPONENT[0]])
    spread = np.array([0.5, 1.0, 1.0, EXPONENT[1], EXPONENT[1]])
    found = fit_least_squares(residuals, start, prior=start, spread=spread, noise=NOISE, rounds=200)
    noise = max(1.0, float(np.sqrt(np.mean((found.residuals / NOISE) ** 2))))
    return FittedLaw(
        law=law_of(found.parameters),
        draws=tuple(law_of(values) for values in _draw(found.parameters, found.covariance * noise**2)),
        points=tuple(points),
        relative_errors=np.expm1(found.residuals),
    )


def fit_lines(fitted: FittedLaw) -> Iterator[str]:
    """The law, how well it fits, and what larger budgets should reach."""
    law, draws = fitted.law, fitted.draws
    yield (
        f"loss = {law.floor:.3f} + {law.size_term:.4g} / parameters^{law.size_exponent:.3f} + "
        f"{law.data_term:.4g} / tokens^{law.data_exponent:.3f}"
    )
    size = np.percentile([draw.size_exponent for draw in draws], BAND)
    data = np.percentile([draw.data_exponent for draw in draws], BAND)
    yield (
        f"90% of the laws that fit: exponents {size[0]:.2f} to {size[1]:.2f} of size, "
        f"{data[0]:.2f} to {data[1]:.2f} of data; errors on the runs at most {abs(fitted.relative_errors).max():.2%}"
    )
    if not all(point.is_validated for point in fitted.points):
        yield "some runs were never validated: their loss is the mean of the last training lines"
    largest = max(point.flops for point in fitted.points)
    yield f"{'FLOPs':>10}  {'best size':>10}  {'(90%)':>17}  {'tokens':>8}  {'loss':>6}  (90%)"
    for factor in (1, 10, 100, 1000):
        flops = largest * factor
        best = best_point(law, flops)
        low, high = fitted.band(flops)
        small, large = fitted.size_band(flops)
        sizes = f"{small / 1e6:,.0f}M to {large / 1e6:,.0f}M"
        yield (
            f"{flops:10.2g}  {best.parameters / 1e6:>9,.0f}M  {sizes:>17}  {best.tokens / 1e9:>7,.2f}B  "
            f"{best.loss:6.3f}  {low:.3f} to {high:.3f}"
        )


def _draw(center: Vector, covariance: Matrix) -> Iterator[Vector]:
    """Laws from the fit's normal approximation; exponents that are none are left out."""
    generator = np.random.default_rng(0)
    for values in generator.multivariate_normal(center, covariance, size=DRAWS):
        if values[3] > 0.05 and values[4] > 0.05:
            yield values


def _enough(points: Sequence[RunPoint]) -> None:
    sizes, lengths = ({getattr(point, name) for point in points} for name in ("parameters", "tokens"))
    if len(points) < FEWEST or len(sizes) < 2 or len(lengths) < 2:
        raise DataError(
            Problem(
                f"{len(points)} runs of {len(sizes)} sizes and {len(lengths)} lengths",
                f"{FEWEST} runs or more, of two sizes and two lengths at least",
                "train some more small runs, each with its own whole schedule",
            )
        )


def _read_point(folder: Path) -> RunPoint:
    config = load_config(folder / "config.yaml")
    shape = resolve_architecture(config.model, config.batch.sequence_length)
    lines = list(_lines(folder / "metrics.jsonl"))
    training = [line for line in lines if "loss" in line and "tokens" in line]
    if not training:
        raise DataError(Problem("no training line in metrics.jsonl", "a run that trained", "leave the folder out"))
    validated = [
        value
        for line in lines
        for name, value in line.items()
        if name.startswith("validation/") and name.endswith("/loss")
    ]
    last = training[-max(1, round(LAST_SHARE * len(training))) :]
    loss = validated[-1] if validated else float(np.mean([line["loss"] for line in last]))
    if not (np.isfinite(loss) and loss > 0):
        raise DataError(Problem(f"its loss is {loss}", "a finite number above 0", "leave the folder out"))
    return RunPoint(
        name=folder.name,
        parameters=count_parameters(shape).total,
        tokens=int(training[-1]["tokens"]),
        loss=loss,
        is_validated=bool(validated),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(Problem(str(error), "a run folder with metrics.jsonl", "leave the folder out")) from error
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut off
        if isinstance(value, dict):
            yield value
