"""Looking at checkpoints from outside: listing, describing, comparing, selecting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.inspection import (
    describe,
    find_differences,
    find_faults,
    list_run,
    open_verified,
    select_checkpoint,
)
from pretrain.checkpoint.store import CheckpointStore
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import cut_fragments, flip_byte, make_state, save_state


def test_a_run_is_listed_with_pointers_and_damage(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    save_state(checkpoints, 1, make_state(1), is_best=True)
    damaged = save_state(checkpoints, 2, make_state(2))
    save_state(checkpoints, 3, make_state(3))
    flip_byte(damaged / "manifest.json", 5)
    lines = [str(listing) for listing in list_run(tmp_path)]
    assert lines[0].startswith("step-00000001")
    assert "by 1 ranks" in lines[0]
    assert lines[0].endswith("<- best")
    assert lines[1].endswith("<- latest")
    assert "step-00000002  damaged: step-00000002: manifest.json" in lines[2]
    assert list_run(tmp_path / "checkpoints") == list_run(tmp_path)
    assert list_run(tmp_path / "nowhere") == []


def test_a_run_means_its_best_checkpoint_then_its_latest(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        select_checkpoint(tmp_path)
    first = save_state(checkpoints, 1, make_state(1))
    assert select_checkpoint(tmp_path) == first
    assert select_checkpoint(first) == first
    best = save_state(checkpoints, 2, make_state(2), is_best=True)
    save_state(checkpoints, 3, make_state(3))
    assert select_checkpoint(tmp_path) == best
    (tmp_path / "checkpoints" / "best").unlink()
    assert select_checkpoint(tmp_path).name == "step-00000003"
    (tmp_path / "checkpoints" / "latest").unlink()
    assert select_checkpoint(tmp_path / "checkpoints").name == "step-00000003"


def test_only_a_whole_checkpoint_is_opened(tmp_path: Path) -> None:
    path = save_state(CheckpointStore(tmp_path, file_bytes=300), 1, make_state(1))
    assert find_faults(path) == []
    open_verified(path).close()
    for file in path.glob("*.safetensors"):
        flip_byte(file, -1)
    assert len(find_faults(path)) == len(list(path.glob("*.safetensors"))) > 1
    with pytest.raises(CheckpointError, match="its hash differs"):
        open_verified(path)


def test_a_description_counts_what_is_stored(tmp_path: Path) -> None:
    state = make_state(1)
    shown = describe(save_state(CheckpointStore(tmp_path), 9, state, fragments=cut_fragments(state, 4)))
    assert shown["step"] == 9
    assert shown["parameters"] == 4
    assert shown["elements"] == dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), 66 + 42 + 6 + 1)
    assert shown["progress"] == {"step": 9}


def test_differences_are_found_and_equal_states_have_none(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    state = make_state(1)
    one = save_state(checkpoints, 1, state)
    other = save_state(checkpoints, 2, state, fragments=cut_fragments(state, 7), progress={"step": 1})
    assert list(find_differences(one, other)) == ["step: 1 | 2", "scalars.optimizer_steps: 1 | 2"]
    changed = {key: tensor.clone() for key, tensor in state.items()}
    changed["norm.weight", "exp_avg"][2] += 0.5
    changed["scale", "master"].fill_(torch.nan)
    changed = {(name, kind): tensor for (name, kind), tensor in changed.items() if name != "embed.weight"}
    third = save_state(checkpoints, 3, changed, progress={"step": 1}, scalars={"optimizer_steps": 1})
    assert sorted(find_differences(one, third)) == [
        "embed.weight: shape (11, 6) | absent",
        "norm.weight (exp_avg): largest difference 0.5",
        "scale (master): largest difference nan",
        "step: 1 | 3",
    ]
    assert "embed.weight: absent | present" in list(find_differences(third, one))
