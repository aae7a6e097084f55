"""The process group and this process's place in it: started once, stopped at the end.

The only reader of RANK, WORLD_SIZE, LOCAL_RANK and SLURM_*. Which rank does which part of the model: topology.py.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pretrain.errors import LaunchError, Problem

SECONDS_TO_REACH_THE_STORE = 60  # of the group, once it stands


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which process this is, as the launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main_process(self) -> bool:
        """True on the one rank that writes logs and reports."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank: one GPU a rank, else the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def environment() -> Mapping[str, str]:
    """This process's variables, for the few parts that read a launcher's wishes from them."""
    return os.environ


def launched_at() -> float:
    """When this process was started, in seconds since 1970."""
    return float(psutil.Process().create_time())


def job_launched_at(environment: Mapping[str, str]) -> float:
    """The same, but of the launcher where it has started the ranks again: a time limit is one of the job."""
    is_again = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    launcher = psutil.Process().parent() if is_again else None
    return float(launcher.create_time()) if launcher else launched_at()


def read_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read the launcher's variables: torchrun, accelerate and deepspeed set RANK; srun sets SLURM_PROCID.

    Raises:
        LaunchError: where the variables contradict each other or only some of them are set.
    """
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if int(environment.get("SLURM_NNODES", "1")) > 1 and "MASTER_ADDR" not in environment:
            raise LaunchError(
                Problem(
                    f"srun on {environment['SLURM_NNODES']} nodes without MASTER_ADDR",
                    "the name of the first node, the same on all ranks",
                    'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1) before srun',
                )
            )
    else:
        return Place(rank=0, world_size=1, local_rank=0, local_world_size=1)
    missing = [name for name in names if name not in environment]
    if missing:
        raise LaunchError(
            Problem(
                f"{names[0]} is set, {', '.join(missing)} is not",
                "all three of " + ", ".join(names),
                "start through torchrun, deepspeed, accelerate launch or srun",
            )
        )
    rank, world_size, local_rank = (int(environment[name]) for name in names)
    # deepspeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE, Slurm may give neither
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    place = Place(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=int(local) if local else 1)
    if not 0 <= rank < world_size:
        raise LaunchError(Problem(f"rank {rank} of {world_size}", "0 <= rank < world size", "check the launcher"))
    return place


def start(place: Place, *, timeout_seconds: float = 1800) -> None:
    """Join the process group; a single process makes a group of one. Every rank must call.

    Raises:
        LaunchError: where the group that forms has another size than the launcher said.
    """
    _put_own_tools_first()
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    if place.world_size == 1 and "MASTER_ADDR" not in os.environ:
        _become_a_group_of_one()
    if dist.is_initialized():
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "64")  # collectives remembered, for the report about a hang
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed's pipelines read it, srun does not set it
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    # srun sets none of these, and accelerate would take each rank for a process alone
    for name, value in (
        ("RANK", place.rank),
        ("WORLD_SIZE", place.world_size),
        ("LOCAL_RANK", place.local_rank),
        ("LOCAL_WORLD_SIZE", place.local_world_size),
    ):
        os.environ.setdefault(name, str(value))
    dist.init_process_group(
        # host values (flags, counts) always travel by gloo: agreeing on them never waits for a GPU
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=_store_of_this_attempt(timeout_seconds),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    if dist.get_world_size() != place.world_size:
        raise LaunchError(
            Problem(
                f"a group of {dist.get_world_size()} where the launcher said {place.world_size}",
                "equal sizes",
                "check MASTER_ADDR, MASTER_PORT and the number of processes",
            )
        )


def _store_of_this_attempt(timeout_seconds: float) -> Any:
    """Of ranks that torchrun has started again: its store still holds the addresses of the ranks that are gone."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    return PrefixStore(f"attempt-{attempt}", store)


def own_store() -> Any:
    """A connection of one's own to the store of the process group: its calls wait for none of the group's.

    Raises:
        DistNetworkError: the rank that keeps the store is gone; found in a minute, where the group would try for hours.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    patience = store.timeout
    store.set_timeout(datetime.timedelta(seconds=SECONDS_TO_REACH_THE_STORE))
    try:
        return store.clone()
    finally:
        store.set_timeout(patience)


def _put_own_tools_first() -> None:
    """Let DeepSpeed build its ops with this environment's ninja: with another one it builds them all again."""
    own = str(Path(sys.executable).parent)
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folders[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *folders])


def _become_a_group_of_one() -> None:
    """Give libraries that insist on a process group one of size 1, on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"
    )


def stop() -> None:
    """Leave the process group; without this gloo may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """True where more than one rank runs."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, in place. Collective."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Stack every rank's tensor of one shape: (world_size, *shape). Collective."""
    if not is_distributed():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def gather_rows(matrix: torch.Tensor) -> torch.Tensor:
    """All ranks' rows (rows, columns) below each other, by rank, on every rank, however many each has. Collective."""
    if not is_distributed():
        return matrix
    counts = all_gather(torch.tensor(len(matrix))).tolist()
    padded = matrix.new_zeros((max(counts), *matrix.shape[1:]))
    padded[: len(matrix)] = matrix
    return torch.cat([part[:count] for part, count in zip(all_gather(padded), counts, strict=True)])


def any_rank(claim: bool) -> bool:
    """True on all ranks where it is true on at least one. Collective; hosts wait for each other, not for a GPU."""
    return bool(largest(int(claim)))


def largest(number: int) -> int:
    """The largest of all ranks' numbers. Collective; hosts wait for each other, not for a GPU."""
    if not is_distributed():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank. Collective; bytes travel, not pickles."""
    if not is_distributed():
        return value
    text = json.dumps(value).encode() if rank() == 0 else b""
    length = torch.tensor(len(text))
    dist.broadcast(length, src=0)
    buffer = torch.zeros(int(length.item()), dtype=torch.uint8)
    if rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(buffer, src=0)
    return json.loads(bytes(buffer.cpu().tolist()))


def gather_json(value: Any) -> list[Any]:
    """Every rank's JSON value, by rank, on every rank. Collective; for small values."""
    if not is_distributed():
        return [value]
    text = json.dumps(value).encode()
    lengths = all_gather(torch.tensor(len(text))).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_gather(padded).numpy()
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
