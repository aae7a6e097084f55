"""Checks between ranks, under any launcher: the speed of every pair, of every device, and the clocks of the nodes.

Collective: every rank calls. Alone, a process says that there was nothing to measure.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from pretrain import distributed
from pretrain.distributed import Place
from pretrain.doctor.accelerators import judged_gemm, measure_gemm
from pretrain.doctor.finding import Finding, Level, outliers

PAIR_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
PAIRS_SECONDS = 15.0  # rounds of pairs stop after it; what was measured is said
SLOW_PAIR = 0.5  # of the median
SLOW_DEVICE = 0.8  # of the median
SLOW_HERE = 0.3  # of it on CPUs, whose cores other programs share
CLOCK_YELLOW_SECONDS, CLOCK_RED_SECONDS = 1.0, 30.0


def check_devices_against_each_other(place: Place) -> Iterator[Finding]:
    """The same matrix product on every rank's device."""
    speed = measure_gemm(place.device)
    own = judged_gemm(place.device, speed)
    gathered = distributed.gather_json([name_of(place), speed, own.level, own.text])
    if not place.is_main_process:
        return
    speeds = {str(name): float(value) for name, value, _, _ in gathered}
    share = SLOW_DEVICE if place.device.type == "cuda" else SLOW_HERE
    for name in (slow := outliers(speeds, share)):
        text = f"{name}: {speeds[name] / 1e12:.2f} TFLOP/s, the others' median is {_median(speeds) / 1e12:.2f}"
        fix = "every step waits for the slowest rank: leave this node out, or look at its clocks and heat"
        yield Finding(name="matrix product", level="red" if share > SLOW_HERE else "yellow", text=text, fix=fix)
    for name, _, level, text in gathered:
        if level != "green" and name not in slow:
            yield Finding(name="matrix product", level=level, text=f"{name}: {text}", fix=own.fix)
    text = f"{min(speeds.values()) / 1e12:.2f} to {max(speeds.values()) / 1e12:.2f} TFLOP/s on {len(speeds)} devices"
    yield Finding(name="matrix product", level="green", text=text, values={"flops": speeds})


def check_pairs(place: Place) -> Iterator[Finding]:
    """Both ways between every two ranks, in rounds in which each rank has one partner."""
    if place.world_size == 1:
        text = "one process: start the doctor under a launcher, such as torchrun --nproc-per-node 8 -m pretrain doctor"
        yield Finding(name="network", level="skipped", text=text)
        return
    speeds = _pair_speeds(place)
    together = _all_reduce_speed(place)
    gathered = distributed.gather_json([name_of(place), speeds])
    if not place.is_main_process:
        return
    names = [str(name) for name, _ in gathered]
    pairs = {
        f"{names[rank]} - {names[int(other)]}": float(speed)
        for rank, (_, own) in enumerate(gathered)
        for other, speed in own.items()
        if rank < int(other)
    }
    is_gpu = place.device.type == "cuda"
    for name in outliers(pairs, SLOW_PAIR if is_gpu else SLOW_HERE):
        text = f"{name}: {pairs[name] / 2**30:.2f} GiB/s, the median is {_median(pairs) / 2**30:.2f}"
        fix = "look at that cable, port or interface (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); leave the node out meanwhile"
        yield Finding(name="network", level="red" if is_gpu else "yellow", text=text, fix=fix)
    every = place.world_size * (place.world_size - 1) // 2
    slowest, fastest = min(pairs.values()) / 2**30, max(pairs.values()) / 2**30
    text = (
        f"{len(pairs)} of {every} pairs: {slowest:.2f} to {fastest:.2f} GiB/s; "
        f"all-reduce over {place.world_size} ranks: {together / 2**30:.2f} GiB/s"
    )
    values = {"bytes_per_second": pairs, "all_reduce_bytes_per_second": together}
    yield Finding(name="network", level="green", text=text, values=values)


def check_clocks(place: Place) -> Iterator[Finding]:
    """Nodes that disagree about the time spoil logs, schedulers' tickets and builds."""
    if place.world_size == 1:
        yield Finding(name="clocks of nodes", level="skipped", text="one process: there is no other clock")
        return
    offsets: list[float] = []
    dist.barrier()
    for _ in range(3):  # the best of three: what a busy machine adds is no skew
        gathered = distributed.gather_json(time.time())
        offsets.append(max(gathered) - min(gathered))
    if place.is_main_process:
        skew = min(offsets)
        level: Level = "green" if skew < CLOCK_YELLOW_SECONDS else "yellow" if skew < CLOCK_RED_SECONDS else "red"
        fix = "" if level == "green" else "run chrony or ntpd on every node"
        text = f"nodes agree within {skew:.3f} s (the barrier's own time included)"
        yield Finding(name="clocks of nodes", level=level, text=text, fix=fix)


def name_of(place: Place) -> str:
    """How people find a rank."""
    return f"rank {place.rank} ({socket.gethostname()})"


def _pair_speeds(place: Place) -> dict[int, float]:
    """Bytes a second with each partner; a circle of ranks turns by one place a round."""
    size = place.world_size + place.world_size % 2  # with an odd number, one rank rests in each round
    circle = list(range(size))
    sent = torch.zeros(PAIR_BYTES[place.device.type] // 4, device=place.device)
    received = torch.empty_like(sent)
    speeds: dict[int, float] = {}
    began = time.monotonic()
    for _ in range(size - 1):
        position = circle.index(place.rank)
        partner = circle[size - 1 - position]
        if partner < place.world_size:
            _exchange(sent, received, partner)
            started = time.monotonic()
            _exchange(sent, received, partner)
            speeds[partner] = 2 * sent.numel() * 4 / (time.monotonic() - started)
        circle = turned(circle)
        if distributed.any_rank(time.monotonic() - began > PAIRS_SECONDS):
            break
    return speeds


def _all_reduce_speed(place: Place) -> float:
    """Bytes a second that each rank sends in an all-reduce of all: what gradients get."""
    tensor = torch.zeros(PAIR_BYTES[place.device.type] // 4, device=place.device)
    seconds = 0.0
    for _ in range(2):  # the first one makes connections
        started = time.monotonic()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        seconds = time.monotonic() - started
    return 2 * (place.world_size - 1) / place.world_size * tensor.numel() * 4 / seconds


def turned(circle: list[int]) -> list[int]:
    """The next round: all but the first move on by one place, so that all meet all."""
    return [circle[0], circle[-1], *circle[1:-1]]


def _exchange(sent: torch.Tensor, received: torch.Tensor, partner: int) -> None:
    both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    if sent.is_cuda:
        torch.cuda.synchronize(sent.device)


def _median(values: dict[str, float]) -> float:
    return sorted(values.values())[len(values) // 2]
