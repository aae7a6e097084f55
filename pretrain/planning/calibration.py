"""Measures the present device and replaces a plan's constants: the suite's own step on a few small models.

Fits the constants of step_time.py on those steps, and the rate of links between two processes. The result is a JSON
file that `--gpus 8xFILE.json` takes as a device. The only part of planning that runs torch.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.errors import ConfigError, Problem
from pretrain.models.architecture import resolve_architecture
from pretrain.models.flops import peak_flops
from pretrain.planning.constants import CONSTANTS, SOFTWARE, Constants, Software
from pretrain.planning.devices import DEVICES, GIB, Device
from pretrain.planning.least_squares import Vector, fit_least_squares
from pretrain.planning.step_time import predict_step
from pretrain.planning.workload import Arithmetic, Recomputation, Workload

if TYPE_CHECKING:
    import torch

    from pretrain.config import RunConfig
    from pretrain.models.batch import Batch

MATMUL_SIZE, COPY_BYTES = {"cpu": 768, "cuda": 8192}, {"cpu": 2**26, "cuda": 2**30}
REPEATS = 4  # of a step, after one that is not counted; the quickest counts
LINK_BYTES = 2**24
NOISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model and its step."""

    hidden: int
    layers: int
    length: int  # tokens of a row
    rows: int  # of a micro-batch
    vocabulary: int = 2048
    micro_batches: int = 1
    recomputation: Recomputation = "none"
    precision: Arithmetic = "bf16"

    @property
    def name(self) -> str:
        """Short."""
        again = " recomputed" if self.recomputation != "none" else ""
        return (
            f"width {self.hidden}, {self.layers} layers, {self.rows} x {self.length} tokens x {self.micro_batches}, "
            f"{self.vocabulary} words{again}"
        )


# Each stresses another part: matmuls, width, long rows, the loss, layers without work, the optimizer.
CASES = (
    Case(hidden=256, layers=4, length=256, rows=4),
    Case(hidden=512, layers=2, length=256, rows=4),
    Case(hidden=256, layers=2, length=1024, rows=1),
    Case(hidden=256, layers=1, length=256, rows=4, vocabulary=16384),
    Case(hidden=128, layers=8, length=64, rows=2, micro_batches=2),
    Case(hidden=512, layers=2, length=32, rows=1),
    Case(hidden=384, layers=4, length=256, rows=4, recomputation="full"),
)
CROWDED = Case(hidden=256, layers=2, length=256, rows=4, precision="fp32")  # taken on two ranks at once


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a device was found to do."""

    device: Device
    constants: Constants
    software: Software

    def seconds(self, work: Workload) -> float:
        """Of a step."""
        return predict_step(work, self.device, self.software, self.constants).total


def case_config(case: Case, *, data: int = 1, parallel: dict[str, Any] | None = None) -> RunConfig:
    """The run of a case; every data rank takes the same number of micro-batches."""
    from pretrain.config import RunConfig

    return RunConfig.model_validate(
        {
            "name": "calibration",
            "model": {
                "model_type": "llama",
                "vocab_size": case.vocabulary,
                "hidden_size": case.hidden,
                "intermediate_size": case.hidden * 5 // 2,
                "num_hidden_layers": case.layers,
                "num_attention_heads": case.hidden // 64,
                "num_key_value_heads": case.hidden // 64,
                "max_position_embeddings": case.length,
            },
            "data": {"train": "random"},
            "batch": {
                "sequence_length": case.length,
                "micro_batch_size": case.rows,
                "global_batch_size": case.rows * case.micro_batches * data,
            },
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"total_steps": 1000},
            "parallel": parallel or {"engine": "plain"},
            "precision": case.precision,
            "execution": {"recomputation": case.recomputation},
        }
    )


def case_work(case: Case, **layout: Any) -> Workload:
    """A case as a workload."""
    shape = resolve_architecture(case_config(case).model, case.length)
    return Workload(
        shape=shape,
        sequence_length=case.length,
        micro_batch_size=case.rows,
        micro_batches=case.micro_batches,
        recomputation=case.recomputation,
        arithmetic=case.precision,
        **layout,
    )


def random_batches(case: Case, seed: int) -> list[Batch]:
    """The micro-batches of one step of one rank."""
    import torch

    from pretrain.models.batch import Batch

    generator = torch.Generator().manual_seed(seed)
    rows, length = case.rows, case.length
    return [
        Batch(
            input_ids=torch.randint(0, case.vocabulary, (rows, length), generator=generator),
            labels=torch.randint(0, case.vocabulary, (rows, length), generator=generator),
            position_ids=torch.arange(length).expand(rows, -1).contiguous(),
            cumulative_lengths=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
            longest_document=length,
            target_count=rows * length,
        )
        for _ in range(case.micro_batches)
    ]


def case_step(case: Case, device: torch.device) -> Callable[[], object]:
    """The plain engine's step."""
    from pretrain.engines.plain import PlainEngine
    from pretrain.models.build import ModelBuilder

    config = case_config(case)
    builder = ModelBuilder(
        config.model,
        seed=0,
        sequence_length=case.length,
        execution=config.execution,
        loss=config.loss,
        precision=config.precision,
    )
    engine = PlainEngine(config, builder, device)
    batches = random_batches(case, 0)

    def step() -> None:
        engine.train_step(batches, 1).loss.item()  # the host waits for the whole step

    return step


