"""What a plan is asked for: a model, devices, tokens, a batch; read from the words of the command line.

Owns the spellings and the defaults. Which layouts answer the request is search.py's.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import ModelSection
from pretrain.errors import ConfigError, Problem
from pretrain.models.architecture import Architecture, resolve_architecture
from pretrain.models.parameter_count import count_parameters
from pretrain.models.presets import PRESETS
from pretrain.planning.constants import CONSTANTS, SOFTWARE, Constants, Software
from pretrain.planning.devices import Device, find_device

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
LONGEST_ROW = 4096  # tokens, where no length is asked for
BATCH_TOLERANCE = 0.05  # of a batch given in round numbers

# Names of sizes that people say -> the model section of a run.
MODELS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    **{size: {"preset": f"llama-{size}"} for size in ("125m", "350m", "1b", "7b", "13b", "70b")},
    "8x7b": {"model_type": "mixtral"},  # whose defaults are Mixtral 8x7B's (Jiang et al. 2024, arXiv:2401.04088)
}
# Tokens of a step by size (parameters), where none is asked for: GPT-3's (Brown et al. 2020, table 2.1) to Llama 2's.
BATCH_TOKENS = ((0.3e9, 0.5e6), (0.9e9, 1e6), (3e9, 2e6), (math.inf, 4e6))


@dataclass(frozen=True, kw_only=True)
class Economy:
    """What time and failures cost; all are assumptions that options replace."""

    hourly_price: float  # US dollars, of one device
    failure_hours: float = 50_000.0  # device-hours between failures: Llama 3 had 419 in 54 days on 16,384 GPUs
    restart_minutes: float = 10.0  # from a failure to the next step
    storage_bandwidth: float = 2e9  # bytes/s that one node writes checkpoints with
    copy_bandwidth: float = 5e9  # bytes/s from a device to its host, while the step waits


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question; build it with `build_request`."""

    name: str  # of the model
    model: Mapping[str, Any]  # the section of a run configuration
    shape: Architecture
    device: Device
    nodes: int
    node_devices: int
    tokens: int
    sequence_length: int  # tokens
    global_batch_rows: int
    economy: Economy
    constants: Constants = CONSTANTS
    software: Software = SOFTWARE["athanor"]

    @property
    def devices(self) -> int:
        """Of the whole job."""
        return self.nodes * self.node_devices

    @property
    def shape_parameters(self) -> int:
        """All parameters of the model."""
        return count_parameters(self.shape).total

    @property
    def global_batch_tokens(self) -> int:
        """Of a step."""
        return self.global_batch_rows * self.sequence_length


def build_request(
    *,
    model: str,
    nodes: int,
    gpus: str,
    tokens: str,
    global_batch: str | None = None,
    sequence_length: int | None = None,
    economy: Mapping[str, float] | None = None,
) -> Request:
    """Read a request.

    Raises:
        ConfigError: with everything that is no number, no known device, or does not divide.
    """
    problems: list[Problem] = []

    def attempt(work: Any) -> Any:
        try:
            return work()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    section = attempt(lambda: find_model(model))
    devices = attempt(lambda: read_devices(gpus))
    total = attempt(lambda: read_count(tokens, "--tokens"))
    asked = attempt(lambda: read_count(global_batch, "--global-batch")) if global_batch is not None else None
    shape = length = None
    if section is not None:
        length = sequence_length or min(LONGEST_ROW, resolve_architecture(ModelSection(**section), 1).positions)
        shape = attempt(lambda: resolve_architecture(ModelSection(**section), length))
    if problems or shape is None or devices is None or length is None:
        raise ConfigError(*problems)
    count, device, constants, software = devices
    size = count_parameters(shape).active
    batch = asked or next(batch for largest, batch in BATCH_TOKENS if size <= largest)
    is_exact = global_batch is not None and global_batch.replace("_", "").replace(",", "").isdigit()
    rows = _rows(batch, length, nodes * count, is_exact=is_exact)
    return Request(
        name=model.lower(),
        model=section,
        shape=shape,
        device=device,
        nodes=nodes,
        node_devices=count,
        tokens=int(total),
        sequence_length=length,
        global_batch_rows=rows,
        economy=Economy(**{"hourly_price": device.hourly_price, **(economy or {})}),
        constants=constants,
        software=software,
    )


