"""Loss, perplexity and bits per byte of a saved or exported model on token datasets, over one rank or several.

Owns what is measured, document by document; means and intervals are measures.py's, rows data/'s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from data_tools.token_shards import Row
from pretrain import distributed
from pretrain.config import ExecutionSection, LossSection
from pretrain.config_data import DataSection, SpanCorruptionSection
from pretrain.data.loader import evaluation_batch, rank_rounds
from pretrain.data.micro_batch import document_borders, empty_row
from pretrain.data.open_datasets import OpenedSource, open_datasets
from pretrain.errors import ConfigError, DataError, Problem
from pretrain.inference.load import LoadedModel
from pretrain.inference.measures import Measured
from pretrain.inference.token_bytes import bytes_of_tokens
from pretrain.models.batch import IGNORED_LABEL, Batch, SpanBatch, TargetScores
from pretrain.models.training_model import TrainingModel

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 8
DEFAULT_SEQUENCE_LENGTH = 1024  # tokens, where neither the run nor the data says


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model that is measured on this rank, beside others on theirs."""

    model: TrainingModel
    bytes_of_tokens: NDArray[np.int64] | None
    device: torch.device
    rows_at_a_time: int = ROWS_AT_A_TIME

    @classmethod
    def of(cls, loaded: LoadedModel, device: torch.device, *, rows_at_a_time: int = ROWS_AT_A_TIME) -> Evaluation:
        """Get a loaded model ready."""
        return cls(
            model=TrainingModel(loaded.network, execution=ExecutionSection(), loss=LossSection()).eval(),
            # an encoder-decoder's loss is not that of the whole text
            bytes_of_tokens=None
            if loaded.network.config.is_encoder_decoder
            else bytes_of_tokens(loaded.tokenizer, loaded.network.config.vocab_size),
            device=device,
            rows_at_a_time=rows_at_a_time,
        )


def evaluate_datasets(
    evaluation: Evaluation,
    datasets: Mapping[str, str],
    *,
    sequence_length: int | None,
    max_rows: int | None = None,
    cache: str | None = None,
    spans: SpanCorruptionSection | None = None,
) -> Iterator[Measured]:
    """Measure a model on each dataset (name -> folder or URL, its validation split). Every rank must iterate on.

    Packed data is read in its own rows, other data in rows of `sequence_length` tokens. What lies behind URLs is staged
    into the folder `cache`. `spans` are those that an encoder-decoder was trained on; null: the defaults.

    Raises:
        ConfigError: no dataset is named.
        DataError: with every problem of the datasets.
    """
    if not datasets:
        raise ConfigError(Problem("no dataset to evaluate on", "one or more", "give --data FOLDER"))
    # not validated: a run must name training data, an evaluation has none
    section = DataSection.model_construct(train=[], validation=dict(datasets), cache=cache)
    network = evaluation.model.network
    if network.config.is_encoder_decoder:
        section = section.model_copy(update={"span_corruption": spans or SpanCorruptionSection()})
    opened = open_datasets(
        section,
        sequence_length=sequence_length or DEFAULT_SEQUENCE_LENGTH,
        vocabulary_size=network.config.vocab_size,
        keeps_packed_length=True,
    )
    _refuse_long_rows(network, opened.validation)
    for data in opened.validation.values():
        yield measure(evaluation, data, max_rows=max_rows)


def measure(evaluation: Evaluation, data: OpenedSource, *, max_rows: int | None = None) -> Measured:
    """Measure one dataset, the first `max_rows` rows of it (default: all), each on one rank. Collective."""
    rows = data.rows if max_rows is None else min(data.rows, max_rows)
    found = [np.empty((0, len(_Piece.COLUMNS)))]
    for own in rank_rounds(rows, evaluation.rows_at_a_time, distributed.rank(), distributed.world_size()):
        if own:
            found.append(_measure_rows(evaluation, data, own))
    pieces = distributed.gather_rows(torch.from_numpy(np.concatenate(found))).numpy()
    pieces = pieces[np.lexsort((pieces[:, _Piece.OFFSET], pieces[:, _Piece.ROW]))]
    documents = np.maximum(np.cumsum(pieces[:, _Piece.BEGINS]).astype(np.int64) - 1, 0)

    def by_document(column: int) -> NDArray[np.float64]:
        return np.bincount(documents, weights=pieces[:, column]).astype(np.float64)

    return Measured(
        name=data.name,
        losses=by_document(_Piece.LOSS),
        targets=by_document(_Piece.TARGETS),
        bytes=None if evaluation.bytes_of_tokens is None else by_document(_Piece.BYTES),
        rows=rows,
        unigram_entropy=data.dataset.manifest.unigram_entropy_nats,
    )


