"""The best layouts for a request: every legal one with its memory and time, the fastest that fit first.

Owns the judgement; legality is layouts.py's, memory pretrain/models/memory.py's, time step_time.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from pretrain.batch_plan import build_batch_plan
from pretrain.compatibility import choose_engine
from pretrain.config import RunConfig
from pretrain.errors import ConfigError, Problem
from pretrain.models.flops import count_flops
from pretrain.models.memory import MemoryEstimate, estimate_memory
from pretrain.planning.deepspeed_settings import settings_of
from pretrain.planning.devices import GIB
from pretrain.planning.goodput import Goodput, best_interval
from pretrain.planning.layouts import Choice, all_choices, build_config, offloaded_choices, refusals
from pretrain.planning.request import Request
from pretrain.planning.step_time import StepTime, predict_step
from pretrain.planning.workload import Workload
from pretrain.run_plan import layout_of, read_buffers, step_of
from pretrain.topology import build_topology

FRAMEWORK_BYTES = 2 * GIB  # context, kernels' work space
FRAGMENTATION = 1.04  # what the allocator holds for each byte in use
CHECKPOINT_BYTES = 12  # a parameter: fp32 master and two moments


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One legal layout and what it costs."""

    request: Request
    choice: Choice
    config: RunConfig
    work: Workload
    memory: MemoryEstimate
    step: StepTime
    goodput: Goodput

    @property
    def needed_bytes(self) -> float:
        """Of the fullest device, the framework and fragmentation included."""
        return self.memory.total * FRAGMENTATION + FRAMEWORK_BYTES

    @property
    def fits(self) -> bool:
        """Whether the device has that, and its host what is offloaded."""
        device = self.request.device
        return self.needed_bytes <= device.usable_bytes and self.host_bytes <= device.host_bytes

    @property
    def host_bytes(self) -> float:
        """Of one host's memory."""
        return self.memory.host * min(self.request.node_devices, self.request.devices)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job, without failures."""
        return self.request.global_batch_tokens / self.step.total

    @property
    def mfu(self) -> float:
        """Share of the peak, by the FLOPs that the mathematics needs (flops.py: causal attention is halved)."""
        flops = count_flops(self.request.shape, self.work.count, self.request.sequence_length).training
        return self.tokens_per_second * flops / (self.request.devices * self.request.device.peak_flops)

    @property
    def days(self) -> float:
        """Until all tokens are trained on, failures included."""
        return self.request.tokens / self.tokens_per_second / max(self.goodput.share, 1e-9) / 86400

    @property
    def device_hours(self) -> float:
        """Of all devices together."""
        return self.days * 24 * self.request.devices

    @property
    def cost(self) -> float:
        """US dollars."""
        return self.device_hours * self.request.economy.hourly_price


def make_plan(request: Request, choice: Choice, config: RunConfig) -> Plan:
    """Work out one legal layout."""
    topology = build_topology(request.devices, tensor=choice.tensor, pipeline=choice.pipeline, sequence=choice.sequence)
    batch = build_batch_plan(config.batch, config.schedule, topology.data)
    engine = choose_engine(config, request.devices)
    layout = layout_of(config, engine, topology, read_buffers(settings_of(choice), choice.zero_stage))
    work = Workload(
        shape=request.shape,
        sequence_length=request.sequence_length,
        micro_batch_size=choice.micro_batch_size,
        micro_batches=batch.accumulation,
        data=topology.data,
        tensor=topology.tensor,
        pipeline=topology.pipeline,
        sequence=topology.sequence,
        expert=choice.expert,
        is_bidirectional=layout.is_bidirectional,
        arithmetic=request.device.precision,
        zero_stage={"fsdp": 3, "ddp": 0}.get(choice.engine, choice.zero_stage),
        recomputation=choice.recomputation,
        offloads_optimizer=layout.offloads_optimizer,
        offloads_parameters=layout.offloads_parameters,
    )
    return Plan(
        request=request,
        choice=choice,
        config=config,
        work=work,
        memory=estimate_memory(request.shape, work.count, layout, step_of(config)),
        step=predict_step(work, request.device, request.software, request.constants),
        goodput=_goodput(request, work),
    )


def search(request: Request, *, count: int = 8) -> list[Plan]:
    """The fastest layouts that fit, best first, one for each way to cut model and state.

    Raises:
        ConfigError: nothing fits; with the leanest layout's need, and the nearest request that works.
    """
    found = best_plans(request)
    if not found:
        raise ConfigError(_impossible(request))
    return found[:count]


def best_plans(request: Request) -> list[Plan]:
    """Every way to cut that fits, with its best micro-batch and recomputation, fastest first."""
    best: dict[Choice, Plan] = {}
    for plan in sorted(fitting_plans(request), key=lambda plan: plan.step.total):
        best.setdefault(replace(plan.choice, micro_batch_size=1, recomputation="none"), plan)
    return list(best.values())


def fitting_plans(request: Request) -> list[Plan]:
    """Every layout that fits; with state in the host's memory only where there is no other."""
    return list(_fitting(request, all_choices(request))) or list(_fitting(request, offloaded_choices(request)))


