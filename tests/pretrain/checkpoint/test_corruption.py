"""Every damage to a checkpoint is found before a value is used, is named, and leads back to an older one."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.inspection import find_faults
from pretrain.checkpoint.resume import choose_checkpoint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import assert_holds, cut_fragments, flip_byte, make_state, save_state

FILE = "rank-00000-00000.safetensors"


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped value": (lambda path: flip_byte(path / FILE, -1), f"{FILE}: its hash differs"),
    "a flipped header": (lambda path: flip_byte(path / FILE, 20), f"{FILE}: its hash differs"),
    "a truncated file": (lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-1]), f"{FILE}: .* bytes"),
    "an empty file": (lambda path: (path / FILE).write_bytes(b""), f"{FILE}: 0 bytes"),
    "a longer file": (lambda path: (path / FILE).write_bytes((path / FILE).read_bytes() + b"x"), f"{FILE}: .* bytes"),
    "a deleted file": (lambda path: (path / FILE).unlink(), f"{FILE} is missing"),
    "a folder in a file's place": (
        lambda path: ((path / FILE).unlink(), (path / FILE).mkdir()),
        FILE,
    ),
    "a deleted manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json: "),
    "a manifest that is no object": (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json: "),
    "a half manifest": (
        lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:200]),
        "manifest.json: ",
    ),
    "a manifest without its last byte": (
        lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-1]),
        "manifest.json: .* not as it was written",
    ),
    "an edited step": (lambda path: edit_manifest(path, step=7), "does not match its own hash"),
    "edited files": (lambda path: edit_manifest(path, files=[]), "does not match its own hash"),
    "a later format": (lambda path: edit_manifest(path, format_version=99), "format version 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_an_older_checkpoint_is_taken(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointStore(tmp_path, file_bytes=400)
    save_state(writer, 1, make_state(1))
    newest = save_state(writer, 2, make_state(2), fragments=cut_fragments(make_state(2), 2))
    act, message = DAMAGES[damage]
    act(newest)
    checkpoints = CheckpointStore(tmp_path)
    with caplog.at_level(logging.ERROR):
        chosen = choose_checkpoint(checkpoints, "auto")
    assert chosen is not None
    assert_holds(chosen, make_state(1))
    assert re.search(message, checkpoints.rejected["step-00000002"])
    assert re.search("step-00000002 is rejected: .*" + message, caplog.text)
    assert any(re.search(message, fault) for fault in find_faults(newest))
    with pytest.raises(CheckpointError, match=message):
        choose_checkpoint(checkpoints, str(newest))


@given(position=st.integers(0, 10**6), which=st.integers(0, 99))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_of_any_file_goes_unseen(tmp_path: Path, position: int, which: int) -> None:
    path = tmp_path / "whole" / "step-00000001"
    if not path.exists():
        save_state(CheckpointStore(path.parent, file_bytes=400), 1, make_state(1))
    assert find_faults(path) == []
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    files = sorted(copy.iterdir())
    flip_byte(files[which % len(files)], position)
    assert find_faults(copy)


def test_auto_starts_afresh_only_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    assert choose_checkpoint(checkpoints, "auto") is None
    (tmp_path / "checkpoints" / ".staging-step-00000001").mkdir(parents=True)  # a first save that did not end
    assert choose_checkpoint(checkpoints, "auto") is None
    path = save_state(checkpoints, 1, make_state(1))
    flip_byte(path / FILE, -1)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints .* verifies .*its hash differs"):
        choose_checkpoint(checkpoints, "auto")


def test_required_needs_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        choose_checkpoint(checkpoints, "required")
    save_state(checkpoints, 3, make_state(3))
    chosen = choose_checkpoint(checkpoints, "required")
    assert chosen is not None
    assert chosen.manifest.step == 3


def test_never_refuses_a_folder_with_checkpoints_even_damaged_ones(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    assert choose_checkpoint(checkpoints, "never") is None
    path = save_state(checkpoints, 3, make_state(3))
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="another name or run_folder"):
        choose_checkpoint(checkpoints, "never")


def test_a_named_checkpoint_is_taken_and_leads_on_from_there(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        save_state(checkpoints, step, make_state(step))
    for wish in ("step-00000001", str(tmp_path / "step-00000001")):
        chosen = choose_checkpoint(checkpoints, wish)
        assert chosen is not None
        assert chosen.manifest.step == 1
    save_state(checkpoints, 2, make_state(22))  # the new line of the run, of which `auto` must be the continuation
    chosen = choose_checkpoint(CheckpointStore(tmp_path), "auto")
    assert chosen is not None
    assert_holds(chosen, make_state(22))
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        choose_checkpoint(checkpoints, str(tmp_path / "nowhere"))


def test_the_newest_is_the_last_saved_and_not_the_furthest(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep_last=9)
    for step in (100, 300, 200):  # the run fell back, and whole states of the steps it left are still there
        save_state(checkpoints, step, make_state(step))
    assert [path.name for path in checkpoints.list()] == ["step-00000100", "step-00000300", "step-00000200"]
    (tmp_path / "latest").unlink()
    newest = CheckpointStore(tmp_path).newest_valid()
    assert newest is not None
    assert newest.manifest.step == 200
