"""What a preparation shows: a bar on a terminal, nothing elsewhere, and tables of what was made."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from data_tools.prepare import PrepareOptions, prepare
from data_tools.progress import EncodingProgress
from tests.data_tools.conftest import TEXT, write_lines


class Counted:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.total = self.finished = self.read = self.tokens = 0

    def start(self, total_bytes: int, finished_bytes: int) -> None:
        self.total, self.finished = total_bytes, finished_bytes

    def advance(self, read_bytes: int, tokens: int) -> None:
        self.read += read_bytes
        self.tokens += tokens


def test_every_byte_and_token_is_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    for workers in (1, 2):
        counted = Counted()
        out = tmp_path / f"out-{workers}"
        made = prepare(
            [source],
            tokenizer_folder,
            out,
            PrepareOptions(),
            workers=workers,
            range_bytes=3000,
            progress=counted,
        )
        assert counted.read == counted.total == source.stat().st_size
        assert counted.finished == 0
        assert counted.tokens == sum(manifest.tokens for manifest in made.manifests.values())


def test_a_terminal_shows_rates_and_a_file_shows_nothing() -> None:
    for is_terminal in (True, False):
        shown = io.StringIO()
        with EncodingProgress(Console(file=shown, force_terminal=is_terminal, width=120)) as progress:
            progress.start(1000, 250)
            progress.advance(250, 60)
        assert ("50%" in shown.getvalue()) == is_terminal
        assert ("M tokens/s" in shown.getvalue()) == is_terminal
        assert is_terminal or not shown.getvalue()


def test_the_command_shows_what_was_made(run, tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", TEXT)
    words = ["prepare", source, "--tokenizer", tokenizer_folder, "--output", tmp_path / "out"]
    code, out, err = run(*words, "--split", "1", "--backend", "tokenizers")
    assert (code, err) == (0, "")
    characters = sum(len(text.encode()) for text in TEXT)
    row = next(line.split() for line in out.splitlines() if line.startswith("train "))
    assert (row[1], row[3]) == (str(len(TEXT)), f"{characters:,}")
    assert "encoded 1 tasks with tokenizers" in out
    histogram = [line.split() for line in out.splitlines() if " to " in line]
    assert sum(int(words[3]) for words in histogram) == len(TEXT)
    assert run(*words, "--backend", "fastest")[0] == 64
