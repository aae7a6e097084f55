"""Shards are put together while later tasks are still being encoded; when they cannot be, the encoding stops."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare import PrepareOptions, prepare
from data_tools.shard_assembly import SplitAssembly
from data_tools.task_encoding import TaskEncoder
from tests.data_tools.conftest import TEXT, write_lines
from tests.data_tools.test_parallel_prepare import content

RANGE_BYTES = 2000  # some thirty tasks
OPTIONS = PrepareOptions(fractions=(0.6, 0.3, 0.1), shard_tokens=1500)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [f"{number} {text}" for number, text in enumerate(TEXT * 5)])


@pytest.fixture
def clean(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> Path:
    """What is made in one task."""
    prepare([corpus], tokenizer_folder, tmp_path / "clean", OPTIONS)
    (tmp_path / "clean" / "preparation.json").unlink()  # it counts tasks
    return tmp_path / "clean"


def shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in content(folder).items() if name != "preparation.json"}


def test_shards_are_put_together_while_later_tasks_are_encoded(
    tmp_path: Path, corpus: Path, clean: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, publish, published = TaskEncoder.encode, SplitAssembly.publish, threading.Event()

    def encode_after_a_shard(self, task, on_progress):
        if task.number == 20:
            assert published.wait(300)
        return encode(self, task, on_progress)

    def publish_and_tell(self, *words):
        record = publish(self, *words)
        published.set()
        return record

    monkeypatch.setattr(TaskEncoder, "encode", encode_after_a_shard)
    monkeypatch.setattr(SplitAssembly, "publish", publish_and_tell)
    prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, range_bytes=RANGE_BYTES)
    assert shards(tmp_path / "out") == shards(clean)


def test_a_shard_that_cannot_be_written_stops_the_encoding(
    tmp_path: Path, corpus: Path, clean: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, failed, encoded = TaskEncoder.encode, threading.Event(), []

    def encode_after_the_failure(self, task, on_progress):
        if task.number == 20:
            assert failed.wait(300)
            time.sleep(0.5)  # until the failure has been told to whoever waits for it
        encoded.append(task.number)
        return encode(self, task, on_progress)

    def fail(*_: Any) -> None:
        failed.set()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(TaskEncoder, "encode", encode_after_the_failure)
        patched.setattr(SplitAssembly, "publish", fail)
        with pytest.raises(OSError, match="No space"):
            prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, range_bytes=RANGE_BYTES)
    assert len(encoded) < 22  # of more than thirty
    assert not list((tmp_path / ".out.partial" / "train").iterdir())
    prepare([corpus], tokenizer_folder, tmp_path / "out", OPTIONS, range_bytes=RANGE_BYTES)
    assert shards(tmp_path / "out") == shards(clean)
