"""The constants of the time model that all devices share, and the generations of software.

Fitted on published_runs.csv by tests/benchmarks/planning/fit_constants.py; what each means stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Software:
    """What the same mathematics costs in one generation of software; the numbers are fitted or known facts."""

    name: str
    recomputed_share: float  # of the layers' forward, that full recomputation really runs again
    gradient_bytes: int  # of a gradient on the wire
    exposed_share: float  # of the data-parallel collectives' seconds, where computation could hide them
    fused_attention: bool  # no T x T matrix in memory
    bucket_bytes: int | None = None  # of one in the buckets of ZeRO 2 and 3, where they differ
    regathers: bool = True  # ZeRO 2 gathers weights every micro-batch (FSDP); else once a step (DeepSpeed)
    optimizer_bytes: float = 60.0  # that an update moves for each parameter of a rank


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Dimensionless unless said otherwise."""

    matmul_traffic: float = 1.19  # times the bytes of both operands and the result: why a small depth is slow
    elementwise_traffic: float = 1.05  # bytes that a forward's norms and activations move for each byte it keeps
    attention_backward: float = 3.2  # times the forward's seconds
    score_traffic: float = 7.62  # times the matrix of scores is read or written, where attention is not fused
    loss_traffic: float = 43.3  # bytes moved for each logit
    sharding_slowdown: float = 1.77  # of data-parallel collectives beside computation
    hop_seconds: float = 2.3e-06  # seconds
    straggling: float = 0.00363  # of a step, for each doubling of hosts
    fp8_speed: float = 2.05  # times bf16 matmuls
    fp8_traffic: float = 2.02  # bytes for each number that is rounded to fp8


CONSTANTS = Constants()

# torch 1: FSDP in torch 1.13, which reduces in bf16 and hides nothing; torch 2: FSDP in torch 2.1 with fp32 reductions,
# whose recomputation stops at the last tensor that backward needs. Megatron: the program of 2021, whose pipelines fix
# its shares to round numbers. Athanor: DeepSpeed with flash attention, taken to hide and repeat as much as torch 2
# does; never measured on GPUs.
SOFTWARE: Mapping[str, Software] = {
    "torch 1": Software(
        name="torch 1", recomputed_share=1.1, gradient_bytes=2, exposed_share=1.0, fused_attention=True
    ),
    "torch 2": Software(
        name="torch 2", recomputed_share=0.693, gradient_bytes=4, exposed_share=0.347, fused_attention=True
    ),
    "megatron": Software(
        name="megatron", recomputed_share=1.0, gradient_bytes=4, exposed_share=0.5, fused_attention=False
    ),
    "athanor": Software(
        name="athanor",
        recomputed_share=0.693,
        gradient_bytes=4,
        exposed_share=0.347,
        fused_attention=True,
        bucket_bytes=2,
        regathers=False,
    ),
}
