"""The layouts whose numbers are compared with the plain engine's: one cell a layout, model and precision.

Every pair of features that the compatibility table supports needs a cell that uses both (test_parity.py asks for it).
How a cell is compared is parity.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from tests.pretrain.engines.cases import VOCABULARY, Case


@dataclass(frozen=True)
class Cell:
    """A case on so many ranks."""

    ranks: int
    case: Case
    slow: bool = False  # repeats on more ranks what a quicker cell shows: run with `tests/run.sh --slow`
    fresh: bool = False  # needs processes of its own, because the engine leaves traces in them

    def __str__(self) -> str:
        """What differs from the usual case, and the ranks."""
        usual = Case()
        different = [
            f"{field.name}={value}" if not isinstance(value, bool) else field.name
            for field in fields(Case)
            if (value := getattr(self.case, field.name)) != getattr(usual, field.name)
        ]
        return " ".join([*different, f"x{self.ranks}"])


def _zero_cells() -> list[Cell]:
    cells = [
        Cell(ranks, Case(engine="zero", zero_stage=stage, precision=precision, micro_batch_size=8 // ranks // parts))
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        for ranks in (1, 2)
        for parts in (1, 2)
    ]
    cells += [
        Cell(2, Case(engine="zero", zero_stage=stage, model_type=family, tied=True, micro_batch_size=2))
        for stage in (1, 3)
        for family in ("qwen3", "gpt2", "llama")
    ]
    cells += [
        Cell(2, Case(engine="zero", zero_stage=stage, micro_batch_size=2, small_steps=2)) for stage in (0, 1, 2, 3)
    ]
    cells += [Cell(4, Case(engine="zero", zero_stage=stage, micro_batch_size=1), slow=True) for stage in (0, 1, 2, 3)]
    return cells


def _accelerate_cells() -> list[Cell]:
    cells = [
        Cell(
            ranks,
            Case(
                engine="accelerate", data_parallel=way, precision=precision, micro_batch_size=8 // ranks // accumulation
            ),
        )
        for way in ("replicate", "shard")
        for precision, ranks, accumulation in (("fp32", 1, 2), ("fp32", 2, 1), ("fp32", 2, 2), ("bf16", 2, 2))
    ]
    tied = {"engine": "accelerate", "tied": True, "micro_batch_size": 2}
    cells += [
        Cell(2, Case(**tied, model_type="qwen3", small_steps=2)),
        Cell(2, Case(**tied, data_parallel="shard", precision="bf16", model_type="qwen3", small_steps=2)),
        # rows that the ranks do not divide
        Cell(2, Case(**tied, data_parallel="shard", model_type="gpt2", model=(("vocab_size", VOCABULARY + 1),))),
    ]
    uneven = (("intermediate_size", 130),)
    cells += [
        Cell(4, Case(engine="accelerate", data_parallel=way, model=uneven, micro_batch_size=1), slow=True)
        for way in ("replicate", "shard")
    ]
    return cells


CELLS: tuple[Cell, ...] = (
    Cell(1, Case(engine="plain", micro_batch_size=2)),
    *_zero_cells(),
    *_accelerate_cells(),
)