def _refuse_long_rows(network: PreTrainedModel, datasets: Mapping[str, OpenedSource]) -> None:
    """Learned positions end; rotary ones do not, but what comes after those of training is seldom known well.

    An encoder-decoder's are distances, the far ones of which share what was learnt.
    """
    if network.config.is_encoder_decoder:
        return
    table = network.get_input_embeddings()
    tables = [module for module in network.modules() if isinstance(module, nn.Embedding) and module is not table]
    positions = min((module.num_embeddings for module in tables), default=None)
    trained = getattr(network.config, "max_position_embeddings", None)
    problems = []
    for name, data in datasets.items():
        if positions is not None and data.sequence_length > positions:
            found = f"{name} has rows of {data.sequence_length} tokens, the model {positions} learned positions"
            problems.append(Problem(found, f"rows of at most {positions}", "pack the tokens again, into shorter rows"))
        elif trained is not None and data.sequence_length > trained:
            logger.warning("%s has rows of %d tokens, the model was made for %d", name, data.sequence_length, trained)
    if problems:
        raise DataError(*problems)


class _Piece:
    """Columns of what is known of a document's part in one row."""

    COLUMNS = ROW, OFFSET, BEGINS, LOSS, TARGETS, BYTES = range(6)


@torch.no_grad()
def _measure_rows(evaluation: Evaluation, data: OpenedSource, own: range) -> NDArray[np.float64]:
    rows = data.read(own)
    length = data.sequence_length
    # short micro-batches are filled up: all have one shape, so that a kernel sums them in one order
    padded = rows + [empty_row(length)] * (evaluation.rows_at_a_time - len(rows))
    batch = evaluation_batch(data, own, padded)
    pieces = np.concatenate([_pieces_of(data, number, row) for number, row in zip(own, rows, strict=True)])
    owners, batch = _with_owners(batch, padded, length, evaluation.device)
    evaluation.model(batch.to(evaluation.device))
    assert batch.scores is not None
    # pieces of padding own no targets; those behind the last row are not even listed
    pieces[:, _Piece.LOSS] = batch.scores.sums[: len(pieces), 0].cpu().numpy()
    labels = batch.labels.numpy().ravel()
    is_target = labels != IGNORED_LABEL
    owners, labels = owners[is_target], labels[is_target]
    pieces[:, _Piece.TARGETS] = np.bincount(owners, minlength=len(pieces))[: len(pieces)]
    if evaluation.bytes_of_tokens is not None:
        text = evaluation.bytes_of_tokens[labels]
        pieces[:, _Piece.BYTES] = np.bincount(owners, weights=text, minlength=len(pieces))[: len(pieces)]
    return pieces[pieces[:, _Piece.OFFSET] >= 0]


def _pieces_of(data: OpenedSource, number: int, row: Row) -> NDArray[np.float64]:
    """One line a piece of a row, padding included (offset -1), as document_borders cuts them."""
    pieces = np.zeros((len(row.starts) + (row.used < data.sequence_length), len(_Piece.COLUMNS)))
    pieces[:, _Piece.ROW] = number
    pieces[:, _Piece.OFFSET] = -1
    pieces[: len(row.starts), _Piece.OFFSET] = row.starts
    pieces[1:, _Piece.BEGINS] = pieces[1:, _Piece.OFFSET] >= 0
    first = number * data.sequence_length
    pieces[0, _Piece.BEGINS] = data.dataset.document_starts(first, first + 1).size > 0
    return pieces


def _with_owners(
    batch: Batch, rows: Sequence[Row], length: int, device: torch.device
) -> tuple[NDArray[np.int64], Batch]:
    """Whose piece each label is of, flat, and the micro-batch that adds up by them."""
    lengths = np.diff(document_borders(rows, length))
    owners = np.repeat(np.arange(len(lengths)), lengths).reshape(len(rows), length)
    if isinstance(batch, SpanBatch):
        owners = np.take_along_axis(owners, batch.places.numpy(), 1)
    scores = TargetScores(
        owners=torch.from_numpy(owners),
        sums=torch.zeros((len(lengths), 2), dtype=torch.float64, device=device),
    )
    return owners.ravel(), replace(batch, scores=scores)
