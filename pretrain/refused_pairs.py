"""The table of settings that do not work together: each pair with the reason and the nearest setting that does.

A pair that is not here is supported. How a run is seen to use a feature is compatibility.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Feature = str  # a name of compatibility.py's two tables of uses


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why two settings do not work together, and the nearest setting that does."""

    reason: str
    allowed: str
    change: str


_NO_SHARDING = Refusal(
    reason="the plain engine keeps the whole state in one process and would ignore the stage",
    allowed="stages are the zero engine's",
    change="set parallel.engine=zero, or leave parallel.zero_stage out",
)
_NO_ZERO_STAGE = Refusal(
    reason="stages are the zero engine's; accelerate's DDP keeps the whole state on each rank, FSDP2 a part of it",
    allowed="no stage",
    change="set parallel.data_parallel=shard and leave parallel.zero_stage out, or set parallel.engine=zero",
)
_DATA_PARALLEL_ONLY = Refusal(
    reason="the accelerate engine shares data, and with parallel.data_parallel=shard the state, but no computation",
    allowed="1",
    change="set parallel.engine=auto, or leave the size out",
)
_NO_OFFLOAD = Refusal(
    reason="the accelerate engine keeps its state on the device",
    allowed="none",
    change="set parallel.engine=zero, or parallel.data_parallel=shard without offload",
)
_FP16_SKIPS = Refusal(
    reason="fp16 finds its loss scale by steps that overflow and are skipped, each of which would stop or undo the run",
    allowed="guard.on_non_finite: skip",
    change="set guard.on_non_finite=skip, or precision=bf16",
)
_SHARDED_BY_FSDP = Refusal(
    reason="FSDP2 is the accelerate engine's way to share the state; the other engines have their own",
    allowed="replicate",
    change="set parallel.engine=accelerate, or parallel.zero_stage=3 with parallel.data_parallel=replicate",
)
_NOT_THE_PIPELINE_ENGINE = Refusal(
    reason="stages are the pipeline engine's",
    allowed="auto or pipeline",
    change="set parallel.engine=auto, or parallel.pipeline=1",
)
_GRADIENTS_STAY_WHOLE = Refusal(
    reason="a stage adds up the gradients of all its micro-batches before it reduces them, so they cannot be cut",
    allowed="stages 0, 1",
    change="set parallel.zero_stage=1, or parallel.pipeline=1",
)
_NO_OFFLOAD_IN_A_PIPELINE = Refusal(
    reason="not shown to give the right numbers",
    allowed="none",
    change="set parallel.offload_optimizer=none and parallel.offload_parameters=none: more stages make room as well",
)

_OFFLOAD_IS_OF_ZERO = Refusal(
    reason="the plain engine keeps its state on the device",
    allowed="none",
    change="set parallel.engine=auto, or leave offload out",
)
_ONLY_SHARDS_ARE_OFFLOADED = Refusal(
    reason="DeepSpeed offloads shards of weights, which stage 3 alone makes",
    allowed="stage 3",
    change="set parallel.zero_stage=3, or parallel.offload_parameters=none",
)
_SWAPPED_ARE_SHARDS = Refusal(
    reason="DeepSpeed's stages 1 and 2 offload to the host's memory alone, and would take NVMe for that",
    allowed="ZeRO stage 3",
    change="set parallel.zero_stage=3, or parallel.offload_optimizer=cpu",
)
_NO_FP16_OFFLOAD = Refusal(
    reason="not shown to give the right numbers",
    allowed="fp32, bf16",
    change="set precision=bf16, or leave offload out",
)

_LIGER_WAS_NOT_COMPARED = Refusal(
    reason="liger's kernels were never compared with torch's where ranks share a model or layers are compiled",
    allowed="execution.kernels: torch",
    change="set execution.kernels=torch",
)

_LORA_ON_WHOLE_MODELS = Refusal(
    reason="adapters are made beside whole matrices, which this layout cuts or builds in pieces",
    allowed="the plain engine, ZeRO 0 to 2, and the accelerate engine with parallel.data_parallel=replicate",
    change="set parallel.zero_stage=2 and all sizes of parallel to 1, or leave model.lora out",
)

