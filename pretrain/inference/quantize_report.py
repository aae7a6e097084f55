"""`pretrain quantize`: writes a quantized folder, and says what it costs: size, speed and perplexity before and after.

Owns the measurement and the folder's publication. The result is read back and compared before it is there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.inference.evaluate import Evaluation, evaluate_datasets
from pretrain.inference.load import LoadedModel, load_source
from pretrain.inference.measures import join
from pretrain.inference.quantize import Quantization, Quantized, quantize_network, require_quantizable
from pretrain.inference.quantized_folder import load_quantized, write_quantized

PROMPT_TOKENS, NEW_TOKENS, PROMPTS, REPEATS = 16, 48, 4, 3  # of the measurement of speed


@dataclass(frozen=True, kw_only=True)
class Worth:
    """A model as it was, or as it is quantized."""

    bytes: int  # of weights, stored
    tokens_per_second: float  # generated greedily, several prompts together
    perplexity: float
    perplexity_interval: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What `pretrain quantize` prints."""

    output: Path
    how: Quantization
    quantized: Quantized
    before: Worth
    after: Worth

    def to_json(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self) | {"output": str(self.output)}

    def __str__(self) -> str:
        count, kept = self.quantized.quantized_parameters, self.quantized.kept_parameters
        name = f"INT{self.how.bits}" + (f" in groups of {self.how.group_size}" if self.how.bits == 4 else "")
        lines = [
            f"{self.output}: {name}",
            f"{count:,} parameters of {self.quantized.layers} linear layers, {kept:,} as they were (token table, head, "
            "norms, biases)",
            f"{'':8}{'MB':>12}{'tokens/s':>12}{'perplexity':>14}  95 % interval",
        ]
        for title, worth in (("before", self.before), ("after", self.after)):
            low, high = worth.perplexity_interval
            interval = "" if low is None else f"  {low:,.3f} to {high:,.3f}"
            numbers = f"{worth.bytes / 1e6:12,.2f}{worth.tokens_per_second:12,.1f}{worth.perplexity:14,.3f}"
            lines.append(f"{title:8}{numbers}{interval}")
        return "\n".join(lines)


def quantize_source(
    source: Path,
    output: Path,
    how: Quantization,
    *,
    datasets: Mapping[str, str],
    sequence_length: int | None,
    max_rows: int | None,
    cache: str | None,
    device: torch.device,
) -> QuantizeReport:
    """Quantize a model into a folder that evaluate and generate take, measured before and after in fp32.

    Raises:
        ConfigError: the output is in the way, nothing can be quantized, or no dataset is named.
    """
    _refuse_output(output)
    loaded = load_source(source, device=device)
    require_quantizable(loaded.network, how)

    def worth(network: PreTrainedModel, size: int) -> Worth:
        evaluation = Evaluation.of(LoadedModel(network=network, tokenizer=loaded.tokenizer, origin=source), device)
        sets = list(
            evaluate_datasets(evaluation, datasets, sequence_length=sequence_length, max_rows=max_rows, cache=cache)
        )
        perplexity = join(sets, "all").perplexity
        return Worth(
            bytes=size,
            tokens_per_second=measure_speed(network),
            perplexity=perplexity.value,
            perplexity_interval=(perplexity.low, perplexity.high),
        )

    before = worth(
        loaded.network, sum(weight.numel() * weight.element_size() for weight in loaded.network.parameters())
    )
    quantized = quantize_network(loaded.network, how)
    staging = output.with_name(f".staging-{output.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write_quantized(loaded.network, how, staging)
        loaded.tokenizer.save_pretrained(staging)
        stored = load_quantized(staging, dtype=torch.float32, device=device)
        _require_equal(loaded.network, stored, staging)
        size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        after = worth(stored, size)
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return QuantizeReport(output=output, how=how, quantized=quantized, before=before, after=after)


@torch.no_grad()
def measure_speed(network: PreTrainedModel) -> float:
    """Tokens a second that greedy generation writes, the best of some tries; which tokens does not matter."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(int(network.config.vocab_size), (PROMPTS, PROMPT_TOKENS), generator=generator)
    prompt = prompt.to(network.device)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        if network.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return PROMPTS * NEW_TOKENS / min(seconds)


@torch.no_grad()
def _require_equal(network: PreTrainedModel, stored: PreTrainedModel, folder: Path) -> None:
    ids = torch.arange(min(32, int(network.config.vocab_size)), device=network.device).unsqueeze(0)
    if not torch.equal(network(input_ids=ids).logits, stored(input_ids=ids).logits):
        raise CheckpointError(
            Problem(f"{folder} gives other logits than the model that was written", "equal bits", "report this")
        )


def _refuse_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(Problem(f"{output} is there already", "a new or empty folder", "choose another --output"))
    if output.is_dir():
        output.rmdir()
