"""State that one layout saves goes on in another: the next losses are those of the run that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.checkpoint.store import CheckpointStore
from tests.distributed.ranks import RankPool, run_on_ranks
from tests.pretrain.engines.cases import (
    DS_CONFIGS,
    LARGE_TABLES,
    Case,
    Outcome,
    skip_without_async_io,
    start_engine,
    take_steps,
)
from tests.pretrain.engines.matrix import LARGE, LARGE_ENOUGH_FOR_FILES, MIXTRAL

pytestmark = pytest.mark.ranks

Pool = Callable[[int], RankPool]
SAVED_AFTER = 3
LATER = 3
LAYOUTS = {
    "plain": (1, Case(engine="plain")),
    "zero 0 x 2": (2, Case(engine="zero", zero_stage=0)),
    "zero 1 x 1": (1, Case(engine="zero", zero_stage=1)),
    "zero 1 x 2": (2, Case(engine="zero", zero_stage=1)),
    "zero 2 x 2": (2, Case(engine="zero", zero_stage=2)),
    "zero 3 x 1": (1, Case(engine="zero", zero_stage=3)),
    "zero 3 x 2": (2, Case(engine="zero", zero_stage=3)),
    "tensor 2": (2, Case(engine="zero", tensor=2)),
    "zero 0 x tensor 2": (2, Case(engine="zero", zero_stage=0, tensor=2)),
    "zero 3 x tensor 2": (2, Case(engine="zero", zero_stage=3, tensor=2)),
    "zero 3 x 2 x tensor 2": (4, Case(engine="zero", zero_stage=3, tensor=2, micro_batch_size=2)),
    "zero 1 x 4": (4, Case(engine="zero", zero_stage=1, micro_batch_size=2)),
    "zero 2 offloaded x 2": (2, Case(engine="zero", zero_stage=2, offload_optimizer="cpu")),
    "zero 3 offloaded x 2": (
        2,
        Case(engine="zero", zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
    ),
    "plain, large tables": (1, Case(engine="plain", model=LARGE_TABLES)),
    "ddp x 2": (2, Case(engine="accelerate")),
    "fsdp x 1": (1, Case(engine="accelerate", data_parallel="shard")),
    "fsdp x 2": (2, Case(engine="accelerate", data_parallel="shard")),
    "sequence x 2": (2, Case(sequence=2, zero_stage=1)),
    "sequence zero 3 x 2": (2, Case(sequence=2, zero_stage=3)),
    "stages 2": (2, Case(pipeline=2)),
    "stages 2, zero 0": (2, Case(pipeline=2, zero_stage=0)),
    "stages 2 x tensor 2": (4, Case(pipeline=2, tensor=2)),
    "stages 2, tied": (2, Case(pipeline=2, tied=True, micro_batch_size=2, layers=4)),
    "both ways, tied": (2, Case(pipeline=2, pipeline_schedule="dualpipev", tied=True, micro_batch_size=2, layers=4)),
    "experts 2": (2, replace(MIXTRAL, expert=2)),
    "zero 3, experts 2 x 2": (4, replace(MIXTRAL, expert=2, zero_stage=3)),
    "zero 1, all experts x 2": (2, MIXTRAL),
    "plain, all experts": (1, replace(MIXTRAL, engine="plain")),
    # with the sizes of a file divided, so that several buckets and groups hold the state
    **{
        file: (2, replace(case, ds_config=file, sizes_divided_by=LARGE))
        for file, case in {
            "zero0.json": Case(engine="zero", zero_stage=0),
            "zero1.json": Case(engine="zero", zero_stage=1),
            "zero2.json": Case(engine="zero", zero_stage=2),
            "zero3.json": Case(engine="zero", zero_stage=3),
            "offload-cpu.json": Case(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
            "long-sequence.json": Case(sequence=2, zero_stage=3),
            "pipeline.json": Case(pipeline=2),
        }.items()
    },
    "offload-nvme.json": (
        2,
        Case(
            zero_stage=3,
            offload_optimizer="nvme",
            model=LARGE_TABLES,
            ds_config="offload-nvme.json",
            sizes_divided_by=LARGE_ENOUGH_FOR_FILES,
        ),
    ),
    "plain, tied": (1, Case(engine="plain", tied=True, micro_batch_size=2, layers=4)),
}
CHANGES = [
    ("plain", "stages 2"),
    ("stages 2, zero 0", "stages 2 x tensor 2"),
    ("stages 2 x tensor 2", "tensor 2"),
    ("stages 2, tied", "plain, tied"),
    ("plain, tied", "both ways, tied"),
    ("zero 0 x 2", "zero 1 x 2"),
    ("zero 1 x 2", "zero 3 x 2"),
    ("zero 3 x 2", "zero 2 x 2"),
    ("tensor 2", "zero 3 offloaded x 2"),
    ("plain, large tables", "offload-nvme.json"),
    ("offload-nvme.json", "plain, large tables"),
    ("zero 1 x 4", "plain"),
    ("zero 0 x tensor 2", "fsdp x 2"),
    ("fsdp x 2", "zero 3 x tensor 2"),
    ("fsdp x 1", "ddp x 2"),
    ("zero 3 x 2", "sequence x 2"),
    ("sequence x 2", "sequence zero 3 x 2"),
    ("experts 2", "zero 1, all experts x 2"),
    ("zero 1, all experts x 2", "zero 3, experts 2 x 2"),
    # every shipped DeepSpeed file on each side
    ("zero1.json", "zero2.json"),
    ("zero2.json", "zero3.json"),
    ("zero3.json", "offload-cpu.json"),
    ("offload-cpu.json", "long-sequence.json"),
    ("long-sequence.json", "pipeline.json"),
    ("pipeline.json", "zero0.json"),
    ("zero0.json", "zero1.json"),
]
MORE_CHANGES = [  # in slow runs: each layout on each side, and the other way round
    ("stages 2", "plain"),
    ("zero 1 x 2", "stages 2, zero 0"),
    ("both ways, tied", "stages 2, tied"),
    ("plain", "zero 3 x 2"),
    ("zero 1 x 2", "plain"),
    ("zero 2 x 2", "zero 1 x 1"),
    ("zero 3 x 2", "zero 3 x 1"),
    ("zero 3 x 1", "zero 0 x 2"),
    ("plain", "zero 2 offloaded x 2"),
    ("zero 2 offloaded x 2", "zero 3 x 2"),
    ("zero 3 offloaded x 2", "zero 1 x 2"),
    ("plain", "zero 1 x 4"),
    ("plain", "tensor 2"),
    ("tensor 2", "plain"),
    ("tensor 2", "zero 3 x tensor 2"),
    ("zero 3 x tensor 2", "zero 1 x 2"),
    ("zero 3 x 2", "zero 0 x tensor 2"),
    ("zero 3 x 2 x tensor 2", "tensor 2"),
    ("zero 1 x 4", "zero 3 x 2 x tensor 2"),
    ("ddp x 2", "fsdp x 2"),
    ("fsdp x 2", "fsdp x 1"),
    ("fsdp x 2", "zero 1 x 2"),
    ("zero 3 x 2", "fsdp x 2"),
    ("sequence x 2", "plain"),
    ("experts 2", "plain, all experts"),
    ("plain, all experts", "experts 2"),
    ("zero 3, experts 2 x 2", "experts 2"),
]
# Layouts and precisions whose state differs in kind; the others repeat them, in slow runs.
QUICK_LAYOUTS = [
    *(
        (layout, "fp32")
        for layout in (
            *("plain", "zero 0 x 2", "zero 1 x 2", "zero 3 x 2", "zero 3 x tensor 2", "zero 2 offloaded x 2"),
            *("zero 3 offloaded x 2", "ddp x 2", "fsdp x 2", "sequence zero 3 x 2", "stages 2 x tensor 2"),
            "offload-nvme.json",
            "zero 3, experts 2 x 2",
        )
    ),
    *((layout, "bf16") for layout in ("zero 0 x 2", "zero 1 x 2", "zero 3 x 2", "fsdp x 2", "both ways, tied")),
    *((layout, "fp16") for layout in ("zero 1 x 2", "zero 3 x 2")),
]


def test_every_shipped_deepspeed_file_is_resumed_from_and_with() -> None:
    shipped = {file.name for file in DS_CONFIGS.glob("*.json")}
    # see test_parity.py, and the test of zeropp.json below
    assert shipped - {"zeropp.json"} == {file for file in LAYOUTS if file.endswith(".json")}
    for side in zip(*CHANGES, strict=True):
        assert shipped - {"zeropp.json"} <= set(side)


def save_and_go_on(case: Case, folder: str) -> Outcome:
    """Some steps, a save, and the steps that a resumed run must repeat."""
    engine = start_engine(case)
    try:
        take_steps(engine, case, 0, SAVED_AFTER)
        CheckpointStore(Path(folder)).save(
            SAVED_AFTER,
            engine.fragments(),
            scalars=engine.scalar_state(),
            progress={},
            metadata={"parameters": engine.parameter_shapes()},
        )
        return take_steps(engine, case, SAVED_AFTER, LATER)
    finally:
        engine.close()


def resume(case: Case, folder: str) -> Outcome:
    """A new engine, from other weights, that reads the newest checkpoint."""
    engine = start_engine(replace(case, seed=99))
    try:
        checkpoint = CheckpointStore(Path(folder)).newest_valid()
        assert checkpoint is not None
        checkpoint.require_model(engine.parameter_shapes())
        engine.restore(checkpoint)
        return take_steps(engine, case, SAVED_AFTER, LATER)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("saved", "resumed"), [*CHANGES, *(pytest.param(*change, marks=pytest.mark.slow) for change in MORE_CHANGES)]
)
def test_another_layout_goes_on(rank_pool: Pool, tmp_path: Path, saved: str, resumed: str) -> None:
    (ranks, case), (other_ranks, other) = LAYOUTS[saved], LAYOUTS[resumed]
    skip_without_async_io(case, other)
    expected = rank_pool(ranks).run(save_and_go_on, case, str(tmp_path))[0]
    for outcome in rank_pool(other_ranks).run(resume, other, str(tmp_path)):
        assert outcome.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
        assert outcome.scalars == expected.scalars


@pytest.mark.slow
@pytest.mark.parametrize("divisor", [1, LARGE], ids=["small weights stay gathered", "all are shared"])
def test_a_second_copy_within_the_node_goes_on_elsewhere(rank_pool: Pool, tmp_path: Path, divisor: int) -> None:
    """Its groups of ranks are DeepSpeed's module state, so its processes serve nothing else."""
    case = Case(engine="zero", zero_stage=3, ds_config="zeropp.json", sizes_divided_by=divisor, micro_batch_size=1)
    expected = run_on_ranks(8, save_and_go_on, case, str(tmp_path), deadline_seconds=240)[0]
    elsewhere = rank_pool(1).run(resume, Case(engine="plain", micro_batch_size=1), str(tmp_path))
    again = run_on_ranks(8, resume, case, str(tmp_path), deadline_seconds=240)
    assert elsewhere[0].losses == pytest.approx(expected.losses, rel=1e-5)
    for outcome in again:
        assert outcome.losses == expected.losses
        assert outcome.norms == expected.norms


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        pytest.param(layout, precision, marks=[] if (layout, precision) in QUICK_LAYOUTS else [pytest.mark.slow])
        for layout in LAYOUTS
        for precision in ("fp32", "bf16", "fp16")
    ],
)
def test_the_same_layout_is_equal_to_the_bit(rank_pool: Pool, tmp_path: Path, layout: str, precision: str) -> None:
    ranks, case = LAYOUTS[layout]
    case = replace(case, precision=precision)
    skip_without_async_io(case)
    if precision == "fp16" and (case.engine != "zero" or case.zero_stage == 0 or case.offload_optimizer != "none"):
        pytest.skip("fp16 is refused there, see pretrain/compatibility.py")
    if precision == "bf16" and case.zero_stage == 0 and case.pipeline > 1:
        pytest.skip("refused, see pretrain/models/pipeline_stages.py")
    expected = rank_pool(ranks).run(save_and_go_on, case, str(tmp_path))
    for before, after in zip(expected, rank_pool(ranks).run(resume, case, str(tmp_path)), strict=True):
        assert after.losses == before.losses
        assert after.norms == before.norms
        assert after.evaluation == before.evaluation
        assert after.scalars == before.scalars
        for one, other in zip(before.fragments, after.fragments, strict=True):
            assert one[:5] == other[:5]
            assert (one[5] == other[5]).all(), f"{one[0]} {one[1]}"