_SPANS_UNDER_TWO_ENGINES = Refusal(
    reason="encoder-decoders are trained by the plain and zero engines, whole on every rank or cut by ZeRO",
    allowed="the plain engine, ZeRO 0 to 3",
    change="set parallel.engine=zero and all sizes of parallel to 1",
)
_SPANS_WERE_NOT_OFFLOADED = Refusal(
    reason="not shown to give the right numbers",
    allowed="none",
    change="set parallel.offload_optimizer=none and parallel.offload_parameters=none",
)

# What has a feature has the other one too, and with it what the table refuses to that one.
IMPLIED: Mapping[Feature, Feature] = {
    "engine pipeline": "pipeline parallelism",
    "DualPipeV": "pipeline parallelism",
    "sharded data parallelism": "engine accelerate",
    "NVMe offload": "optimizer offload",
}

# The table. A feature paired with itself is refused altogether.
REFUSED: Mapping[tuple[Feature, Feature], Refusal] = {
    ("tensor parallelism", "engine plain"): Refusal(
        reason="the plain engine is one process, and tensor ranks are several",
        allowed="auto, zero or pipeline",
        change="set parallel.engine=auto, or parallel.tensor=1",
    ),
    ("tensor parallelism", "sequence parallelism"): Refusal(
        reason="both exchange attention's heads, and DeepSpeed lays its sequence groups over all ranks",
        allowed="one of the two",
        change="set parallel.sequence=1 (execution.recomputation=full makes room for long rows), or parallel.tensor=1",
    ),
    ("tensor parallelism", "compiled layers"): Refusal(
        reason="the sums over tensor ranks inside compiled layers were never compared with plain",
        allowed="execution.compile: false",
        change="set execution.compile=false",
    ),
    ("tensor parallelism", "expert parallelism"): Refusal(
        reason="the matrices of models with experts are not cut yet",
        allowed="one of the two",
        change="set parallel.tensor=1: parallel.zero_stage=3 shares what is left",
    ),
    ("pipeline parallelism", "engine plain"): _NOT_THE_PIPELINE_ENGINE,
    ("pipeline parallelism", "engine zero"): _NOT_THE_PIPELINE_ENGINE,
    ("pipeline parallelism", "ZeRO stage 2"): _GRADIENTS_STAY_WHOLE,
    ("pipeline parallelism", "ZeRO stage 3"): _GRADIENTS_STAY_WHOLE,
    ("pipeline parallelism", "precision fp16"): Refusal(
        reason="gradients would travel between stages in fp16, where small ones vanish and large ones overflow",
        allowed="fp32, bf16",
        change="set precision=bf16, or parallel.pipeline=1",
    ),
    ("pipeline parallelism", "sequence parallelism"): Refusal(
        reason="stages pass whole rows on, sequence ranks hold pieces of them",
        allowed="one of the two",
        change="set parallel.sequence=1 (execution.recomputation=full makes room for long rows), or "
        "parallel.pipeline=1 with parallel.zero_stage=3",
    ),
    ("pipeline parallelism", "expert parallelism"): Refusal(
        reason="the losses of routers would have to travel between stages",
        allowed="one of the two",
        change="set parallel.pipeline=1",
    ),
    ("pipeline parallelism", "optimizer offload"): _NO_OFFLOAD_IN_A_PIPELINE,
    ("pipeline parallelism", "parameter offload"): _NO_OFFLOAD_IN_A_PIPELINE,
    ("sequence parallelism", "ZeRO stage 0"): Refusal(
        reason="DeepSpeed names no data-parallel ranks beside those of a sequence where nothing is shared",
        allowed="stages 1, 2, 3",
        change="set parallel.zero_stage=1",
    ),
    ("sequence parallelism", "engine plain"): Refusal(
        reason="the plain engine is one process",
        allowed="the zero engine",
        change="set parallel.engine=zero, or parallel.sequence=1",
    ),
    ("sequence parallelism", "expert parallelism"): Refusal(
        reason="experts would be chosen by ranks that hold parts of the same rows, which was never compared with plain",
        allowed="one of them",
        change="set parallel.expert=1, or parallel.sequence=1",
    ),
    ("sequence parallelism", "compiled layers"): Refusal(
        reason="the exchange of heads between ranks inside compiled layers was never compared with plain",
        allowed="execution.compile: false",
        change="set execution.compile=false",
    ),
    ("expert parallelism", "engine plain"): Refusal(
        reason="the plain engine is one process, and expert ranks are several",
        allowed="auto or zero",
        change="set parallel.engine=auto, or parallel.expert=1",
    ),
    ("expert parallelism", "compiled layers"): Refusal(
        reason="how many tokens a rank's experts get is known only when a layer runs",
        allowed="execution.compile: false",
        change="set execution.compile=false",
    ),
    ("liger's kernels", "tensor parallelism"): _LIGER_WAS_NOT_COMPARED,
    ("liger's kernels", "pipeline parallelism"): _LIGER_WAS_NOT_COMPARED,
    ("liger's kernels", "sequence parallelism"): _LIGER_WAS_NOT_COMPARED,
    ("liger's kernels", "expert parallelism"): _LIGER_WAS_NOT_COMPARED,
    ("liger's kernels", "compiled layers"): _LIGER_WAS_NOT_COMPARED,
    ("engine accelerate", "ZeRO stage 0"): _NO_ZERO_STAGE,
    ("engine accelerate", "ZeRO stage 2"): _NO_ZERO_STAGE,
    ("engine accelerate", "ZeRO stage 3"): _NO_ZERO_STAGE,
    ("engine accelerate", "precision fp16"): Refusal(
        reason="the accelerate engine has no loss scaling",
        allowed="fp32, bf16",
        change="set precision=bf16, or parallel.engine=zero",
    ),
    ("engine accelerate", "a DeepSpeed file"): Refusal(
        reason="the accelerate engine does not read DeepSpeed settings",
        allowed="null",
        change="set parallel.engine=zero, or parallel.deepspeed_config=null",
    ),
    ("engine accelerate", "tensor parallelism"): _DATA_PARALLEL_ONLY,
    ("engine accelerate", "pipeline parallelism"): _DATA_PARALLEL_ONLY,
    ("engine accelerate", "sequence parallelism"): _DATA_PARALLEL_ONLY,
    ("engine accelerate", "expert parallelism"): _DATA_PARALLEL_ONLY,
    ("engine accelerate", "DualPipeV"): _DATA_PARALLEL_ONLY,
    ("engine accelerate", "optimizer offload"): _NO_OFFLOAD,
    ("engine accelerate", "parameter offload"): _NO_OFFLOAD,
    ("sharded data parallelism", "engine plain"): _SHARDED_BY_FSDP,
    ("sharded data parallelism", "engine zero"): _SHARDED_BY_FSDP,
    ("sharded data parallelism", "engine pipeline"): _SHARDED_BY_FSDP,
    ("NVMe offload of parameters", "NVMe offload of parameters"): Refusal(
        reason="DeepSpeed moves shards of weights between files of its own, past which our checkpoints would restore",
        allowed="none, cpu",
        change="set parallel.offload_parameters=cpu, with parallel.offload_optimizer=nvme if the host is too small",
    ),
    ("NVMe offload", "expert parallelism"): Refusal(
        reason="shares of experts in files were never compared with plain",
        allowed="none, cpu",
        change="set parallel.offload_optimizer=cpu, or parallel.expert=1",
    ),
    ("NVMe offload", "ZeRO stage 1"): _SWAPPED_ARE_SHARDS,
    ("NVMe offload", "ZeRO stage 2"): _SWAPPED_ARE_SHARDS,
    ("LoRA", "ZeRO stage 3"): _LORA_ON_WHOLE_MODELS,
    ("LoRA", "tensor parallelism"): _LORA_ON_WHOLE_MODELS,
    ("LoRA", "pipeline parallelism"): _LORA_ON_WHOLE_MODELS,
    ("LoRA", "sequence parallelism"): _LORA_ON_WHOLE_MODELS,
    ("LoRA", "expert parallelism"): _LORA_ON_WHOLE_MODELS,
    ("LoRA", "sharded data parallelism"): _LORA_ON_WHOLE_MODELS,
    ("LoRA", "optimizer offload"): Refusal(
        reason="not shown to give the right numbers, and adapters' moments are small",
        allowed="none",
        change="set parallel.offload_optimizer=none, or leave model.lora out",
    ),
    ("LoRA", "precision fp16"): Refusal(
        reason="not shown to give the right numbers",
        allowed="fp32, bf16",
        change="set precision=bf16, or leave model.lora out",
    ),
    ("LoRA", "liger's kernels"): Refusal(
        reason="never compared with plain",
        allowed="execution.kernels: torch",
        change="set execution.kernels=torch, or leave model.lora out",
    ),
    ("LoRA", "compiled layers"): Refusal(
        reason="adapters are put into layers after these were marked for compilation, which was never tried",
        allowed="execution.compile: false",
        change="set execution.compile=false, or leave model.lora out",
    ),
    ("an encoder-decoder", "engine accelerate"): _SPANS_UNDER_TWO_ENGINES,
    ("an encoder-decoder", "tensor parallelism"): _SPANS_UNDER_TWO_ENGINES,
    ("an encoder-decoder", "pipeline parallelism"): _SPANS_UNDER_TWO_ENGINES,
    ("an encoder-decoder", "sequence parallelism"): _SPANS_UNDER_TWO_ENGINES,
    ("an encoder-decoder", "expert parallelism"): _SPANS_UNDER_TWO_ENGINES,
    ("an encoder-decoder", "optimizer offload"): _SPANS_WERE_NOT_OFFLOADED,
    ("an encoder-decoder", "parameter offload"): _SPANS_WERE_NOT_OFFLOADED,
    ("an encoder-decoder", "precision fp16"): Refusal(
        reason="not shown to give the right numbers, and T5's activations are known to overflow in it",
        allowed="fp32, bf16",
        change="set precision=bf16",
    ),
    ("an encoder-decoder", "liger's kernels"): Refusal(
        reason="never compared with plain",
        allowed="execution.kernels: torch",
        change="set execution.kernels=torch",
    ),
    ("an encoder-decoder", "compiled layers"): Refusal(
        reason="never compared with layers that are not compiled",
        allowed="execution.compile: false",
        change="set execution.compile=false",
    ),
    ("an encoder-decoder", "LoRA"): Refusal(
        reason="adapters were tried in decoders alone",
        allowed="one of the two",
        change="set model.lora=null",
    ),
    ("optimizer offload", "engine plain"): _OFFLOAD_IS_OF_ZERO,
    ("parameter offload", "engine plain"): _OFFLOAD_IS_OF_ZERO,
    ("optimizer offload", "ZeRO stage 0"): Refusal(
        reason="what DeepSpeed offloads are ZeRO's shares of the state, which stage 0 does not make",
        allowed="stages 1, 2, 3",
        change="set parallel.zero_stage=1, or parallel.offload_optimizer=none",
    ),
    ("parameter offload", "ZeRO stage 0"): _ONLY_SHARDS_ARE_OFFLOADED,
    ("parameter offload", "ZeRO stage 1"): _ONLY_SHARDS_ARE_OFFLOADED,
    ("parameter offload", "ZeRO stage 2"): _ONLY_SHARDS_ARE_OFFLOADED,
    ("parameter offload", "precision fp16"): _NO_FP16_OFFLOAD,
    ("optimizer offload", "precision fp16"): _NO_FP16_OFFLOAD,
    ("engine plain", "several processes"): Refusal(
        reason="the plain engine is one process",
        allowed="world size 1, or the zero engine",
        change="set parallel.engine=zero, or start one process",
    ),
    ("engine plain", "precision fp16"): Refusal(
        reason="the plain engine has no loss scaling",
        allowed="fp32, bf16",
        change="set precision=bf16, or parallel.engine=zero",
    ),
    ("engine plain", "a DeepSpeed file"): Refusal(
        reason="the plain engine does not read DeepSpeed settings",
        allowed="null",
        change="set parallel.engine=zero, or parallel.deepspeed_config=null",
    ),
    ("engine plain", "ZeRO stage 0"): _NO_SHARDING,
    ("engine plain", "ZeRO stage 2"): _NO_SHARDING,
    ("engine plain", "ZeRO stage 3"): _NO_SHARDING,
    ("precision fp16", "guard.on_non_finite stop"): _FP16_SKIPS,
    ("precision fp16", "guard.on_non_finite rollback"): _FP16_SKIPS,
    ("precision fp16", "ZeRO stage 0"): Refusal(
        reason="DeepSpeed's fp16 optimizer without ZeRO does not say which weights it holds, so nothing could be saved",
        allowed="stages 1, 2, 3",
        change="set parallel.zero_stage=1",
    ),
}