def _fitting(request: Request, choices: Iterable[Choice]) -> Iterator[Plan]:
    """Legal layouts that fit; of a layout that does not, larger micro-batches are not looked at."""
    full: set[Choice] = set()
    for choice in choices:
        shape = replace(choice, micro_batch_size=1)
        if shape in full:
            continue
        for plan in _legal(request, [choice]):
            if plan.fits:
                yield plan
            else:
                full.add(shape)


def _legal(request: Request, choices: Iterable[Choice]) -> Iterator[Plan]:
    for choice in choices:
        config = build_config(request, choice)
        if not refusals(request, choice, config):
            yield make_plan(request, choice, config)


def slower_because(plan: Plan, best: Plan) -> str:
    """The parts of a step that make one layout slower than another."""
    differences = {
        part.name: (getattr(plan.step, part.name) - getattr(best.step, part.name)) / best.step.total
        for part in fields(StepTime)
    }
    worse = sorted(differences.items(), key=lambda item: -item[1])
    named = [f"{name.replace('_', ' ')} {share:+.1%}" for name, share in worse if share > 0.002][:3]
    return f"{plan.step.total / best.step.total - 1:.1%} slower: {', '.join(named)}" if named else "as fast"


def _goodput(request: Request, work: Workload) -> Goodput:
    """The state of a rank is copied to its host while training waits, and written by all nodes beside it."""
    state = CHECKPOINT_BYTES * work.count.total
    writers = request.devices if work.zero_stage else work.tensor * work.pipeline
    economy = request.economy
    return best_interval(
        stall=state / writers / economy.copy_bandwidth + 1.0,  # a second for the barrier and the manifest
        write=state / (min(request.nodes, writers) * economy.storage_bandwidth),
        failure=economy.failure_hours * 3600 / request.devices,
        restart=economy.restart_minutes * 60,
    )


def _impossible(request: Request) -> Problem:
    choices = [*all_choices(request), *offloaded_choices(request)]
    device = request.device
    plans = list(_legal(request, choices))
    if not plans:
        return _illegal(request)
    leanest = min(plans, key=lambda plan: (plan.host_bytes > device.host_bytes, plan.needed_bytes))
    return Problem(
        f"{request.name} ({request.shape_parameters / 1e9:,.1f} billion parameters) does not fit {request.nodes} x "
        f"{request.node_devices} {device.name}: the leanest layout, {leanest.choice}, needs "
        f"{leanest.needed_bytes / GIB:.1f} GiB a device",
        f"at most {device.usable_bytes / GIB:.1f} GiB",
        _nearest(request),
    )


def _illegal(request: Request) -> Problem:
    """Why no layout can be, and a batch that some layout divides."""
    plain = Choice(zero_stage=3)
    faults = refusals(request, plain, build_config(request, plain))
    rows = -(-request.global_batch_rows // request.devices) * request.devices
    found = f"no layout of {request.devices} devices is legal" + (f"; {plain}: {faults[0].found}" if faults else "")
    tokens = rows * request.sequence_length
    return Problem(found, f"a multiple of {request.devices} rows", f"write --global-batch {tokens}")


def _nearest(request: Request) -> str:
    """The smallest number of nodes, in doublings, that works."""
    nodes = request.nodes
    while nodes < 8192:
        nodes *= 2
        rows = max(request.global_batch_rows, nodes * request.node_devices)
        larger = replace(request, nodes=nodes, global_batch_rows=rows)
        if any(True for _ in _fitting(larger, all_choices(larger))):
            batch = f" --global-batch {rows * request.sequence_length}" if rows != request.global_batch_rows else ""
            return f"write --nodes {nodes}{batch}"
    return f"name a smaller model, or shorten --sequence-length below {request.sequence_length}"
