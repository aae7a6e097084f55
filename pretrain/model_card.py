"""The README of an exported folder: what the model is, what it was trained on, at what cost, with what result.

Everything comes from the checkpoint and the run folder around it; what these do not say, the card does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.fragments import element_count
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config import RunConfig
from pretrain.errors import ConfigError
from pretrain.run_plan import model_flops

METRICS_FILE = "metrics.jsonl"
_TRAINING_KEYS = ("precision", "seed")


def model_card(checkpoint: Checkpoint, name: str, types: Mapping[str, str]) -> str:
    """The text, in the form that the Hugging Face hub reads."""
    sections = {
        "Model": _model_lines(checkpoint, types),
        "Data": _data_lines(checkpoint.manifest.metadata),
        "Training": _training_lines(checkpoint),
        "Results": _result_lines(checkpoint),
        "Software": [f"- {package} {version}" for package, version in checkpoint.manifest.versions.items()],
    }
    is_encoder_decoder = checkpoint.manifest.metadata["model_config"].get("is_encoder_decoder", False)
    task = "text2text-generation" if is_encoder_decoder else "text-generation"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "---", f"# {name}", ""]
    act = "writes what <extra_id_0>, <extra_id_1>, ... stand for in a text" if is_encoder_decoder else "continues text"
    lines += [f"A base language model: it {act} and was not trained to follow instructions.", ""]
    for title, content in sections.items():
        rows = list(content)
        if rows:
            lines += [f"## {title}", "", *rows, ""]
    return "\n".join([*lines, "## Use", "", *_use_lines(name, is_encoder_decoder=is_encoder_decoder), ""])


def _model_lines(checkpoint: Checkpoint, types: Mapping[str, str]) -> Iterator[str]:
    manifest = checkpoint.manifest
    config = manifest.metadata["model_config"]
    elements = sum(element_count(checkpoint.shape(parameter)) for parameter in checkpoint.names())
    yield f"- Architecture: {config['model_type']}, {elements:,} parameters, vocabulary of {config['vocab_size']:,}"
    yield f"- Stored as {', '.join(sorted(set(types.values())))} from fp32 master weights, saved {manifest.saved_at}"
    if imported := manifest.metadata.get("imported"):
        yield f"- Imported from the folder {imported['folder']}, and not trained further"
    weights = manifest.metadata.get("run_config", {}).get("model", {}).get("weights")
    if weights:
        yield f"- Training began with the weights of {Path(weights).name}"


def _data_lines(metadata: Mapping[str, Any]) -> Iterator[str]:
    given: Mapping[str, Mapping[str, float]] = metadata.get("data_ledger", {})
    if not given:
        return
    yield "| source | rows | tokens | epochs |"
    yield "|---|---:|---:|---:|"
    for source, read in given.items():
        name = source if "://" in source else Path(source).name or source
        yield f"| {name} | {read['rows']:,} | {read['tokens']:,} | {read['epochs']:.2f} |"


def _training_lines(checkpoint: Checkpoint) -> Iterator[str]:
    manifest = checkpoint.manifest
    tokens = manifest.progress.get("tokens_seen")
    if manifest.step:
        yield f"- Pretrained for {manifest.step:,} steps" + (f", {tokens:,} tokens" if tokens is not None else "")
    run: Mapping[str, Any] = manifest.metadata.get("run_config", {})
    if not run:
        return
    batch, optimizer, schedule = run["batch"], run["optimizer"], run["schedule"]
    yield f"- Rows of {batch['sequence_length']:,} tokens, {batch['global_batch_size']:,} rows a step"
    yield (
        f"- {optimizer['name']}, learning rate {optimizer['learning_rate']:g}, betas {tuple(optimizer['betas'])}, "
        f"weight decay {optimizer['weight_decay']:g}; schedule {schedule['name']}"
    )
    yield "- " + ", ".join(f"{key} {run[key]}" for key in _TRAINING_KEYS)
    try:
        flops = model_flops(RunConfig.model_validate(run)).training
    except (ConfigError, OSError, ValueError):  # the folder of starting weights may be gone by now
        flops = None
    if flops and tokens:
        yield f"- Compute: {flops * tokens:.3g} floating-point operations of the model, {flops:,} a token"
    seconds = sum(line["step_seconds"] for line in _metrics(checkpoint) if "step_seconds" in line)
    if seconds:
        yield (
            f"- {seconds / 3600:.3g} hours of steps that count, as far as {METRICS_FILE} has them; "
            f"{manifest.world_size} ranks at the last save"
        )


def _result_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """Of the evaluation nearest before the checkpoint's step."""
    lines = [line for line in _metrics(checkpoint) if any(key.startswith("validation/") for key in line)]
    if not lines:
        return
    last = lines[-1]
    yield f"At step {last['step']:,}:"
    yield ""
    yield from (f"- {key}: {value:.4f}" for key, value in last.items() if key.startswith("validation/"))


def _metrics(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Lines of the run's metrics up to the checkpoint; the last one of a step that was taken twice counts."""
    path = checkpoint.path.parent.parent / METRICS_FILE
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kinds: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in lines:
        if line.get("step", 0) <= checkpoint.manifest.step:
            kinds[line.get("step", 0), "loss" in line] = line
    return list(kinds.values())


def _use_lines(name: str, *, is_encoder_decoder: bool) -> list[str]:
    kind = "AutoModelForSeq2SeqLM" if is_encoder_decoder else "AutoModelForCausalLM"
    text = '"Once <extra_id_0> a time" + tokenizer.eos_token' if is_encoder_decoder else '"Once upon a time"'
    return [
        "```python",
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'folder = "{name}"',
        f"tokenizer, model = AutoTokenizer.from_pretrained(folder), {kind}.from_pretrained(folder)",
        f'prompt = tokenizer({text}, return_tensors="pt", add_special_tokens=False)',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50, do_sample=True)[0]))",
        "```",
    ]
