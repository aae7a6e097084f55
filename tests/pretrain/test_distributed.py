"""Which process this is, from the variables of every launcher; and how a process without one stands alone."""

from __future__ import annotations

import datetime
import subprocess
import sys

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from pretrain import distributed
from pretrain.distributed import Place, read_place
from pretrain.errors import LaunchError

LAUNCHERS = {
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    "deepspeed": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"},
    "srun": {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NNODES": "2",
        "MASTER_ADDR": "node0",
    },
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_s_variables_are_read(launcher: str) -> None:
    place = read_place(LAUNCHERS[launcher])
    assert (place.rank, place.world_size, place.local_rank) == (5, 8, 1)
    assert not place.is_main_process
    if launcher != "srun":
        assert place.local_world_size == 4


def test_no_launcher_means_one_process() -> None:
    assert read_place({}) == Place(rank=0, world_size=1, local_rank=0, local_world_size=1)
    # an allocation of one task, such as a shell inside a job, is no launch
    assert read_place({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).world_size == 1


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK is not"),
        ({"RANK": "8", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "rank 8 of 8"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "2"}, "MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused(variables: dict[str, str], told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        read_place(variables)


KEEPER = """
import sys
from torch._C._distributed_c10d import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_a_store_whose_rank_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", KEEPER]
    keeper = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert keeper.stdout is not None
        hours = datetime.timedelta(hours=2)
        store = TCPStore("127.0.0.1", int(keeper.stdout.readline()), is_master=False, timeout=hours)
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: PrefixStore("group", store))
        distributed.own_store().set("key", "value")
        assert store.timeout == hours
    finally:
        keeper.kill()
        keeper.wait()
    monkeypatch.setattr(distributed, "SECONDS_TO_REACH_THE_STORE", 1)
    with pytest.raises(dist.DistNetworkError):
        distributed.own_store()
