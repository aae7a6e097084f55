"""The activations that `pretrain check` predicts are the bytes that a training step needs beside the state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import RunConfig
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.run_plan import plan_run

TOLERANCE = 0.15  # relative
# Small, for bf16 is emulated on many CPUs: shapes of ten times the work took 17 s each on a busy machine.
SHAPES = {
    "deep": {"layers": 6, "width": 64, "length": 128, "rows": 2},
    "wide": {"layers": 2, "width": 256, "length": 64, "rows": 2},
    "long": {"layers": 2, "width": 64, "length": 1024, "rows": 1},
}


class PeakOfNewTensors(TorchDispatchMode):
    """Bytes of the storages that operations made while it was active: now, and at the highest.

    What kernels take inside is not among them, so the figures are equal on every CPU; fake tensors give the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        result = operation(*arguments, **(keywords or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, keywords)) if is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if is_tensor(leaf) and leaf.untyped_storage()._cdata not in given | self._known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        self._known.add(place)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.bytes -= size


def is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"


@pytest.mark.parametrize("recomputation", ["none", "full", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_of_a_step(shape: str, precision: str, recomputation: str) -> None:
    sizes = SHAPES[shape]
    rows, length = sizes["rows"], sizes["length"]
    config = RunConfig.model_validate(
        {
            "name": "peak",
            "model": {
                "model_type": "llama",
                "vocab_size": 1024,
                "hidden_size": sizes["width"],
                "intermediate_size": sizes["width"] * 3,
                "num_hidden_layers": sizes["layers"],
                "num_attention_heads": 4,
            },
            "data": {"train": "unused"},
            "batch": {"sequence_length": length, "micro_batch_size": rows, "global_batch_size": rows},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": 5},
            "loss": {"chunk_tokens": 64},
            "precision": precision,
            "execution": {"recomputation": recomputation},
        }
    )
    memory = plan_run(config, 1).memory
    builder = ModelBuilder(config.model, seed=0, sequence_length=length, execution=config.execution, loss=config.loss)
    model = builder.build("cpu").to(torch.float32 if precision == "fp32" else torch.bfloat16)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)  # gradients are part of the state, not of what this measures
    ids = torch.randint(0, 1024, (rows, length))
    batch = Batch(
        input_ids=ids,
        labels=ids,
        position_ids=torch.arange(length).expand(rows, length),
        cumulative_lengths=torch.arange(rows + 1, dtype=torch.int32) * length,
        longest_document=length,
        target_count=ids.numel(),
    )
    with PeakOfNewTensors() as tensors:
        loss_sum, _ = model(batch)
        loss_sum.backward()
    predicted = memory.activations + memory.logits
    assert predicted == pytest.approx(tensors.peak, rel=TOLERANCE), f"{predicted / tensors.peak:.3f}"
