"""prepare-shared through a real Slurm: two shares on two nodes and the job that puts them together.

What the shares do is test_prepare_shared.py's; the daemons are tests/launch/slurm_cluster.py's.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.data_tools.conftest import TEXT
from tests.launch import jobs
from tests.launch.slurm_cluster import slurm_cluster

DEADLINE_SECONDS = 900  # for jobs that take seconds on a quiet machine


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def data_tools(words: list[object], log: Path, changes: Mapping[str, str]) -> str:
    return jobs.run(
        [sys.executable, "-m", "data_tools", *map(str, words)],
        log=log,
        changes=changes,
        deadline_seconds=DEADLINE_SECONDS,
    )


@pytest.mark.slow
@pytest.mark.launch
def test_two_shares_on_slurm_give_the_bytes_of_one_machine(tmp_path: Path, tokenizer_folder: Path) -> None:
    pytest.importorskip("datatrove", reason="the extra curate is not installed")
    corpus = tmp_path / "in"
    corpus.mkdir()
    for number in range(5):  # compressed files are a task each
        lines = "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for text in TEXT)
        (corpus / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    words: list[object] = [corpus, "--tokenizer", tokenizer_folder, "--split", "0.6,0.3,0.1"]
    data_tools(["prepare", *words, "--output", tmp_path / "alone", "--workers", 1], tmp_path / "alone.log", {})
    shared = ["prepare-shared", *words, "--output", tmp_path / "data", "--shares", 2, "--executor", "slurm"]
    with slurm_cluster() as slurm:
        # the nodes' processes begin with an environment of their own: they are told where this checkout is
        setup = (
            f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={os.environ.get('PYTHONPATH', os.getcwd())}"
        )
        settings = {"partition": "main", "time": "00:10:00", "memory_gigabytes": 1, "setup": setup}
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"slurm": settings}))
        shared += ["--cluster", tmp_path / "cluster.yaml"]
        told = data_tools(shared, tmp_path / "submit.log", slurm.environment)
        slurm.wait_for(lambda: not slurm.ask("squeue", "--noheader").strip(), "the jobs do not end", DEADLINE_SECONDS)
        written = "\n".join(path.read_text() for path in (tmp_path / ".data.cluster").rglob("*.out"))
        assert (tmp_path / "data").is_dir(), f"{told}\n{written}"
        assert "nothing to do" in data_tools(shared, tmp_path / "again.log", slurm.environment)
    assert content(tmp_path / "data") == content(tmp_path / "alone")
    names = {path.name for path in tmp_path.iterdir()}
    assert ".data.shares" not in names
    assert ".data.partial" not in names
