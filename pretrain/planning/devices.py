"""The devices that a plan can be made for: data-sheet rates, and the few measured constants of each.

The constants come from tests/benchmarks/planning/fit_constants.py (GPUs) or from `pretrain plan --calibrate`.
Owns no formula: what a step costs is step_time.py's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.errors import ConfigError, Problem
from pretrain.models.flops import PEAK_FLOPS
from pretrain.planning.workload import Arithmetic

GIB = 2**30
TERA = 10**12
GIGA = 10**9


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, the links that it shares with the others, and how much of the data sheet software gets."""

    name: str
    peak_flops: float  # dense, in `precision`, FLOP/s
    memory_bandwidth: float  # bytes/s
    usable_bytes: float  # of its memory, for a training process
    node_devices: int  # of one host
    node_bandwidth: float  # bytes/s that a ring of collectives gets within a host
    network_bandwidth: float  # bytes/s that a ring gets across hosts: all network cards of a host together
    host_bytes: float  # of a host's memory that offloaded state may take
    hourly_price: float  # US dollars, an assumption: --price replaces it
    matmul_efficiency: float  # share of the peak that large matmuls reach
    attention_efficiency: float  # share of the peak that fused attention's forward reaches
    precision: Arithmetic = "bf16"  # that it is quickest in, and plans for it train in
    crowding: float = 1.0  # times a rank's computation takes where the host's other devices compute as well
    layer_seconds: float = 0.0  # of a layer and micro-batch that no size explains: launches, Python


# Peaks are flops.py's. Memory: NVIDIA's data sheets (A100 40 and 80 GB SXM, H100 SXM, H200). Links: NVLink 3 and 4 as
# rings of NCCL reach them (about 235 and 370 GB/s); eight network cards a host of 200 and 400 Gbit/s. Usable memory as
# nvidia-smi reports it less the context; hosts of DGX A100 (1 and 2 TB) and DGX H100 (2 TB). Prices: round figures of
# 2025 for reserved clouds.
DEVICES: Mapping[str, Device] = {
    "a100-40": Device(
        name="a100-40",
        peak_flops=PEAK_FLOPS["NVIDIA A100"],
        memory_bandwidth=1555 * GIGA,
        usable_bytes=39.4 * GIB,
        node_devices=8,
        node_bandwidth=235 * GIGA,
        network_bandwidth=200 * GIGA,
        host_bytes=1000 * GIB,
        hourly_price=1.3,
        matmul_efficiency=0.852,
        attention_efficiency=0.377,
    ),
    "a100-80": Device(
        name="a100-80",
        peak_flops=PEAK_FLOPS["NVIDIA A100"],
        memory_bandwidth=2039 * GIGA,
        usable_bytes=79.2 * GIB,
        node_devices=8,
        node_bandwidth=235 * GIGA,
        network_bandwidth=200 * GIGA,
        host_bytes=1800 * GIB,
        hourly_price=1.8,
        matmul_efficiency=0.806,
        attention_efficiency=0.365,
    ),
    "h100-80": Device(
        name="h100-80",
        peak_flops=PEAK_FLOPS["NVIDIA H100"],
        memory_bandwidth=3350 * GIGA,
        usable_bytes=79.1 * GIB,
        node_devices=8,
        node_bandwidth=370 * GIGA,
        network_bandwidth=360 * GIGA,
        host_bytes=1800 * GIB,
        hourly_price=2.6,
        matmul_efficiency=0.657,
        attention_efficiency=0.201,
    ),
    "h200-141": Device(
        name="h200-141",
        peak_flops=PEAK_FLOPS["NVIDIA H200"],
        memory_bandwidth=4800 * GIGA,
        usable_bytes=139.8 * GIB,
        node_devices=8,
        node_bandwidth=370 * GIGA,
        network_bandwidth=360 * GIGA,
        host_bytes=1800 * GIB,
        hourly_price=3.4,
        matmul_efficiency=0.657,  # an H100's: no row of an H200 was published
        attention_efficiency=0.201,
    ),
    "cpu": Device(
        name="cpu",
        peak_flops=1.0 * TERA,  # of one process with one thread; `--calibrate` replaces all of these
        memory_bandwidth=8 * GIGA,
        usable_bytes=8 * GIB,
        node_devices=2,
        node_bandwidth=2 * GIGA,
        network_bandwidth=1 * GIGA,
        host_bytes=0.0,
        hourly_price=0.05,
        matmul_efficiency=0.5,
        attention_efficiency=0.1,
    ),
}

_SPELLINGS: Mapping[str, str] = {
    "a10040": "a100-40",
    "a10080": "a100-80",
    "a100": "a100-80",
    "h10080": "h100-80",
    "h100": "h100-80",
    "h200": "h200-141",
    "h200141": "h200-141",
    "cpu": "cpu",
}


def find_device(name: str, *, place: str = "--gpus") -> Device:
    """A device by any common spelling: A100-80, a100_80gb, "NVIDIA H100 80GB", H200.

    Raises:
        ConfigError: there is no such device in the table; `place` says where the name was read.
    """
    plain = re.sub(r"nvidia|tesla|sxm\d?|pcie|hbm\d\w?|gb|gib|[^a-z0-9]", "", name.lower())
    known = _SPELLINGS.get(plain)
    if known is None:
        nearest = difflib.get_close_matches(plain, _SPELLINGS, n=1, cutoff=0.5)
        change = f"write {_SPELLINGS[nearest[0]].upper()}" if nearest else "write A100-80, or calibrate on the device"
        raise ConfigError(Problem(f"{place}: unknown GPU {name!r}", ", ".join(DEVICES).upper(), change))
    return DEVICES[known]
