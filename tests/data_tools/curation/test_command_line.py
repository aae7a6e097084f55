"""`data-tools curate`: from a shipped recipe to a dataset, and what is told when something is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture.source_files import REPOSITORY
from tests.data_tools.curation.reading import records
from tests.data_tools.curation.texts import GERMAN, write_corpus

Run = Callable[..., tuple[int, str, str]]
SHIPPED = sorted((REPOSITORY / "launch/curation").glob("*.yaml"))


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Every twentieth document of the corpus that ships with the project, a copy, and one in German."""
    path = tmp_path / "sample.jsonl"
    with gzip.open(REPOSITORY / "launch/corpus/documents.jsonl.gz", "rt", encoding="utf-8") as corpus:
        lines = list(corpus)[::20]
    lines += [lines[7], json.dumps({"text": GERMAN * 5, "id": "german", "source": "test"}) + "\n"]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.end_to_end
@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_then_prepare(
    run: Run, sample: Path, tmp_path: Path, tokenizer_folder: Path, recipe: Path
) -> None:
    words = ["curate", recipe, "--input", sample, "--output", tmp_path / "clean", "--workers", 1]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    came = len(sample.read_text(encoding="utf-8").splitlines())
    kept = records(tmp_path / "clean")
    assert f"{came:,} documents, {len(kept):,} kept" in out
    assert "the same text came before" in out.replace("\n", " ") or recipe.stem != "shipped-corpus"
    assert "german" not in {record["id"] for record in kept}
    if recipe.stem == "shipped-corpus":
        assert 0.5 < len(kept) / came < 1
    code, out, _ = run(*words)
    assert code == 0
    assert "nothing to do" in out
    into = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--split", "1", "--metadata", "source"]
    code, out, _ = run("prepare", tmp_path / "clean", *into)
    assert code == 0
    assert f"train: {len(kept):,} documents" in out


def test_faults_are_told(run: Run, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\nstep: []\n")
    code, _, err = run("curate", recipe, "--input", source, "--output", tmp_path / "out")
    assert code == 64
    assert "1. steps is not given" in err
    assert "2. unknown key step" in err
    assert "did you mean steps?" in err
    recipe.write_text("name: a\nsteps: [{step: unicode}]\n")
    code, _, err = run("curate", recipe)
    assert code == 64
    assert "names no inputs and no output" in err
    code, _, err = run("curate", recipe, "--input", source, "--output", tmp_path / "out", "--executor", "slurm")
    assert code == 64
    assert "has no section slurm" in err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_stages(run: Run, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in.jsonl", stories=2)
    code, out, _ = run("curate", SHIPPED[0], "--input", source, "--output", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "near-buckets\n    14 tasks" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_missing_packages_are_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "datatrove" else object())
    code, _, err = run("curate", tmp_path / "recipe.yaml")
    assert code == 64
    assert "datatrove is not installed" in err
