"""The command line: exit codes, messages in three parts, nothing heavy imported for --help."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from data_tools.__main__ import app
from data_tools.inspect import document_lengths
from data_tools.token_shards import open_dataset
from tests.data_tools.conftest import TEXT, write_lines


@pytest.fixture
def prepared(run, tmp_path: Path, tokenizer_folder: Path) -> Path:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    words = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--split", "0.8,0.2", "--workers", 2]
    code, out, _ = run("prepare", source, *words)
    assert code == 0
    assert "train: " in out
    assert "unigram entropy" in out
    return tmp_path / "data"


@pytest.mark.end_to_end
def test_from_text_to_packed_rows(run, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    steps = [
        ["train-tokenizer", source, "--type", "bpe", "--vocab-size", 400, "--output", tmp_path / "tokenizer"],
        ["prepare", source, "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "data"],
        ["pack", tmp_path / "data", "--sequence-length", 32, "--method", "concat", "--output", tmp_path / "packed"],
    ]
    for step in steps:
        code, out, err = run(*step)
        assert (code, err) == (0, "")
        code, out, _ = run(*step)  # a rerun costs nothing and says so
        assert code == 0
        assert "nothing to do" in out
    assert (tmp_path / "packed" / "tokenizer" / "tokenizer.json").read_bytes() == (
        tmp_path / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert open_dataset(tmp_path / "packed" / "train").sequence_length == 32
    assert run("verify", tmp_path / "packed")[0] == 0


def test_inspect_shows_rows_and_borders(run, prepared: Path) -> None:
    code, out, _ = run("inspect", prepared, "--rows", 2, "--sequence-length", 64)
    assert code == 0
    assert TEXT[0][:60] in out
    assert "--- document starts at 0" in out
    assert "--- document goes on at 0" in out
    assert "nats per token" in out
    assert "document length (tokens)" in out
    assert run("inspect", prepared, "--row", 10**6)[0] == 64


def test_inspect_draws_lengths_and_frequencies(run, prepared: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="the extra plots is not installed")
    picture = tmp_path / "picture.png"
    code, out, _ = run("inspect", prepared, "--rows", 0, "--histogram", picture)
    assert code == 0
    assert f"{picture}: {picture.stat().st_size:,} bytes" in out
    pixels = image.imread(picture)
    splits = len(list(prepared.glob("*/manifest.json")))
    assert pixels.shape[0] / pixels.shape[1] == pytest.approx(splits * 3.6 / 11.2, rel=0.01)
    right = pixels[:, pixels.shape[1] // 2 :, :3]
    assert (abs(right - [0x1F / 255, 0x3D / 255, 0x5C / 255]).max(axis=-1) < 0.02).sum() > 100  # the curve of ranks
    assert run("inspect", prepared, "--histogram", tmp_path / "picture.jpeg")[0] == 64
    assert not (tmp_path / "picture.jpeg").exists()


def test_stats_count_what_is_there(run, prepared: Path) -> None:
    code, out, _ = run("stats", prepared, "--json")
    numbers = json.loads(out)
    assert code == 0
    assert numbers["train"]["documents"] + numbers["validation"]["documents"] == len(TEXT)
    dataset = open_dataset(prepared / "train")
    assert numbers["train"]["tokens"] == dataset.token_count
    lengths = document_lengths(dataset)
    assert numbers["train"]["length_percentile_50"] == np.median(lengths)
    assert numbers["train"]["length_percentile_99"] == np.percentile(lengths, 99)
    report = json.loads((prepared / "preparation.json").read_text(encoding="utf-8"))["splits"]["train"]
    assert numbers["train"]["bytes_per_token"] == report["text_bytes"] / report["tokens"]
    assert abs(numbers["train"]["unigram_entropy_nats"] - (dataset.manifest.unigram_entropy_nats or 0)) < 1e-9
    assert "most frequent tokens" in run("stats", prepared)[1]


def test_stats_of_packed_rows_leave_padding_out(run, prepared: Path, tmp_path: Path) -> None:
    run("pack", prepared, "--sequence-length", 50, "--output", tmp_path / "packed")
    plain, packed = (json.loads(run("stats", folder, "--json")[1]) for folder in (prepared, tmp_path / "packed"))
    for split, numbers in packed.items():
        assert 0 <= numbers.pop("padding_tokens") < 50
        del plain[split]["padding_tokens"], plain[split]["bytes"], numbers["bytes"], plain[split]["bytes_per_token"]
    assert packed == plain


def test_verify_names_what_is_broken(run, prepared: Path) -> None:
    assert run("verify", prepared)[0] == 0
    broken = prepared / "train" / "shard-00000.bin"
    raw = bytearray(broken.read_bytes())
    raw[10] ^= 255
    broken.write_bytes(raw)
    code, _, err = run("verify", prepared)
    assert code == 65
    assert str(broken) in err
    assert "in.jsonl bytes " in err
    assert run("verify", prepared, "--no-hashes")[0] == 0
    broken.write_bytes(raw[:-4])
    assert run("verify", prepared, "--no-hashes")[0] == 65
    (prepared / "validation" / "shard-00000.idx").unlink()
    code, _, err = run("verify", prepared)
    assert "shard-00000.idx: is missing" in err
    assert "shard-00000.bin: has" in err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["prepare"], 64),
        (["prepare", "in.jsonl", "--tokenizer", "t", "--output", "o", "--split", "2"], 64),
        (["prepare", "missing.jsonl", "--tokenizer", "missing", "--output", "o"], 65),
        (["pack", ".", "--sequence-length", "8", "--method", "first-fit", "--output", "o"], 64),
        (["pack", ".", "--sequence-length", "0", "--output", "o"], 64),
        (["verify", "."], 65),
        (["inspect", "missing"], 65),
        (["distil"], 64),
        (["prepare", "--no-such-option"], 64),
    ],
)
def test_exit_codes(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, err = run(*words)
    assert found == code, err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_an_error_has_three_parts(run, tmp_path: Path) -> None:
    _, _, err = run("verify", tmp_path)
    assert [line.split(":")[0].strip() for line in err.strip().splitlines()] == ["error", "allowed", "change"]


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A limit on the size of files stands for a full disk: writing fails half way in the same manner."""
    source = write_lines(tmp_path / "in.jsonl", TEXT * 200)
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "data_tools", "prepare", source, "--tokenizer", tokenizer_folder]
        + ["--output", tmp_path / "out" / "data"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 74, result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['data-tools', '--help']\n"
        "from data_tools.__main__ import main\n"
        "assert main() == 0\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv_heavy)), file=sys.stderr)"
    )
    heavy = ["torch", "transformers", "numpy", "tokenizers", "datasets", "xxhash", "orjson", "pyarrow"]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv_heavy = {heavy}\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stderr.strip() == "[]"


def test_no_command_needs_torch_or_transformers() -> None:
    modules = ["pack", "prepare", "inspect", "tokenizer", "tokenizer_training", "token_shards", "corpus"]
    code = f"import sys, importlib\nfor name in {modules}: importlib.import_module('data_tools.' + name)\n"
    code += "assert not {'torch', 'transformers', 'pretrain'} & set(sys.modules), 'too heavy'"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_a_dataset_is_asked_for_alike_on_one_machine_and_on_several() -> None:
    commands: Any = typer.main.get_command(app)

    def options(command: str) -> dict[str, Any]:
        asked = {one.name: (one.opts, one.required, one.default) for one in commands.commands[command].params}
        return {name: how for name, how in asked.items() if name not in own}

    own = {"stdin_suffix", "hang_seconds", "share", "shares", "executor", "cluster", "dry_run"}
    assert options("prepare") == options("prepare-shared")
    assert len(options("prepare")) == 14
