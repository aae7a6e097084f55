"""Memory estimates: activations against what autograd keeps, the state against an engine's tensors, and the shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.config import ExecutionSection, LossSection, ModelSection
from pretrain.models.activations import layer_bytes_per_token
from pretrain.models.architecture import resolve_architecture
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.families import FAMILIES
from pretrain.models.memory import Buffers, Layout, MemoryEstimate, Precision, Step, estimate_memory
from pretrain.models.parameter_count import count_parameters
from pretrain.models.training_model import PLAIN_HEAD_TYPES, TrainingModel

ROWS, LENGTH = 2, 128
SMALL = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
NO_ROUTER_LOSS = {"router_aux_loss_coef": 0.0}
CASES: dict[str, tuple[dict[str, Any], float]] = {  # fields, and how far off (relative) the formula may be
    "llama": ({**GROUPED, "intermediate_size": 160}, 0.0),
    "mistral": ({**GROUPED, "intermediate_size": 160}, 0.0),
    "qwen2": ({**GROUPED, "intermediate_size": 160}, 0.0),
    "qwen3": ({**GROUPED, "head_dim": 32, "intermediate_size": 160}, 0.0),
    "olmo2": ({**GROUPED, "intermediate_size": 160, "eos_token_id": 1}, 0.0),
    "gpt2": (
        {**SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1},
        0.0,
    ),
    # the formula leaves out the router's own small tensors
    "mixtral": ({**GROUPED, "intermediate_size": 96, "num_local_experts": 4, **NO_ROUTER_LOSS}, 0.04),
    "qwen3_moe": (
        {**GROUPED, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, **NO_ROUTER_LOSS},
        0.04,
    ),
}


def build(section: ModelSection, dtype: torch.dtype) -> TrainingModel:
    builder = ModelBuilder(
        section,
        seed=0,
        sequence_length=LENGTH,
        execution=ExecutionSection(attention="sdpa"),
        loss=LossSection(),
    )
    return builder.build("cpu").to(dtype)


def kept_bytes_per_token(section: ModelSection, dtype: torch.dtype) -> float:
    """Bytes of every storage that one forward saves for backward, parameters left out."""
    model = build(section, dtype)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, 512, (ROWS, LENGTH))
    batch = Batch(
        input_ids=ids,
        labels=ids,
        position_ids=torch.arange(LENGTH).expand(ROWS, LENGTH),
        cumulative_lengths=torch.arange(ROWS + 1, dtype=torch.int32) * LENGTH,
        longest_document=LENGTH,
        target_count=ids.numel(),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / ids.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layer_keeps_what_the_formula_says(model_type: str, dtype: torch.dtype) -> None:
    fields, tolerance = CASES[model_type]
    one, two = (ModelSection(model_type=model_type, **fields, num_hidden_layers=layers) for layers in (1, 2))
    measured = kept_bytes_per_token(two, dtype) - kept_bytes_per_token(one, dtype)
    formula = layer_bytes_per_token(resolve_architecture(two, LENGTH), low=dtype.itemsize)
    assert formula == pytest.approx(measured, rel=tolerance, abs=1)


def test_known_families_have_the_chunked_loss() -> None:
    assert set(FAMILIES) <= PLAIN_HEAD_TYPES


def estimate(
    stage: int = 0, ranks: int = 1, precision: Precision = "bf16", *, engine: str = "zero", **changes: Any
) -> MemoryEstimate:
    shape = resolve_architecture(ModelSection(preset="llama-7b"), 4096)
    layout = Layout(
        engine=engine, zero_stage=stage, data=ranks, **{key: changes.pop(key) for key in ("tensor",) if key in changes}
    )
    step = {"micro_batch_size": 1, "sequence_length": 4096, "recomputes": False, "chunk_tokens": 1024, **changes}
    return estimate_memory(shape, count_parameters(shape), layout, Step(precision=precision, **step))


PARAMETERS = 6_738_415_616


@pytest.mark.parametrize(
    ("precision", "stage", "weights", "gradients", "masters", "moments"),
    [
        ("bf16", 0, 2, 2, 4, 8),
        ("bf16", 1, 2, 6, 4 / 8, 8 / 8),
        ("bf16", 2, 2, 4 / 8, 4 / 8, 8 / 8),
        ("bf16", 3, 2 / 8, 4 / 8, 4 / 8, 8 / 8),
        ("fp16", 1, 2, 2, 4 / 8, 8 / 8),
        ("fp16", 2, 2, 2 / 8, 4 / 8, 8 / 8),
        ("fp32", 0, 4, 4, 0, 8),
        ("fp32", 1, 4, 4, 4 / 8, 8 / 8),
        ("fp32", 3, 4 / 8, 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_zero_shares_the_state_by_stage(
    precision: Precision, stage: int, weights: float, gradients: float, masters: float, moments: float
) -> None:
    memory = estimate(stage, 8, precision)
    found = (memory.weights, memory.gradients, memory.master_weights, memory.moments)
    assert [size / PARAMETERS for size in found] == pytest.approx([weights, gradients, masters, moments], rel=1e-6)


def test_recomputation_keeps_layer_inputs_and_one_whole_layer() -> None:
    shape = resolve_architecture(ModelSection(preset="llama-7b"), 4096)
    saved = estimate().activations - estimate(recomputes=True).activations
    layer = layer_bytes_per_token(shape, low=2)
    assert saved == 4096 * (31 * layer - 32 * 4096 * 2)


def test_logits_depend_on_the_chunk_and_not_on_the_batch() -> None:
    small, large = (estimate(micro_batch_size=rows) for rows in (1, 4))
    assert large.logits - small.logits == 3 * 4096 * 4096 * 2  # the final hidden states' gradient
    assert estimate(chunk_tokens=512).logits < small.logits


def test_gathered_weights_and_buckets_keep_to_the_files_limits() -> None:
    assert estimate(3, 8).gathered_weights == 2 * Buffers().max_live_parameters
    assert estimate(2, 8).communication == 2 * Buffers().reduce_bucket_size
    assert estimate(1, 8).communication == 4 * Buffers().reduce_bucket_size
    assert estimate(1, 1).communication == 0
    assert estimate(engine="plain").communication == 0


def test_tensor_parallelism_splits_matrices_and_not_norms() -> None:
    whole, split = estimate(1, 1).weights, estimate(1, 1, tensor=2).weights
    norms = 65 * 4096
    assert split == whole // 2 + norms  # two bytes each, half of them there in any case
