"""Fits the planner's constants on published runs: `python -m tests.benchmarks.planning.fit_constants`.

Prints what to write into pretrain/planning/constants.py and devices.py, with each constant's uncertainty. Every
constant has a prior, the value that data sheets and papers suggest, so that a group of rows may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pretrain.planning.constants import CONSTANTS, SOFTWARE
from pretrain.planning.devices import DEVICES
from pretrain.planning.least_squares import Fit, Vector, fit_least_squares
from pretrain.planning.predict import Model, as_workload
from pretrain.planning.published_runs import PublishedRun, observed, read_runs
from pretrain.planning.published_shapes import PUBLISHED_RUNS
from pretrain.planning.step_time import predict_step
from pretrain.planning.workload import Workload

NOISE = 0.025  # of a published rate: the median change between two generations of software is 1.5%


@dataclass(frozen=True)
class Parameter:
    """One constant: where it stands, its prior, and the prior's standard deviation as a share of it."""

    owner: Literal["device", "software", "constants"]
    name: str
    field: str
    prior: float
    spread: float


PARAMETERS = (
    Parameter("device", "a100-40", "matmul_efficiency", 0.75, 0.2),
    Parameter("device", "a100-80", "matmul_efficiency", 0.8, 0.2),
    Parameter("device", "h100-80", "matmul_efficiency", 0.65, 0.3),
    Parameter("device", "a100-40", "attention_efficiency", 0.45, 0.5),
    Parameter("device", "a100-80", "attention_efficiency", 0.45, 0.5),
    Parameter("device", "h100-80", "attention_efficiency", 0.22, 0.5),
    Parameter("constants", "", "matmul_traffic", 1.0, 0.5),
    Parameter("constants", "", "elementwise_traffic", 1.5, 0.5),
    Parameter("constants", "", "attention_backward", 3.0, 0.2),
    Parameter("constants", "", "loss_traffic", 14.0, 0.4),
    Parameter("constants", "", "sharding_slowdown", 1.2, 0.3),
    Parameter("constants", "", "hop_seconds", 3e-6, 0.5),
    Parameter("constants", "", "straggling", 0.005, 0.7),
    Parameter("constants", "", "fp8_speed", 1.5, 0.15),
    Parameter("constants", "", "fp8_traffic", 4.0, 0.4),
    Parameter("constants", "", "score_traffic", 8.0, 0.3),
    Parameter("software", "torch 1", "recomputed_share", 1.0, 0.1),
    Parameter("software", "torch 2", "recomputed_share", 0.65, 0.2),
    Parameter("software", "torch 1", "exposed_share", 0.5, 0.4),
    Parameter("software", "torch 2", "exposed_share", 0.5, 0.3),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A published run and its workload, made once."""

    run: PublishedRun
    work: Workload

    @property
    def observed(self) -> float:
        """Tokens/s of one GPU."""
        assert self.run.tokens_per_second is not None
        return self.run.tokens_per_second

    def predicted(self, model: Model) -> float:
        """Tokens/s of one GPU."""
        device, software = model.devices[self.run.device.name], model.software[self.run.software]
        seconds = predict_step(self.work, device, software, model.constants).total
        return self.work.global_batch_tokens / self.work.devices / seconds


def read_cases() -> list[Case]:
    """Every row of the repository's file that says how fast it was."""
    return [Case(run=run, work=as_workload(run)[0]) for run in observed(read_runs(PUBLISHED_RUNS)[1])]


def build_model(values: Vector) -> Model:
    """The model with other constants; `values` are their logarithms, in the order of `PARAMETERS`."""
    changes: dict[tuple[str, str], dict[str, float]] = {}
    for parameter, value in zip(PARAMETERS, np.exp(values), strict=True):
        changes.setdefault((parameter.owner, parameter.name), {})[parameter.field] = float(value)
    devices, software, constants = dict(DEVICES), dict(SOFTWARE), CONSTANTS
    for (owner, name), fields in changes.items():
        if owner == "device":
            devices[name] = replace(devices[name], **fields)
        elif owner == "software":
            software[name] = replace(software[name], **fields)  # type: ignore[arg-type]
        else:
            constants = replace(constants, **fields)
    return Model(constants=constants, devices=devices, software=software)


def fit_model(cases: Sequence[Case], *, start: Vector | None = None, rounds: int = 20) -> tuple[Model, Fit]:
    """Fit all constants on these rows."""
    prior = np.log([parameter.prior for parameter in PARAMETERS])
    spread = np.array([parameter.spread for parameter in PARAMETERS])
    seen = np.log([case.observed for case in cases])

    def residuals(values: Vector) -> Vector:
        model = build_model(values)
        return np.log([case.predicted(model) for case in cases]) - seen

    found = fit_least_squares(
        residuals, prior if start is None else start, prior=prior, spread=spread, noise=NOISE, rounds=rounds
    )
    return build_model(found.parameters), found


def shipped_values() -> Vector:
    """The logarithms of the constants that the repository has."""
    owners: Mapping[str, Mapping[str, object]] = {"device": DEVICES, "software": SOFTWARE, "constants": {"": CONSTANTS}}
    return np.log([getattr(owners[one.owner][one.name], one.field) for one in PARAMETERS])


def main() -> None:
    cases = read_cases()
    _, found = fit_model(cases)
    deviations = np.sqrt(np.diag(found.covariance))
    print(f"{len(PARAMETERS)} constants on {len(cases)} rows")
    for parameter, value, deviation, old in zip(
        PARAMETERS, np.exp(found.parameters), deviations, np.exp(shipped_values()), strict=True
    ):
        place = f"{parameter.owner} {parameter.name} {parameter.field}"
        print(f"{place:45} {value:10.3g}  +- {deviation:4.0%}   prior {parameter.prior:.3g}  shipped {old:.3g}")


if __name__ == "__main__":
    main()
