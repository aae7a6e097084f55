"""Loss and perplexity of a saved or exported model on packed datasets, over one rank or several.

Owns the choice of what is measured; the sums are models/evaluation.py's, the rows data/'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain import distributed
from pretrain.config import ExecutionSection, LossSection
from pretrain.config_data import DataSection
from pretrain.data.loader import evaluation_batches
from pretrain.data.open_datasets import OpenedSource, open_datasets
from pretrain.errors import ConfigError, Problem
from pretrain.inference.load import load_source
from pretrain.models.evaluation import sum_losses
from pretrain.models.training_model import TrainingModel

ROWS_AT_A_TIME = 8
DEFAULT_SEQUENCE_LENGTH = 1024  # tokens, where neither the run nor the data says


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One dataset's result."""

    name: str
    loss: float  # nats per target token
    targets: int  # tokens
    unigram_entropy: float | None  # nats per token, of the corpus that made the data, where known

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate_source(
    source: Path,
    datasets: Mapping[str, str],
    *,
    device: torch.device,
    sequence_length: int | None,
    max_rows: int | None = None,
    cache: str | None = None,
) -> Iterator[Measured]:
    """Measure a model on each dataset (name -> folder or URL, its validation split). Every rank must iterate on.

    Weights are computed with in fp32. `sequence_length` is that of the run; null: the data's own. What lies behind
    URLs is staged into the folder `cache`.

    Raises:
        ConfigError: no dataset is named.
        DataError: with every problem of the datasets.
    """
    if not datasets:
        raise ConfigError(Problem("no dataset to evaluate on", "one or more", "give --data FOLDER"))
    network = load_source(source, device=device).network
    model = TrainingModel(network, execution=ExecutionSection(), loss=LossSection()).eval()
    # not validated: a run must name training data, an evaluation has none
    section = DataSection.model_construct(train=[], validation=dict(datasets), cache=cache)
    opened = open_datasets(
        section,
        sequence_length=sequence_length or DEFAULT_SEQUENCE_LENGTH,
        vocabulary_size=network.config.vocab_size,
    )
    for name, data in opened.validation.items():
        loss, targets = distributed.all_reduce_sum(_sum(model, data, device, max_rows)).tolist()
        yield Measured(
            name=name,
            loss=loss / max(1, targets),
            targets=int(targets),
            unigram_entropy=data.dataset.manifest.unigram_entropy_nats,
        )


def _sum(model: TrainingModel, data: OpenedSource, device: torch.device, max_rows: int | None) -> torch.Tensor:
    batches = evaluation_batches(
        data,
        micro_batch_size=ROWS_AT_A_TIME,
        rank=distributed.rank(),
        data_parallel_size=distributed.world_size(),
        max_rows=max_rows,
    )
    return sum_losses(model, batches, device)
