"""`pretrain evaluate` and `quantize`: a saved or exported model on datasets and tasks, as lines or JSON.

Part of the composition root (run.py). How something is measured is inference/'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain import distributed
from pretrain.checkpoint.inspection import select_checkpoint
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config_data import SpanCorruptionSection
from pretrain.errors import ConfigError, Problem
from pretrain.inference.evaluate import Evaluation, evaluate_datasets
from pretrain.inference.evaluate_tasks import evaluate_tasks
from pretrain.inference.harness import TaskRequest, result_table, result_values
from pretrain.inference.load import is_hugging_face_folder, load_source
from pretrain.inference.measures import METHOD, Estimate, Measured, join
from pretrain.inference.quantize import Quantization
from pretrain.inference.quantize_report import QuantizeReport, quantize_source

ALL = "all"  # name of the line over all datasets


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What the command line asks for."""

    source: Path
    data: Sequence[str] = ()  # folders or URLs, each may have a name before: NAME=FOLDER; none: those of the run
    split: str = "validation"
    max_rows: int | None = None  # of each dataset; null: all
    rows_at_a_time: int = 8
    tasks: TaskRequest | None = None  # null: none; with tasks, datasets are measured only where `data` names some
    adds_bos: bool = False  # of tasks' texts


def evaluate(request: EvaluationRequest, *, as_json: bool) -> Iterator[str]:
    """Measure, and say it: lines on the first rank, nothing on others. The same call on every rank."""
    place = distributed.read_place()
    distributed.start(place)
    try:
        loaded = load_source(request.source, device=place.device)
        evaluation = Evaluation.of(loaded, place.device, rows_at_a_time=request.rows_at_a_time)
        measured = list(_measure(request, evaluation)) if request.data or request.tasks is None else []
        if len(measured) > 1:
            measured.append(join(measured, ALL))
        results = None
        if request.tasks:
            results = evaluate_tasks(
                loaded,
                evaluation.model,
                request.tasks,
                device=place.device,
                rows_at_a_time=request.rows_at_a_time,
                adds_bos=request.adds_bos,
            )
    finally:
        distributed.stop()
    if place.is_main_process and as_json:
        yield _to_json(request, measured, results)
    elif place.is_main_process:
        yield from map(_line, measured)
        yield from [result_table(results)] if results else []


def quantize(
    source: Path, output: Path, how: Quantization, *, data: Sequence[str], split: str, max_rows: int | None
) -> QuantizeReport:
    """Quantize a model in one process, measured on the given datasets or on its run's validation sets."""
    settings = _settings(source, data, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return quantize_source(source, output, how, device=device, max_rows=max_rows, **settings)


def _measure(request: EvaluationRequest, evaluation: Evaluation) -> Iterator[Measured]:
    settings = _settings(request.source, request.data, request.split)
    spans = _spans(request.source)
    yield from evaluate_datasets(evaluation, max_rows=request.max_rows, spans=spans, **settings)


def _settings(source: Path, data: Sequence[str], split: str) -> dict[str, Any]:
    """What is to be read: the given datasets, else those of the run, as the run reads them."""
    config = _run_config(source)
    return {
        "datasets": _named(data, split) if data else config.get("data", {}).get("validation", {}),
        "sequence_length": config.get("batch", {}).get("sequence_length"),
        "cache": config.get("data", {}).get("cache"),
    }


def _spans(source: Path) -> SpanCorruptionSection | None:
    values = _run_config(source).get("data", {}).get("span_corruption")
    return SpanCorruptionSection.model_validate(values) if values else None


def _run_config(source: Path) -> dict[str, Any]:
    run = {} if is_hugging_face_folder(source) else read_manifest(select_checkpoint(source)).metadata
    config: dict[str, Any] = run.get("run_config", {})
    return config


def _named(given: Sequence[str], split: str) -> dict[str, str]:
    """Datasets by name; a folder that has the split means that split."""
    datasets: dict[str, str] = {}
    for text in given:
        before, equals, after = text.partition("=")
        name, place = (before, after) if equals and "/" not in before else (Path(text).name, text)
        if not name or not place:
            raise ConfigError(Problem(f"--data {text!r}", "FOLDER, or NAME=FOLDER", "name the dataset's folder"))
        if name in datasets or name == ALL:
            found = f"--data: two datasets would be called {name!r}" if name != ALL else f"--data: the name {ALL!r}"
            raise ConfigError(Problem(found, "names of their own", f"write, for example, --data other={place}"))
        datasets[name] = str(Path(place) / split) if (Path(place) / split).is_dir() else place
    return datasets


def _line(measured: Measured) -> str:
    loss, perplexity, bits = measured.loss, measured.perplexity, measured.bits_per_byte
    words = [
        measured.name,
        f"loss {loss.value:.4f} nats/token{_interval(loss, '.4f')}",
        f"perplexity {perplexity.value:,.2f}{_interval(perplexity, ',.2f')}",
    ]
    words += [f"bits/byte {bits.value:.4f}{_interval(bits, '.4f')}"] if bits else []
    words.append(f"targets {int(measured.targets.sum()):,} of {len(measured.targets):,} documents")
    if measured.unigram_entropy is not None:
        words.append(f"unigram entropy {measured.unigram_entropy:.4f}")
    return "  ".join(words)


def _interval(estimate: Estimate, form: str) -> str:
    return "" if estimate.low is None else f" [{estimate.low:{form}}, {estimate.high:{form}}]"


def _to_json(request: EvaluationRequest, measured: Sequence[Measured], results: dict[str, Any] | None) -> str:
    values: dict[str, Any] = {"source": str(request.source)}
    if measured:
        values |= {"interval": METHOD, "sets": {part.name: part.to_json() for part in measured}}
    if results:
        values["tasks"] = result_values(results)
    return json.dumps(values, indent=2)
