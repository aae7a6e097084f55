"""Reading: any cut reassembles, any run is right, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.fragments import KINDS, MASTER, Fragment, element_count
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import write_fragments
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import SHAPES, assert_holds, cut_fragments, make_state, save_state


def publish(folder: Path, fragments: list[Fragment], *, world_size: int = 1, **changes: Any) -> Path:
    """A checkpoint of fragments dealt out to some ranks, without the checks of a store."""
    folder.mkdir()
    files = [
        file
        for rank in range(world_size)
        for file in write_fragments(fragments[rank::world_size], folder, rank=rank, file_bytes=200)
    ]
    values: dict[str, Any] = {
        "step": 1,
        "sequence": 1,
        "saved_at": "2026-01-01T00:00:00+00:00",
        "world_size": world_size,
        "parameters": SHAPES,
        "scalars": {},
        "progress": {},
        "metadata": {},
        "files": tuple(written.file for written in files),
    }
    Manifest(**(values | changes)).write(folder)
    return folder


@given(seed=st.integers(0, 10**6), world_size=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_any_cut_into_boxes_and_runs_reassembles(
    tmp_path_factory: pytest.TempPathFactory, seed: int, world_size: int
) -> None:
    state = make_state(seed)
    path = publish(tmp_path_factory.mktemp("cut") / "step-00000001", cut_fragments(state, seed), world_size=world_size)
    with Checkpoint(path) as checkpoint:
        assert_holds(checkpoint, state)
        generator = torch.Generator().manual_seed(seed)
        for (name, kind), tensor in state.items():
            size = element_count(SHAPES[name])
            start = int(torch.randint(size + 1, (), generator=generator))
            count = int(torch.randint(size - start + 1, (), generator=generator))
            assert torch.equal(checkpoint.read_run(name, kind, start, count), tensor.reshape(-1)[start : start + count])


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_any_run_of_any_box_is_read_from_any_cut(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    state = make_state(seed)
    path = publish(tmp_path_factory.mktemp("box") / "step-00000001", cut_fragments(state, seed), world_size=2)
    generator = torch.Generator().manual_seed(seed)

    def up_to(most: int) -> int:
        return int(torch.randint(most + 1, (), generator=generator))

    with Checkpoint(path) as checkpoint:
        for (name, kind), tensor in state.items():
            sides = [(start, start + up_to(length - start)) for length in SHAPES[name] for start in [up_to(length)]]
            wanted = tensor[tuple(slice(*side) for side in sides)].reshape(-1)
            start = up_to(wanted.numel())
            count = up_to(wanted.numel() - start)
            # read into as it is, through another type, and into places that are not neighbours
            for found in (torch.zeros(count), torch.zeros(count, dtype=torch.float64), torch.zeros(count, 2)[:, 0]):
                checkpoint.read_into(found, name, kind, tuple(sides), start)
                assert torch.equal(found.float(), wanted[start : start + count]), (name, sides, start, count)


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    state = make_state()
    path = save_state(CheckpointStore(tmp_path), 1, state)
    (file,) = path.glob("*.safetensors")
    stored = safetensors.torch.load_file(file)
    assert len(stored) == len(state)
    for number, ((name, kind), tensor) in enumerate(state.items()):
        assert torch.equal(stored[f"{name}:{kind}:{number}"], tensor.reshape(-1))


def test_names_keep_the_model_order_and_scalars_come_back(tmp_path: Path) -> None:
    shapes = {name: SHAPES[name] for name in reversed(SHAPES)}
    path = save_state(CheckpointStore(tmp_path), 1, make_state(shapes=shapes), scalars={"loss_scale": 2.0**16})
    with Checkpoint(path) as checkpoint:
        assert checkpoint.names() == list(shapes)
        assert checkpoint.scalars == {"loss_scale": 65536.0}
        assert checkpoint.shape("norm.weight") == (6,)


def test_reading_opens_few_files_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.checkpoint.reader.MOST_OPEN_FILES", 2)
    state = make_state()
    path = publish(tmp_path / "step-00000001", cut_fragments(state, 3), world_size=4)
    with Checkpoint(path) as checkpoint:
        assert_holds(checkpoint, state)
        assert len(checkpoint._files) == 2


@pytest.mark.parametrize("lost", [0, 7, -1])
def test_a_lost_fragment_is_named(tmp_path: Path, lost: int) -> None:
    fragments = cut_fragments(make_state(), 5)
    gone = fragments.pop(lost)
    with pytest.raises(CheckpointError, match=f"{gone.name} .*missing|{gone.name} .*no fragment"):
        Checkpoint(publish(tmp_path / "step-00000001", fragments))


def test_a_fragment_stored_twice_is_named(tmp_path: Path) -> None:
    fragments = cut_fragments(make_state(), 5)
    with pytest.raises(CheckpointError, match=f"{fragments[0].name} .*more than once"):
        Checkpoint(publish(tmp_path / "step-00000001", [*fragments, fragments[0]]))


def test_a_parameter_without_master_weights_is_named(tmp_path: Path) -> None:
    fragments = [f for f in cut_fragments(make_state(), 5) if (f.name, f.kind) != ("norm.weight", MASTER)]
    with pytest.raises(CheckpointError, match=r"norm.weight \(master\): no fragment"):
        Checkpoint(publish(tmp_path / "step-00000001", fragments))


def test_a_fragment_of_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "scale"}
    with pytest.raises(CheckpointError, match="scale .*no such parameter"):
        Checkpoint(publish(tmp_path / "step-00000001", cut_fragments(make_state(), 5), parameters=shapes))


def test_a_kind_that_was_not_saved_is_refused_when_read(tmp_path: Path) -> None:
    fragments = [fragment for fragment in cut_fragments(make_state(), 5) if fragment.kind == MASTER]
    with Checkpoint(publish(tmp_path / "step-00000001", fragments)) as checkpoint:
        assert checkpoint.kinds("scale") == [MASTER]
        with pytest.raises(CheckpointError, match="holds no exp_avg of scale"):
            checkpoint.read("scale", KINDS[1])


def test_a_file_cut_short_after_opening_is_an_error(tmp_path: Path) -> None:
    path = publish(tmp_path / "step-00000001", cut_fragments(make_state(), 5))
    with Checkpoint(path) as checkpoint:
        for file in path.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match="ends too early"):
            assert_holds(checkpoint, make_state())


def test_another_model_is_refused_with_the_first_differences(tmp_path: Path) -> None:
    with Checkpoint(publish(tmp_path / "step-00000001", cut_fragments(make_state(), 5))) as checkpoint:
        checkpoint.require_model(SHAPES)
        other = {name: shape for name, shape in SHAPES.items() if name != "scale"}
        other |= {"norm.weight": (8,), "extra": (2,)}
        with pytest.raises(CheckpointError) as refusal:
            checkpoint.require_model(other)
        for text in ("scale: in the checkpoint, not", "extra: in the model, not", "norm.weight: (6,)", "(8,)"):
            assert text in str(refusal.value)
        with pytest.raises(CheckpointError, match="and 16 more"):
            checkpoint.require_model({f"layer.{number}": (1,) for number in range(17)})
        with pytest.raises(CheckpointError, match="has no parameter extra"):
            checkpoint.read("extra", MASTER)
