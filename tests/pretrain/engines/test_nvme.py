"""Offload to NVMe beyond parity (matrix.py): real files, checkpoints through them, what is left, what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.compatibility import find_conflicts
from pretrain.config import RunConfig
from pretrain.engines import offload_folder
from pretrain.engines.offload_folder import OffloadFolder, require_async_io
from pretrain.errors import ConfigError
from pretrain.models.memory import SMALLEST_FILE
from pretrain.run_plan import plan_run
from tests.pretrain.engines.cases import (
    LARGE_TABLES,
    WITHOUT_ASYNC_IO,
    Case,
    has_async_io,
    start_engine,
    step_batches,
    train_case,
)
from tests.pretrain.engines.parity import TOLERANCES, Pool, plain, state_differences

NEEDS_ASYNC_IO = pytest.mark.skipif(not has_async_io(), reason=WITHOUT_ASYNC_IO)
CASE = Case(engine="zero", zero_stage=3, offload_optimizer="nvme", model=LARGE_TABLES)


def bytes_in_files(case: Case) -> tuple[dict[str, int], int, list[str]]:
    """Sizes of this rank's files after a step, elements that it keeps in memory, and what lies there after the end."""
    engine: Any = start_engine(case)
    try:
        engine.train_step(step_batches(case, 0), 0)
        files = {path.name: path.stat().st_size for path in engine._disk.path.rglob("*.swp")}
        held = sum(tensor.numel() for tensor in engine._state._updated_tensors())
    finally:
        engine.close()
    return files, held, [str(path) for path in engine._disk.path.parent.glob(f"{engine._disk.path.name}*")]


@NEEDS_ASYNC_IO
@pytest.mark.ranks
def test_state_lies_in_files_between_steps_and_is_gone_at_the_end(rank_pool: Pool) -> None:
    whole = plan_run(CASE.config, 2).parameters.total
    for files, held, left in rank_pool(2).run(bytes_in_files, CASE):
        state = sum(size for name, size in files.items() if "gradient" not in name)
        assert state == pytest.approx(3 * 4 * whole / 2, rel=0.02)  # fp32 weights and two moments of a half
        assert 4 * held < SMALLEST_FILE  # what is less than a MiB stays in memory: the last group, of norms
        assert left == []


@NEEDS_ASYNC_IO
@pytest.mark.ranks
def test_a_small_group_stays_in_memory(rank_pool: Pool) -> None:
    for files, held, _ in rank_pool(2).run(bytes_in_files, replace(CASE, tied=True)):
        assert files
        assert held > 0


@NEEDS_ASYNC_IO
@pytest.mark.ranks
def test_a_skipped_step_leaves_the_files_as_they_were(rank_pool: Pool) -> None:
    case = replace(CASE, poisoned_step=2)
    outcomes, reference = rank_pool(2).run(train_case, case), plain(rank_pool, case)
    assert outcomes[0].skipped == outcomes[1].skipped == reference.skipped == [False, False, True, False, False]
    weights, moments = state_differences(outcomes, reference)
    assert weights <= TOLERANCES["fp32"].weights
    assert moments <= TOLERANCES["fp32"].moments


def test_folders_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    script = (
        "import sys, os; from pretrain.engines.offload_folder import OffloadFolder; "
        "folder = OffloadFolder(sys.argv[1]); (folder.path / 'state.swp').write_bytes(b'x'); "
        "print(folder.path, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert Path(killed.stdout.strip(), "state.swp").exists(), killed.stderr
    living = OffloadFolder(tmp_path)
    assert not Path(killed.stdout.strip()).exists()
    second = OffloadFolder(tmp_path)
    assert living.path.is_dir()
    assert second.path != living.path
    second.close()
    living.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_too_small(tmp_path: Path) -> None:
    folder = OffloadFolder(tmp_path)
    folder.require_space(1)
    with pytest.raises(ConfigError, match="GiB free") as raised:
        folder.require_space(2**60)
    assert raised.value.problems[0].change.startswith("set parallel.offload_folder to another disk")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        OffloadFolder(tmp_path / "file" / "below")


@pytest.fixture
def _no_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    offload_folder.import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)


@pytest.mark.usefixtures("_no_libaio")
def test_a_machine_without_libaio_is_told() -> None:
    with pytest.raises(ConfigError, match="libaio") as raised:
        require_async_io()
    assert "libaio-dev" in raised.value.problems[0].change


@pytest.mark.parametrize("stage", [1, 2])
def test_only_stage_3_has_a_way_to_disks(stage: int) -> None:
    [problem] = find_conflicts(replace(CASE, zero_stage=stage).config, 2)
    assert problem.change.startswith("set parallel.zero_stage=3")


def test_parameters_on_nvme_are_refused() -> None:
    values = CASE.config.model_dump()
    values["parallel"] |= {"offload_optimizer": "none", "offload_parameters": "nvme", "offload_folder": "/fast"}
    [problem] = find_conflicts(RunConfig.model_validate(values), 2)
    assert problem.found.startswith("NVMe offload of parameters")


def test_the_plan_tells_disk_from_host() -> None:
    values = CASE.config.model_dump()
    values["model"] = {"preset": "llama-7b"}
    values["batch"] |= {"sequence_length": 4096, "micro_batch_size": 1}
    values["parallel"] |= {"deepspeed_config": str(Path(__file__).parents[3] / "ds_configs/offload-nvme.json")}
    memory = plan_run(RunConfig.model_validate(values), 8).memory
    shard = 6_738_415_616 / 8
    assert memory.disk == pytest.approx(16 * shard, rel=1e-6)
    assert memory.host == pytest.approx(4 * shard + 12 * 4 * 100_000_000, rel=1e-6)
    assert (memory.master_weights, memory.moments, memory.gradients) == (0, 0, 0)
    assert memory.weights == pytest.approx(4 * shard, rel=1e-6)  # fp32
