"""The layouts whose numbers are compared with the plain engine's: one cell a layout, model and precision.

Every pair of features that the compatibility table supports needs a cell that uses both (test_parity.py asks for it).
The default run takes the cells that show something for the first time, `tests/run.sh --slow` all. How a cell is
compared is parity.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tests.pretrain.engines.cases import LARGE_TABLES, VOCABULARY, Case
from tests.pretrain.engines.cell import Cell


def _zero_cells() -> list[Cell]:
    cells = [
        Cell(ranks, Case(engine="zero", zero_stage=stage, precision=precision, micro_batch_size=8 // ranks // parts))
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        for ranks in (2, 1)
        for parts in (2, 1)
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
        for precision, ranks, accumulation in (("fp32", 2, 2), ("fp32", 2, 1), ("fp32", 1, 2), ("bf16", 2, 2))
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


def _recomputation_cells() -> list[Cell]:
    compiled = Case(compile=True, precision="bf16", micro_batch_size=4)
    both = Case(engine="plain", recomputation="selective", recompute_every=2, layers=3, micro_batch_size=2)
    return [
        Cell(1, both),
        Cell(2, replace(compiled, engine="zero", zero_stage=3), slow=True),
        Cell(2, replace(compiled, engine="accelerate", data_parallel="shard"), slow=True),
        *(
            Cell(
                ranks,
                Case(
                    **engine,
                    recomputation=kind,
                    recompute_every=every,
                    layers=3,
                    precision=precision,
                    micro_batch_size=2,
                ),
            )
            for kind, every, precision in (("selective", 1, "bf16"), ("full", 2, "fp32"))
            for ranks, engine in (
                (1, {"engine": "plain"}),
                *((2, {"engine": "zero", "zero_stage": stage}) for stage in (0, 1, 2, 3)),
                *((2, {"engine": "accelerate", "data_parallel": way}) for way in ("replicate", "shard")),
            )
        ),
    ]


def _pipeline_cells() -> list[Cell]:
    one_way = Case(pipeline=2, micro_batch_size=2)
    both_ways = Case(pipeline=2, pipeline_schedule="dualpipev", micro_batch_size=2, layers=4)
    cells = [
        Cell(2, one_way),
        Cell(2, replace(one_way, tied=True, micro_batch_size=8)),  # fewer micro-batches than stages
        Cell(2, replace(one_way, tied=True, precision="bf16", micro_batch_size=1)),
        Cell(2, replace(one_way, precision="bf16", layers=3)),
        Cell(2, replace(one_way, zero_stage=0, tied=True)),
        Cell(2, replace(one_way, small_steps=2)),
        Cell(2, replace(one_way, model_type="qwen3", tied=True)),
        Cell(2, replace(one_way, model_type="qwen2")),  # biases
        Cell(2, replace(one_way, model_type="mistral", model=(("sliding_window", 10),))),
        Cell(2, replace(one_way, model_type="olmo2")),
        Cell(2, replace(one_way, model_type="gpt2", tied=True)),
        Cell(2, replace(one_way, recomputation="full")),
        Cell(2, replace(one_way, recomputation="full", recompute_every=2, layers=5, tied=True)),
        Cell(2, replace(one_way, recomputation="selective", layers=3)),
        Cell(2, both_ways),
        Cell(2, replace(both_ways, tied=True, precision="bf16", micro_batch_size=1)),
        Cell(2, replace(both_ways, zero_stage=0, layers=5)),
        Cell(2, replace(both_ways, tied=True, recomputation="full", recompute_every=2, layers=6, micro_batch_size=1)),
        Cell(2, replace(both_ways, model_type="gpt2", recomputation="selective")),
        Cell(4, replace(one_way, tied=True)),  # two data ranks
        Cell(4, replace(one_way, tensor=2, model_type="qwen3", tied=True)),
        Cell(4, replace(one_way, tensor=2, zero_stage=0, model_type="qwen2", recomputation="selective")),
        Cell(4, replace(both_ways, tensor=2, tied=True, recomputation="full", recompute_every=2)),
    ]
    more_ranks = [
        Cell(4, replace(one_way, zero_stage=0, precision="fp32", micro_batch_size=1)),
        Cell(4, replace(one_way, precision="bf16")),
        Cell(4, replace(one_way, tensor=2, model_type="olmo2")),
        Cell(4, replace(one_way, tensor=2, tied=True, precision="bf16")),
        Cell(4, replace(one_way, tensor=2, model_type="mistral", model=(("sliding_window", 10),))),
        Cell(4, replace(one_way, pipeline=4, layers=4, tied=True)),
        Cell(4, replace(one_way, pipeline=4, layers=6, micro_batch_size=1, recomputation="full")),
        Cell(4, replace(both_ways, micro_batch_size=1, tied=True)),  # two data ranks
        Cell(4, replace(both_ways, pipeline=4, micro_batch_size=1, layers=9)),
        Cell(8, replace(one_way, tensor=2, tied=True)),  # two data ranks
        Cell(8, replace(one_way, tensor=2, zero_stage=0, model_type="qwen3", tied=True)),
    ]
    return [*cells, *(replace(cell, slow=True) for cell in more_ranks)]


MIXTRAL = Case(
    engine="zero",
    model_type="mixtral",
    model=(("num_local_experts", 4), ("num_experts_per_tok", 2), ("router_aux_loss_coef", 0.1)),
    micro_batch_size=2,
)
QWEN_MOE = Case(
    engine="zero",
    model_type="qwen3_moe",
    model=(
        *(("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 32)),
        *(("head_dim", 16), ("router_aux_loss_coef", 0.1)),
    ),
    micro_batch_size=2,
)


def _sparse_cells() -> list[Cell]:
    """Mixtures of experts, of which every rank holds all."""
    return [
        Cell(2, MIXTRAL),
        Cell(2, replace(MIXTRAL, zero_stage=3, precision="bf16")),
        Cell(2, replace(QWEN_MOE, zero_stage=2)),
        Cell(2, replace(QWEN_MOE, zero_stage=3, recomputation="selective")),
        Cell(2, replace(MIXTRAL, engine="accelerate")),
        Cell(2, replace(QWEN_MOE, engine="accelerate", data_parallel="shard", recomputation="full")),
    ]


def _expert_cells() -> list[Cell]:
    """Data ranks that share experts; on four ranks two hold the same, or none."""
    mixtral, qwen = replace(MIXTRAL, expert=2), replace(QWEN_MOE, expert=2)
    cells = [
        Cell(2, replace(case, zero_stage=stage, precision=precision))
        for case, stage, precision in (
            (qwen, 0, "fp32"),
            (mixtral, 1, "fp32"),
            (qwen, 1, "bf16"),
            (qwen, 2, "fp32"),
            (mixtral, 2, "bf16"),
            (mixtral, 3, "fp32"),
            (qwen, 3, "bf16"),
        )
    ]
    cells += [
        Cell(2, replace(mixtral, zero_stage=2, small_steps=2, micro_batch_size=1)),
        Cell(2, replace(qwen, recomputation="full", recompute_every=2, layers=3)),
        Cell(2, replace(mixtral, zero_stage=3, recomputation="selective")),
        Cell(2, replace(mixtral, zero_stage=2, precision="bf16", offload_optimizer="cpu")),
        Cell(2, replace(qwen, zero_stage=3, offload_parameters="cpu", offload_optimizer="cpu")),
        Cell(4, replace(mixtral, precision="bf16", micro_batch_size=1)),
        Cell(4, replace(qwen, zero_stage=3, micro_batch_size=1)),
        Cell(4, replace(mixtral, zero_stage=2, expert=4)),
    ]
    more_ranks = [
        Cell(4, replace(case, zero_stage=stage, expert=expert, precision=precision, micro_batch_size=1))
        for case, stage, expert, precision in (
            (mixtral, 0, 2, "bf16"),
            (qwen, 1, 2, "fp32"),
            (qwen, 2, 2, "fp32"),
            (mixtral, 3, 2, "bf16"),
            (mixtral, 1, 4, "fp32"),
            (qwen, 2, 4, "bf16"),
            (qwen, 3, 4, "fp32"),
            (mixtral, 3, 4, "bf16"),
        )
    ]
    return [*cells, *(replace(cell, slow=True) for cell in more_ranks)]


def _sequence_cells() -> list[Cell]:
    cells = [
        Cell(2, Case(sequence=2, zero_stage=stage, precision=precision, layers=3))
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
    ]
    cells += [
        Cell(2, Case(sequence=2, zero_stage=2, model_type="mistral", model=(("sliding_window", 12),))),
        Cell(2, Case(sequence=2, zero_stage=3, model_type="qwen3", tied=True)),
        Cell(2, Case(sequence=2, zero_stage=1, model_type="qwen2", tied=True)),
        Cell(2, Case(sequence=2, zero_stage=1, model_type="olmo2", small_steps=2)),
        Cell(2, Case(sequence=2, zero_stage=3, recomputation="selective")),
        Cell(2, Case(sequence=2, zero_stage=1, recomputation="full", recompute_every=2, layers=3)),
    ]
    cells += [
        # with seed 3, Adam makes 1e-5 of the rounding of qwen3's near-zero gradients at stage 3; with 4 it stays small
        Cell(4, Case(sequence=2, zero_stage=stage, micro_batch_size=2, model_type=family, seed=4), slow=stage != 2)
        for stage, family in ((1, "llama"), (2, "mistral"), (3, "qwen3"))
    ]
    # more ranks than heads of keys and values, which are then repeated
    cells += [
        Cell(4, Case(sequence=4, zero_stage=stage, precision=precision), slow=stage != 3)
        for stage, precision in ((1, "bf16"), (3, "fp32"))
    ]
    return cells


def _tensor_cells() -> list[Cell]:
    usual = Case(engine="zero", tensor=2)
    cells = [
        Cell(2, replace(usual, zero_stage=stage, precision=precision))
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ]
    window = (("sliding_window", 10),)
    uneven = (("vocab_size", VOCABULARY + 1), ("intermediate_size", 131))  # ranks hold different numbers of rows
    cells += [
        Cell(2, replace(usual, zero_stage=stage, tied=tied, model_type=family, model=model, micro_batch_size=8))
        for stage, tied, family, model in (
            (0, True, "llama", uneven),
            (1, True, "qwen2", ()),
            (1, False, "mistral", window),
            (1, True, "olmo2", ()),
            (2, True, "qwen3", ()),
            (3, False, "qwen2", ()),
            (3, False, "llama", uneven),
            (3, True, "qwen3", ()),
            (3, False, "olmo2", ()),
        )
    ]
    cells += [
        Cell(2, replace(usual, recomputation="full", recompute_every=2, layers=3)),
        Cell(2, replace(usual, recomputation="selective", zero_stage=3)),
    ]
    # two data ranks, or heads that four ranks share
    four_heads = (("num_key_value_heads", 4), *uneven)
    two_by_two = replace(usual, micro_batch_size=2, small_steps=2)
    cells += [Cell(4, replace(two_by_two, zero_stage=stage), slow=stage in (0, 2)) for stage in (0, 1, 2, 3)]
    cells += [
        Cell(4, replace(two_by_two, zero_stage=stage, precision="bf16", model_type="qwen3", tied=True), slow=True)
        for stage in (0, 1, 2, 3)
    ]
    cells += [
        Cell(4, replace(usual, tensor=4, zero_stage=stage, model=four_heads), slow=stage == 1) for stage in (1, 3)
    ]
    cells += [
        Cell(8, replace(usual, micro_batch_size=1, zero_stage=stage, small_steps=2), slow=True)
        for stage in (0, 1, 2, 3)
    ]
    cells += [Cell(8, replace(usual, tensor=4, model=four_heads, zero_stage=stage), slow=True) for stage in (1, 3)]
    return cells


def _offload_cells() -> list[Cell]:
    optimizer = Case(engine="zero", offload_optimizer="cpu")
    parameters = Case(engine="zero", zero_stage=3, offload_parameters="cpu")
    both = replace(parameters, offload_optimizer="cpu")
    disk = Case(engine="zero", zero_stage=3, offload_optimizer="nvme", model=LARGE_TABLES)
    return [
        Cell(2, disk),
        Cell(2, replace(disk, precision="bf16", tied=True, micro_batch_size=2), slow=True),
        Cell(2, replace(disk, tensor=2, recomputation="selective", model=(("vocab_size", 18_000),))),
        Cell(2, replace(disk, sequence=2, recomputation="full", recompute_every=2, layers=3)),
        Cell(2, replace(disk, offload_parameters="cpu")),
        Cell(1, replace(disk, micro_batch_size=8)),
        *(
            Cell(2, replace(optimizer, zero_stage=stage, precision=precision))
            for stage, precision in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"))
        ),
        Cell(2, replace(parameters, micro_batch_size=2)),
        Cell(2, replace(both, precision="bf16", tied=True, model_type="qwen3")),
        Cell(1, replace(optimizer, zero_stage=2)),
        Cell(2, replace(optimizer, tensor=2, zero_stage=2)),
        Cell(2, replace(both, tensor=2, precision="bf16")),
        Cell(2, replace(both, sequence=2)),
        Cell(2, replace(optimizer, sequence=2, recomputation="selective")),
        Cell(2, replace(both, recomputation="selective")),
        Cell(2, replace(both, recomputation="full", recompute_every=2, layers=3)),
        Cell(4, replace(both, tensor=2, micro_batch_size=2), slow=True),
    ]


LARGE = 50_000  # so many times fewer parameters have these cases than 7 billion
LARGE_ENOUGH_FOR_FILES = 400  # DeepSpeed puts no group of less than a MiB on a disk


def _file_cells() -> list[Cell]:
    """Every shipped DeepSpeed file as it is, and with buckets as full as a model of 7 billion parameters fills them."""
    zero = Case(engine="zero")
    away = replace(zero, ds_config="offload-cpu.json", offload_optimizer="cpu")
    disk = Case(zero_stage=3, ds_config="offload-nvme.json", offload_optimizer="nvme", model=LARGE_TABLES)
    large_away = replace(away, sizes_divided_by=LARGE, micro_batch_size=2)
    long_rows = Case(sequence=2, zero_stage=3, recomputation="full", ds_config="long-sequence.json")
    piped = Case(pipeline=2, micro_batch_size=2, ds_config="pipeline.json")
    copies = replace(zero, zero_stage=3, ds_config="zeropp.json", micro_batch_size=1)
    by_stage = [replace(zero, zero_stage=stage, ds_config=f"zero{stage}.json") for stage in (0, 1, 2, 3)]
    cells = [Cell(2, case) for case in by_stage]
    cells += [
        Cell(2, replace(case, sizes_divided_by=LARGE, micro_batch_size=2, small_steps=2)) for case in by_stage[1:]
    ]
    cells += [Cell(2, replace(away, zero_stage=stage)) for stage in (1, 2)]
    cells += [
        Cell(2, replace(away, zero_stage=3, offload_parameters="cpu")),
        Cell(2, replace(large_away, zero_stage=2)),
        Cell(2, replace(large_away, zero_stage=3, offload_parameters="cpu")),
        Cell(2, replace(disk, sizes_divided_by=LARGE_ENOUGH_FOR_FILES, micro_batch_size=2)),
        Cell(2, long_rows),
        Cell(2, replace(long_rows, sizes_divided_by=LARGE)),
        Cell(2, piped),
        Cell(2, replace(piped, sizes_divided_by=LARGE, tied=True)),
        *(Cell(8, replace(copies, sizes_divided_by=divisor), slow=True, fresh=True) for divisor in (1, LARGE)),
    ]
    more = [
        *(replace(case, sizes_divided_by=LARGE, precision="bf16", micro_batch_size=2) for case in by_stage[1:]),
        replace(large_away, zero_stage=2, precision="bf16"),
    ]
    return [*cells, *(Cell(2, case, slow=True) for case in more)]


def _repeats_slow(cells: Iterable[Cell]) -> Iterator[Cell]:
    """The same cells, slow where everything that one shows was shown by a quick one before it."""
    shown: set[object] = set()
    for cell in cells:
        is_slow = cell.slow or shown.issuperset(cell.aspects)
        shown |= set() if is_slow else cell.aspects
        yield replace(cell, slow=is_slow)


_ALL = (
    Cell(1, Case(engine="plain", micro_batch_size=2)),
    *_zero_cells(),
    *_pipeline_cells(),
    *_accelerate_cells(),
    *_recomputation_cells(),
    *_sequence_cells(),
    *_sparse_cells(),
    *_expert_cells(),
    *_tensor_cells(),
    *_offload_cells(),
    *_file_cells(),
)
CELLS: tuple[Cell, ...] = tuple(_repeats_slow(_ALL))
