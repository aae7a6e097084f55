"""`pretrain train` on bad input: one clear error, an exit code of its kind, and nothing of before is harmed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch import jobs

pytestmark = pytest.mark.end_to_end
CONFIGURATION, DATA, STORAGE = 64, 65, 74


def train(folder: Path, dataset: Path, *words: str, expected: int, **sections: Any) -> str:
    config = jobs.write_tiny_run(folder / "run.yaml", data=dataset, **sections)
    written = jobs.run(["pretrain", "train", config, *words], log=folder / "log", expected=expected)
    assert "Traceback" not in written
    return written


@pytest.fixture
def damaged(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset for a test to damage."""
    copy = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, copy)
    return copy


def test_a_shard_cut_short(damaged: Path, tmp_path: Path) -> None:
    shard = next((damaged / "train").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-100])
    written = train(tmp_path, damaged, expected=DATA)
    assert "data.train" in written
    assert shard.name in written


def test_a_flipped_byte_is_found_where_hashes_are_asked_for(damaged: Path, tmp_path: Path) -> None:
    shard = next((damaged / "train").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert shard.name in train(tmp_path, damaged, "data.verify=hashes", expected=DATA)


def test_a_missing_dataset_and_unequal_numbers_are_told_before_anything_starts(tmp_path: Path) -> None:
    assert "not-there" in train(tmp_path, tmp_path / "not-there", expected=DATA)
    written = train(tmp_path, tmp_path, "batch.global_batch_size=5", "optimiser.name=adamw", expected=CONFIGURATION)
    assert "did you mean" in written


def test_a_vocabulary_larger_than_the_model_s(tiny_dataset: Path, tmp_path: Path) -> None:
    written = train(tmp_path, tiny_dataset, "model.vocab_size=100", expected=DATA)
    assert "model.vocab_size=512" in written


def test_another_tokenizer(tiny_dataset: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    assert "sha256" in train(tmp_path, tiny_dataset, f"data.tokenizer={tokenizer}", expected=DATA)


def test_a_checkpoint_of_another_model(tiny_dataset: Path, tmp_path: Path) -> None:
    train(tmp_path, tiny_dataset, expected=0)
    before = jobs.newest_manifest(tmp_path / "run")
    written = train(tmp_path, tiny_dataset, "model.intermediate_size=96", "schedule.total_steps=5", expected=STORAGE)
    assert "model.layers.0.mlp" in written
    assert jobs.newest_manifest(tmp_path / "run") == before


def test_a_disk_that_fills_while_saving(tiny_dataset: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    # a checkpoint of this model has about 0.6 MB: one or two fit, then a save finds too little room
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(run_folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        sections = {"checkpoint": {"every_steps": 1, "keep_last": 5}, "evaluation": {}}
        written = train(tmp_path, tiny_dataset, expected=STORAGE, **sections)
        assert "bytes are free" in written or "No space left" in written
        left = sorted(path.name for path in (run_folder / "checkpoints").iterdir() if path.is_dir())
        assert left, "no earlier checkpoint"
        assert left == [f"step-{step:08d}" for step in range(1, len(left) + 1)]  # and no staging folder
        listed = jobs.run(["pretrain", "checkpoint", "verify", run_folder], log=tmp_path / "verify.log")
        assert all(name in listed for name in left)
    finally:
        subprocess.run(["umount", str(run_folder)], check=True)
