"""A tiny run whose steps any engine can take: configuration, packed rows, and what is compared of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import distributed
from pretrain.checkpoint.boxes import Box
from pretrain.checkpoint.fragments import KINDS
from pretrain.compatibility import choose_engine
from pretrain.config import RunConfig
from pretrain.engines.base import Engine
from pretrain.engines.build import build_engine
from pretrain.engines.deepspeed_config import read_deepspeed_file
from pretrain.models.batch import IGNORED_LABEL, Batch
from pretrain.models.build import ModelBuilder
from pretrain.topology import Topology, build_topology
from tests.distributed.ranks import REPOSITORY

DS_CONFIGS = REPOSITORY / "ds_configs"
# in elements, of DeepSpeed's files
SIZES = ("bucket_size", "sub_group_size", "max_live_parameters", "max_reuse_distance", "persistence_threshold")
VOCABULARY = 512
LARGE_TABLES = (("vocab_size", 9000),)  # so that half of one is over a MiB, which DeepSpeed puts into files
OFFLOAD_FOLDER = Path(tempfile.gettempdir()) / "athanor-test-offload"
SEQUENCE_LENGTH = 48
STEPS = 5
PARALLEL_KEYS = (
    "engine",
    "zero_stage",
    "tensor",
    "pipeline",
    "sequence",
    "expert",
    "pipeline_schedule",
    "data_parallel",
    "offload_optimizer",
    "offload_parameters",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train the same rows."""

    engine: str = "auto"
    zero_stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    expert: int = 1
    pipeline_schedule: str = "1f1b"
    data_parallel: str = "replicate"
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    ds_config: str = ""  # a file of ds_configs
    sizes_divided_by: int = 1  # the file's: a small model then fills as many buckets as a large one does
    recomputation: str = "none"
    recompute_every: int = 1
    compile: bool = False
    precision: str = "fp32"
    micro_batch_size: int = 4
    model_type: str = "llama"
    model: tuple[tuple[str, Any], ...] = ()  # further fields of the model's configuration
    layers: int = 2
    tied: bool = False
    global_batch_size: int = 8
    clip_norm: float = 0.5
    z_loss: float = 1e-3
    seed: int = 3
    small_steps: int = 0  # so many steps at the start take half the global batch, as a batch ramp does
    poisoned_step: int | None = None  # the step whose loss is made non-finite on rank 0

    @property
    def config(self) -> RunConfig:
        family: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 128}
        return RunConfig.model_validate(
            {
                "name": "case",
                "seed": self.seed,
                "model": {
                    "model_type": self.model_type,
                    "vocab_size": VOCABULARY,
                    "hidden_size": 64,
                    "num_hidden_layers": self.layers,
                    "num_attention_heads": 4,
                    "tie_word_embeddings": self.tied,
                    "max_position_embeddings": SEQUENCE_LENGTH,
                    **(family if self.model_type != "gpt2" else {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
                    **dict(self.model),
                },
                "data": {"train": "none"},
                "batch": {
                    "sequence_length": SEQUENCE_LENGTH,
                    "micro_batch_size": self.micro_batch_size,
                    "global_batch_size": self.global_batch_size,
                },
                "optimizer": {"learning_rate": 1e-3, "clip_norm": self.clip_norm},
                "schedule": {"total_steps": STEPS},
                "loss": {"z_loss": self.z_loss},
                "precision": self.precision,
                "parallel": {
                    **{key: getattr(self, key) for key in PARALLEL_KEYS},
                    "deepspeed_config": str(DS_CONFIGS / self.ds_config) if self.ds_config else None,
                    "offload_folder": str(OFFLOAD_FOLDER) if self.offload_optimizer == "nvme" else None,
                },
                "execution": {
                    "recomputation": self.recomputation,
                    "recompute_every": self.recompute_every,
                    "compile": self.compile,
                },
            }
        )

    @property
    def file_values(self) -> dict[str, Any]:
        """What the DeepSpeed file says, or one with groups so small that several lie on the disk, if any do."""
        if self.offload_optimizer == "nvme" and not self.ds_config:
            return {"zero_optimization": {"sub_group_size": 250_000}}
        values = read_deepspeed_file(DS_CONFIGS / self.ds_config) if self.ds_config else {}
        section = values.get("zero_optimization", {})
        for key in [key for key in section if key.endswith(SIZES)]:
            section[key] //= self.sizes_divided_by
        return values

    @property
    def accumulation(self) -> int:
        """Micro-batches of a whole step."""
        return self.global_batch_size // self.micro_batch_size // self.topology.data

    @property
    def topology(self) -> Topology:
        """Of the ranks that run this."""
        return build_topology(
            distributed.world_size(),
            tensor=self.tensor,
            pipeline=self.pipeline,
            sequence=self.sequence,
            expert=self.expert,
        )


@dataclass
class Outcome:
    """What one rank saw."""

    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    evaluation: tuple[float, int]
    fragments: list[tuple[str, str, tuple[int, ...], Box, int, np.ndarray]]
    scalars: dict[str, Any]


def start_engine(case: Case) -> Engine:
    if case.precision == "fp16":
        _allow_fp16()
    config = case.config
    builder = ModelBuilder(
        config.model,
        seed=config.seed,
        sequence_length=SEQUENCE_LENGTH,
        execution=config.execution,
        loss=config.loss,
    )
    return build_engine(
        config,
        choose_engine(config, distributed.world_size()),
        builder,
        torch.device("cpu"),
        topology=case.topology,
        accumulation=case.accumulation,
        file_values=case.file_values,
    )


def _allow_fp16() -> None:
    """PyTorch computes in fp16 on any CPU, if slowly; DeepSpeed refuses it where oneDNN has no kernels for it."""
    from pretrain.engines.deepspeed_import import import_deepspeed

    type(import_deepspeed().accelerator.get_accelerator()).is_fp16_supported = lambda self: True


def take_steps(engine: Engine, case: Case, first_step: int = 0, steps: int = STEPS) -> Outcome:
    losses, norms, skipped = [], [], []
    for step in range(first_step, first_step + steps):
        if step == case.poisoned_step and distributed.rank() == 0:
            poison_next_forward(engine)
        engine.set_learning_rate_multiplier(1.0 - step / 20)
        result = engine.train_step(step_batches(case, step), step)
        losses.append(float(result.loss))
        norms.append(float(result.gradient_norm))
        skipped.append(bool(result.skipped))
    evaluation = engine.evaluate(iter(step_batches(case, 1000)))
    fragments = [(f.name, f.kind, f.shape, f.box, f.start, f.values.cpu().numpy().copy()) for f in engine.fragments()]
    return Outcome(
        losses, norms, skipped, (evaluation.loss_sum, evaluation.target_count), fragments, engine.scalar_state()
    )


def train_case(case: Case) -> Outcome:
    engine = start_engine(case)
    try:
        return take_steps(engine, case)
    finally:
        engine.close()


def poison_next_forward(engine: Engine) -> None:
    """Make the loss of one forward, and so every gradient of its micro-batch, infinite."""

    def multiply(module: torch.nn.Module, inputs: Any, sums: tuple[torch.Tensor, torch.Tensor]) -> Any:
        handle.remove()
        return sums[0] * torch.inf, sums[1]

    handle = engine._model.register_forward_hook(multiply)


def step_batches(case: Case, step: int) -> list[Batch]:
    """The micro-batches of this rank's data coordinate; rows depend on the step and their number only."""
    topology, micro = case.topology, case.micro_batch_size
    rank, ranks = topology.coordinate(distributed.rank()).data, topology.data
    batches = []
    rows_of_step = case.global_batch_size // (2 if step < case.small_steps else 1)
    for index in range(rows_of_step // micro // ranks):
        first = index * micro * ranks + rank * micro
        rows = [packed_row(step * case.global_batch_size + first + place) for place in range(micro)]
        batches.append(stack_rows(rows))
    return batches


def packed_row(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two documents."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCE_LENGTH,), generator=generator)
    cut = int(torch.randint(8, SEQUENCE_LENGTH - 8, (1,), generator=generator))
    positions = torch.cat([torch.arange(cut), torch.arange(SEQUENCE_LENGTH - cut)])
    labels = torch.cat([tokens[1:], torch.tensor([IGNORED_LABEL])])
    labels[cut - 1] = IGNORED_LABEL
    labels[: number % 5] = IGNORED_LABEL  # a different number of targets in every row
    return tokens, labels, positions


def stack_rows(rows: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Batch:
    tokens, labels, positions = (torch.stack(parts) for parts in zip(*rows, strict=True))
    starts = torch.nonzero(positions.flatten() == 0).flatten()
    borders = torch.cat([starts, torch.tensor([positions.numel()])])
    return Batch(
        input_ids=tokens,
        labels=labels,
        position_ids=positions,
        cumulative_lengths=borders.int(),
        longest_document=int(borders.diff().max()),
        target_count=int((labels != IGNORED_LABEL).sum()),
    )


def assemble(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], np.ndarray]:
    """Whole tensors from all ranks' fragments; every element must be there exactly once."""
    whole: dict[tuple[str, str], np.ndarray] = {}
    for outcome in outcomes:
        for name, kind, shape, box, start, values in outcome.fragments:
            target = whole.setdefault((name, kind), np.full(int(np.prod(shape)), np.nan, dtype=np.float32))
            inside = tuple(slice(*side) for side in box)
            places = np.arange(target.size).reshape(shape)[inside].ravel()[start : start + values.size]
            assert np.isnan(target[places]).all(), f"{name} {kind} is covered twice"
            target[places] = values
    for (name, kind), values in whole.items():
        assert not np.isnan(values).any(), f"{name} {kind} is not covered"
        assert kind in KINDS
    return whole


def has_async_io() -> bool:
    """Whether DeepSpeed's async_io was built ahead: its first use compiles for minutes, past any test's deadline."""
    built = os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
    return Path(built, "async_io", "async_io.so").exists()


WITHOUT_ASYNC_IO = "DeepSpeed's async_io is not built: libaio-dev, then python -m launch.warm_deepspeed async_io"


def skip_without_async_io(*cases: Case) -> None:
    """Skip the test where one of its cases cannot run on this machine."""
    if any(case.offload_optimizer == "nvme" for case in cases) and not has_async_io():
        pytest.skip(WITHOUT_ASYNC_IO)
