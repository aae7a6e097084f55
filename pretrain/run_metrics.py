"""What a run's lines hold that no single part knows: rates against a device's peak, what sources gave, bits a byte.

Part of the composition root (run.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from pretrain.data import tokenizer_folder
from pretrain.data.ledger import ledger_values
from pretrain.data.text_bytes import bytes_per_token
from pretrain.models.flops import peak_flops
from pretrain.reporting.record import Value
from pretrain.run_parts import RunParts
from pretrain.training.metrics import StepMeter
from pretrain.training.progress import Progress

logger = logging.getLogger(__name__)


def build_meter(parts: RunParts, progress: Progress) -> StepMeter:
    """The meter of one rank; FLOPs utilisation where the device's peak is known."""
    plan, device = parts.plan, parts.place.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = peak_flops(name) if name else None
    if peak:
        logger.info("MFU is told against %.0f TFLOP/s of %s, dense bf16, a rank", peak / 1e12, name)
    execution, flops = parts.config.execution, plan.flops
    return StepMeter(
        device=device,
        flops_per_token=flops.training,
        hardware_flops_per_token=flops.on_hardware(
            execution.recomputation, plan.architecture.layers, execution.recompute_every
        ),
        peak_flops_per_second=peak * plan.topology.world_size if peak else None,
        skipped_steps=progress.skipped_steps,
        sources=[source.name for source in parts.rows.sources],
    )


class SourceValues:
    """What lines tell of the sources; made on the one rank that reports."""

    def __init__(self, parts: RunParts) -> None:
        self._rows = parts.rows
        folder = parts.config.folder / tokenizer_folder.FOLDER
        validation = parts.data.validation.items()
        # an encoder-decoder's loss is not that of the whole text
        is_of_all_text = parts.config.data.span_corruption is None
        self._bytes = [bytes_per_token(source, folder) if is_of_all_text else None for source in parts.rows.sources]
        self._validation_bytes = {
            name: bytes_per_token(source, folder) for name, source in validation if is_of_all_text
        }

    def of_training(self, progress: Progress, loss: float) -> dict[str, Value]:
        """What each source has given, and the loss a byte of their mixture so far."""
        values: dict[str, Value] = dict(ledger_values(self._rows, progress.samples_consumed))
        ratio = _mean(self._bytes, self._rows.consumed(progress.samples_consumed))
        return values | ({"bits_per_byte": bits_per_byte(loss, ratio)} if ratio else {})

    def of_validation(self, name: str, loss: float) -> dict[str, Value]:
        """The loss a byte of a validation set."""
        ratio = self._validation_bytes.get(name)
        return {f"validation/{name}/bits_per_byte": bits_per_byte(loss, ratio)} if ratio else {}


def bits_per_byte(loss: float, bytes_of_token: float) -> float:
    """A loss in nats a token as bits a byte of text."""
    return loss / math.log(2) / bytes_of_token


def _mean(ratios: Sequence[float | None], rows: Sequence[int]) -> float | None:
    """Over rows given; null where one that gave rows is not known."""
    given = [(ratio, count) for ratio, count in zip(ratios, rows, strict=True) if count]
    known = [(ratio, count) for ratio, count in given if ratio is not None]
    if not given or len(known) < len(given):
        return None
    return sum(ratio * count for ratio, count in known) / sum(count for _, count in known)
