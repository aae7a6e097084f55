"""The table of presets and the hardware that each needs, from the same arithmetic as `pretrain check`.

For the terminal and, as Markdown, for the README. Owns the question that is asked of every preset, not the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pretrain.config import ModelSection
from pretrain.models.architecture import Architecture, resolve_architecture
from pretrain.models.flops import count_flops
from pretrain.models.memory import Layout, Step, estimate_memory
from pretrain.models.parameter_count import ParameterCount, count_parameters
from pretrain.models.presets import PRESETS

GIB = 2**30
LONGEST_ROW = 4096  # tokens; presets with fewer positions use all of theirs
RESERVED_GIB = 4  # of a device: framework, work space and fragmentation
LARGEST_JOB = 1024  # ranks
_CASES = ((80, 1), (80, 3), (40, 1), (40, 3))  # GB of a device, ZeRO stage

QUESTION = (
    "Fewest GPUs that hold a bf16 training step of one row a rank, with full recomputation: every rank with the whole "
    "model and gradients (ZeRO 1, Z1), and everything sharded (ZeRO 3, Z3); - where that never fits. Alone: GiB of one "
    "process of the plain engine. Estimates; more ranks leave room for larger micro-batches without recomputation."
)


@dataclass(frozen=True, kw_only=True)
class PresetRow:
    """What one preset needs."""

    name: str
    source: str
    parameters: int
    sequence_length: int  # tokens
    training_flops: int  # per token
    one_device_gib: float  # one process of the plain engine
    fewest: dict[tuple[int, int], int | None]  # (GiB of a device, ZeRO stage) -> ranks; None: never fits


def preset_rows() -> Iterator[PresetRow]:
    """Every preset, in the order of presets.py."""
    for name, preset in PRESETS.items():
        section = ModelSection(preset=name)
        length = min(LONGEST_ROW, resolve_architecture(section, 1).positions)
        shape = resolve_architecture(section, length)
        count = count_parameters(shape)
        plain = Layout(engine="plain", zero_stage=0)
        yield PresetRow(
            name=name,
            source=preset.source,
            parameters=count.total,
            sequence_length=length,
            training_flops=count_flops(shape, count, length).training,
            one_device_gib=_bytes(shape, count, plain, length) / GIB,
            fewest={(device, stage): _fewest_ranks(shape, count, length, device, stage) for device, stage in _CASES},
        )


def print_presets(*, markdown: bool) -> None:
    """Print the table; the terminal's leaves the sources out."""
    rows = list(preset_rows())
    console = Console(soft_wrap=markdown, highlight=False)
    if markdown:
        console.print("\n".join(_markdown_lines(rows)), markup=False)
        return
    table = Table(box=None, caption=f"{QUESTION} GFLOP: of training, per token.", caption_justify="left")
    for place, name in enumerate(["preset", "size", "row", "GFLOP", "alone", *(_short(case) for case in _CASES)]):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        size = f"{row.parameters / 1e9:.1f}B" if row.parameters >= 1e9 else f"{row.parameters / 1e6:.0f}M"
        table.add_row(row.name, size, *_numbers(row))
    console.print(table)


def _markdown_lines(rows: Iterable[PresetRow]) -> Iterator[str]:
    head = ["preset", "parameters", "row (tokens)", "training GFLOP a token", "alone (GiB)"]
    yield _line([*head, *(f"{device} GB, ZeRO {stage}" for device, stage in _CASES), "source"])
    yield _line(["---", *["---:"] * (len(head) - 1 + len(_CASES)), "---"])
    for row in rows:
        yield _line([row.name, f"{row.parameters:,}", *_numbers(row), row.source])
    yield f"\n{QUESTION}"


def _numbers(row: PresetRow) -> list[str]:
    fewest = ("-" if row.fewest[case] is None else str(row.fewest[case]) for case in _CASES)
    return [f"{row.sequence_length:,}", f"{row.training_flops / 1e9:,.1f}", f"{row.one_device_gib:,.1f}", *fewest]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(case: tuple[int, int]) -> str:
    return f"{case[0]}GB Z{case[1]}"


def _fewest_ranks(shape: Architecture, count: ParameterCount, length: int, device_gib: int, stage: int) -> int | None:
    """The smallest power of two of ranks on which one rank's bytes fit."""
    ranks = 1
    while ranks <= LARGEST_JOB:
        layout = Layout(engine="zero", zero_stage=stage, data=ranks)
        if _bytes(shape, count, layout, length) <= (device_gib - RESERVED_GIB) * GIB:
            return ranks
        ranks *= 2
    return None


def _bytes(shape: Architecture, count: ParameterCount, layout: Layout, length: int) -> int:
    step = Step(precision="bf16", micro_batch_size=1, sequence_length=length, recomputes=True, chunk_tokens=1024)
    return estimate_memory(shape, count, layout, step).total
