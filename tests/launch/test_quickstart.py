"""The two promises of README.md, kept for real: the quickstart from nothing, and every command marked as tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import readme
from tests.distributed.ranks import REPOSITORY
from tests.launch import jobs

pytestmark = [pytest.mark.end_to_end, pytest.mark.ranks, pytest.mark.slow]


@pytest.mark.timeout(1500)
def test_the_quickstart_learns_and_repeats_nothing(tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    command = ["bash", "launch/quickstart.sh", "--output", output]
    written = jobs.run(command, log=tmp_path / "first.log", deadline_seconds=900)
    assert "learned beyond that" in written  # and its exit code says: enough
    assert jobs.newest_manifest(output)["world_size"] == 2
    metrics, tokens = (output / "metrics.jsonl").read_bytes(), output / "data/packed/train/manifest.json"
    made = tokens.stat().st_mtime_ns

    jobs.run(command, log=tmp_path / "second.log", deadline_seconds=300)
    assert (output / "metrics.jsonl").read_bytes() == metrics
    assert tokens.stat().st_mtime_ns == made


@pytest.mark.timeout(1200)
def test_the_readme_s_commands_run_in_order(tmp_path: Path) -> None:
    for folder in ("launch", "ds_configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    for number, command in enumerate(readme.tested_commands()):
        jobs.run(["bash", "-c", command], log=tmp_path / f"{number}.log", folder=tmp_path, deadline_seconds=240)
    assert len(jobs.losses(tmp_path / "runs/mine")) > 0