def find_model(name: str) -> Mapping[str, Any]:
    """The model section of a preset, of a size that people say, or of a Llama of any size (3b, 30b, 1T).

    Raises:
        ConfigError: the name is none of them.
    """
    plain = name.lower().strip()
    if plain in MODELS:
        return MODELS[plain]
    if re.fullmatch(r"\d+(\.\d+)?[mbt]", plain):
        return llama_of_size(read_count(plain, "--model"))
    nearest = difflib.get_close_matches(plain, MODELS, n=1, cutoff=0.4)
    change = f"write --model {nearest[0] if nearest else '7b'}"
    raise ConfigError(Problem(f"--model: unknown model {name!r}", f"a size (3b, 1T) or {', '.join(MODELS)}", change))


def llama_of_size(parameters: float) -> Mapping[str, Any]:
    """A Llama shape of about that many parameters: width a multiple of 128 heads' columns, about 110 widths a layer.

    Raises:
        ConfigError: no sensible shape is so small.
    """
    if parameters < 3e7:
        raise ConfigError(Problem(f"--model: {parameters:,.0f} parameters", "30M or more", "name a larger model"))
    best = None
    step = 128 if parameters < 2e10 else 1024  # columns of whole heads, and of whole groups of them
    for hidden in range(2 * step, 65537, step):
        width = round(hidden * 8 / 3 / 256) * 256
        groups = max(1, hidden // 128) if hidden < 6144 else 8
        layer = 2 * hidden * hidden + 2 * hidden * groups * 128 + 3 * hidden * width
        layers = round((parameters - 2 * 32000 * hidden) / layer)
        if layers < 2:
            continue
        aspect = abs(math.log(hidden / layers / 110))
        wrong = abs(math.log((layers * layer + 2 * 32000 * hidden) / parameters))
        if best is None or aspect + 10 * wrong < best[0]:
            best = (aspect + 10 * wrong, hidden, width, groups, layers)
    assert best is not None, "two layers of the smallest width are below every size that is let through"
    _, hidden, width, groups, layers = best
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": groups,
        "max_position_embeddings": LONGEST_ROW,
    }


def read_count(text: str, place: str) -> float:
    """A number such as 300B, 4M, 1.5T or 1_000.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"([\d_,]*\.?\d+(?:e\d+)?)\s*([kmbt]?)", text.strip().lower())
    value = float(found[1].replace("_", "").replace(",", "")) * SUFFIXES[found[2]] if found else 0.0
    if value <= 0:
        raise ConfigError(Problem(f"{place} is {text!r}", "a number such as 300B, 4M or 1.5T", f"correct {place}"))
    return value


def read_devices(text: str) -> tuple[int, Device, Constants, Software]:
    """Devices of one node and their kind: `8xA100-80`, `2xcalibration.json`, or a kind alone for its usual node.

    Raises:
        ConfigError: the kind is unknown, or the count is not a positive number.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x*])?\s*(.+)", text.strip(), re.IGNORECASE)
    assert found is not None or not text.strip()
    kind = found[2] if found else text
    if kind.endswith(".json"):
        from pretrain.planning.calibration import load_calibration

        measured = load_calibration(Path(kind))
        device, constants, software = measured.device, measured.constants, measured.software
    else:
        device, constants, software = find_device(kind), CONSTANTS, SOFTWARE["athanor"]
    count = int(found[1]) if found and found[1] else device.node_devices
    if not 1 <= count <= 64:
        raise ConfigError(Problem(f"--gpus: {count} a node", "1 to 64", f"write --gpus 8x{device.name}"))
    return count, device, constants, software


def _rows(tokens: float, sequence_length: int, devices: int, *, is_exact: bool) -> int:
    """Rows of a step. A round number of tokens becomes the near number of rows that most layouts divide."""
    rows = tokens / sequence_length
    if is_exact:
        if rows != int(rows):
            below, above = int(rows) * sequence_length, (int(rows) + 1) * sequence_length
            allowed = f"a multiple of the {sequence_length} tokens of a row: {below} or {above}"
            raise ConfigError(
                Problem(
                    f"--global-batch is {tokens:.0f} tokens",
                    allowed,
                    f"write --global-batch {above if rows % 1 > 0.5 or not below else below}",
                )
            )
        return int(rows)
    low, high = math.ceil(rows * (1 - BATCH_TOLERANCE)), math.floor(rows * (1 + BATCH_TOLERANCE))
    choices = range(max(1, low), max(1, high) + 1)
    odd = devices // (devices & -devices)  # of whose ranks no tensor or pipeline size takes any away
    return max(choices, key=lambda count: (count % odd == 0, math.gcd(count, devices * 64), -abs(count - rows)))