def quickest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of some calls, the first left out."""
    import torch

    work()
    found = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(_seconds(work, waits_for_gpu=device.type == "cuda"))
    return min(found)


def _seconds(work: Callable[[], object], *, waits_for_gpu: bool = False) -> float:
    """Of a call. One thread of a CPU counts its own time, so other programs do not."""
    import torch

    clock = time.process_time if not waits_for_gpu and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    if waits_for_gpu:
        torch.cuda.synchronize()
    return clock() - started


def calibrate(report: Callable[[str], None]) -> Calibration:
    """Measure the device that torch sees. Takes seconds on a GPU, under a minute on a quiet CPU."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = _start(device)
    report(
        f"{start.name}, {start.precision}: {start.peak_flops / 1e12:.3g} TFLOP/s of large matmuls, "
        f"{start.memory_bandwidth / 1e9:.3g} GB/s, links {start.node_bandwidth / 1e9:.3g} GB/s, "
        f"computing takes {start.crowding:.2f} times as long on two ranks at once"
    )
    cases = [replace(case, precision=start.precision) for case in CASES]
    seconds = []
    for case in cases:
        seconds.append(quickest(case_step(case, device), device))
        report(f"{case.name}: {seconds[-1]:.4f} s")
    found = fit_cases(cases, seconds, start)
    for case, taken in zip(cases, seconds, strict=True):
        report(f"{case.name}: fitted {found.seconds(case_work(case)) / taken - 1:+.1%}")
    return found


def fit_cases(cases: Sequence[Case], seconds: Sequence[float], start: Device) -> Calibration:
    """The constants that explain measured steps."""
    works = [case_work(case) for case in cases]
    seen = np.log(np.array(seconds))
    base = replace(SOFTWARE["athanor"], name="calibrated", exposed_share=1.0)

    def build(values: Vector) -> Calibration:
        matmul, attention, elementwise, loss, optimizer, layer = (float(value) for value in np.exp(values))
        return Calibration(
            device=replace(start, matmul_efficiency=matmul, attention_efficiency=attention, layer_seconds=layer),
            constants=replace(
                CONSTANTS, elementwise_traffic=elementwise, loss_traffic=loss, sharding_slowdown=1.0, straggling=0.0
            ),
            software=replace(base, optimizer_bytes=optimizer),
        )

    def residuals(values: Vector) -> Vector:
        told = build(values)
        return np.asarray(np.log([told.seconds(work) for work in works]) - seen)

    prior = np.log([0.6, 0.1, 2.0, 40.0, 60.0, 5e-4 if start.name.startswith("cpu") else 1e-5])
    spread = np.array([0.5, 1.0, 1.0, 1.0, 1.0, 1.5])
    found = fit_least_squares(residuals, prior, prior=prior, spread=spread, noise=NOISE, rounds=60)
    return build(found.parameters)


