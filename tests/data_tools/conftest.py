"""What the tests of the data tools share: datasets of known tokens, a small tokenizer, files of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_tools.choices import TokenizerType
from data_tools.token_shards import Manifest, ShardWriter, SourceRange, TokenizerIdentity
from data_tools.tokenizer import TOKENIZER_FILE, write_config
from data_tools.tokenizer_training import EOS_TOKENS, train_tokenizer

TEXT = [
    f"Document {number}: the quick brown fox jumps over {number % 7} lazy dogs, naïvely. " * (1 + number % 5)
    for number in range(60)
]


def draft(dtype: str = "uint16") -> Manifest:
    return Manifest(
        kind="documents",
        dtype=dtype,
        split="train",
        tokenizer=TokenizerIdentity(name="tiny", sha256="0" * 64),
        vocabulary_size=60000,
        eos_id=0,
    )


def write_dataset(
    folder: Path, documents: Iterable[Sequence[int]], *, shard_tokens: int = 1 << 20, dtype: str = "uint16"
) -> Manifest:
    """Write documents, each ending in EOS (0), as one split."""
    with ShardWriter(folder, draft(dtype), shard_tokens=shard_tokens) as writer:
        position = 0
        for document in documents:
            source = SourceRange(file="corpus.jsonl", start=position, stop=position + 10)
            writer.append(np.array([*document, 0], dtype), source)
            position += 10
        return writer.finish()


def write_lines(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "id": str(n)}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, TokenizerType.BPE, 400).save(str(folder / TOKENIZER_FILE))
    write_config(folder, EOS_TOKENS[TokenizerType.BPE])
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: words -> (exit code, standard output, standard error)."""
    from data_tools.__main__ import main

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["data-tools", *map(str, words)])
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # the command sets it: put it back afterwards
        monkeypatch.setenv("RAYON_NUM_THREADS", "2")
        capsys.readouterr()
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command