def save_calibration(found: Calibration, path: Path) -> None:
    """Write the JSON file.

    Raises:
        ConfigError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem(f"--output {path}: {error}", "a place for a file", "name another one")) from error


def load_calibration(path: Path) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        ConfigError: the file is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(
            device=Device(**values["device"]),
            constants=Constants(**values["constants"]),
            software=Software(**values["software"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            Problem(f"{path} is no calibration: {error}", "a file of pretrain plan --calibrate", "calibrate again")
        ) from error


def _start(device: torch.device) -> Device:
    """What is measured directly: large matmuls, copies, links; the rest is a like device's.

    A CPU without instructions for bf16 multiplies it fifty times slower than fp32, which is measured there instead.
    """
    import torch

    size = MATMUL_SIZE[device.type]
    rates = {}
    for candidate, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        matrix = torch.randn(size, size, device=device).to(kind)
        rates[candidate] = 2 * size**3 / quickest(partial(torch.mm, matrix, matrix), device)
    precision: Arithmetic = "bf16" if device.type == "cuda" or rates["bf16"] >= rates["fp32"] else "fp32"
    rate = rates[precision]
    source = torch.empty(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * COPY_BYTES[device.type] / quickest(lambda: target.copy_(source), device)
    bandwidth, crowding = _measure_pair(device)
    nodes = bandwidth if device.type == "cpu" else None  # of GPUs, what joins hosts is the data sheet's
    if device.type == "cuda":
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        nearest = DEVICES["h100-80" if "H" in name else "a100-80"]
        peak = float(peak_flops(name) or rate / nearest.matmul_efficiency)
        usable, devices = total - 0.8 * GIB, torch.cuda.device_count()
    else:
        import psutil

        name, nearest, peak = f"cpu-{precision}", DEVICES["cpu"], rate
        devices = psutil.cpu_count(logical=False) or 1
        usable = psutil.virtual_memory().total / devices
    return replace(
        nearest,
        name=name.lower().replace(" ", "-"),
        precision=precision,
        peak_flops=peak,
        memory_bandwidth=copied,
        usable_bytes=float(usable),
        node_devices=devices,
        node_bandwidth=bandwidth or nearest.node_bandwidth,
        network_bandwidth=nodes or nearest.network_bandwidth,
        crowding=crowding,
    )


def _measure_pair(device: torch.device) -> tuple[float | None, float]:
    """Of two processes: bytes/s of their ring, and how many times as long computing takes both at once as one alone.

    None, and 1, where there is but one GPU; GPUs share neither memory nor caches.
    """
    import torch
    import torch.multiprocessing as processes

    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return None, 1.0
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(  # type: ignore[attr-defined,no-untyped-call]
            _exchange, args=(folder, device.type, torch.get_num_threads()), nprocs=2
        )
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    return LINK_BYTES / max(1e-9, found["all_reduce_seconds"]), found["crowding"]


def _exchange(rank: int, folder: str, kind: str, threads: int) -> None:
    """On one of two processes: time all-reduces, each of which sends its bytes once through the ring, and steps."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    values = torch.zeros(LINK_BYTES // 4, device=device)

    def work() -> None:
        dist.all_reduce(values)
        if kind == "cuda":
            torch.cuda.synchronize()

    work()
    taken = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    found = {"all_reduce_seconds": min(taken), "crowding": 1.0 if kind == "cuda" else _crowding(rank)}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _crowding(rank: int) -> float:
    """On both of two processes: rank 0 takes a step alone and beside the other's, in turns; the quickest of each."""
    import torch
    import torch.distributed as dist

    step = case_step(CROWDED, torch.device("cpu"))
    alone, beside = [], []
    for _ in range(REPEATS + 1):
        dist.barrier()
        beside.append(_seconds(step))
        dist.barrier()
        if rank == 0:
            alone.append(_seconds(step))
    return max(1.0, min(beside[1:]) / min(alone[1:])) if rank == 0 else 1.0
