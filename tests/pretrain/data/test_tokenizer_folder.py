"""The tokenizer kept with a run: the one that made the data, whatever its kind, with its EOS token named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from data_tools.token_shards import TokenizerIdentity
from pretrain.config_data import DataSection
from pretrain.data.open_datasets import open_datasets
from pretrain.data.tokenizer_folder import keep_tokenizer
from pretrain.errors import DataError
from tests.pretrain.data.datasets import open_sources, write_documents

ADDED = {"added_tokens": [{"id": 7, "content": "<end>"}], "model": {"vocab": {"a": 0}}}
VOCABULARIES = [
    ADDED,
    {"added_tokens": [], "model": {"vocab": {"a": 0, "<end>": 7}}},
    {"model": {"vocab": [["a", -1.0]] * 7 + [["<end>", 0.0]]}},
]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keep(folder: Path, identity: TokenizerIdentity, given: Path | None) -> Path:
    data = folder / "data" / "train"
    if not data.is_dir():
        write_documents(data, [[1, 2, 7]] * 4, tokenizer=identity, eos_id=7)
    (source,) = open_sources([data], 4)
    keep_tokenizer(source, None if given is None else str(given), folder / "run")
    return folder / "run" / "tokenizer"


@pytest.mark.parametrize("content", VOCABULARIES)
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_bare_tokenizer_json_gets_its_eos_token(tmp_path: Path, content: object, is_folder: bool) -> None:
    file = tmp_path / "given" / "tokenizer.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    kept = keep(tmp_path, TokenizerIdentity(name="t", sha256=digest(file)), file.parent if is_folder else file)
    assert (kept / "tokenizer.json").read_bytes() == file.read_bytes()
    assert json.loads((kept / "tokenizer_config.json").read_text())["eos_token"] == "<end>"


def test_a_configured_eos_token_stays(tmp_path: Path) -> None:
    file = tmp_path / "given" / "tokenizer.json"
    file.parent.mkdir()
    file.write_text(json.dumps(ADDED))
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"eos_token": "<other>", "x": 1}')
    kept = keep(tmp_path, TokenizerIdentity(name="t", sha256=digest(file)), tmp_path / "given")
    assert json.loads((kept / "tokenizer_config.json").read_text()) == {"eos_token": "<other>", "x": 1}


def test_a_model_file_is_known_by_its_own_hash(tmp_path: Path) -> None:
    """data.tokenizer may be the .model file; what generation needs lies beside the data."""
    model = tmp_path / "mine.model"
    model.write_bytes(b"pieces")
    beside = tmp_path / "data" / "tokenizer"
    beside.mkdir(parents=True)
    shutil.copy(model, beside / "mine.model")
    (beside / "tokenizer.json").write_text(json.dumps(ADDED))
    identity = TokenizerIdentity(name="t", sha256=digest(model), file="mine.model")
    for given in (None, model, beside):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        kept = keep(tmp_path, identity, given)
        assert {path.name for path in kept.iterdir()} == {"mine.model", "tokenizer.json", "tokenizer_config.json"}
    train = str(tmp_path / "data" / "train")
    for given in (model, beside):
        section = DataSection(train=train, validation={}, tokenizer=str(given))
        assert open_datasets(section, sequence_length=4, vocabulary_size=60_000).training
    (beside / "mine.model").write_bytes(b"others")
    section = DataSection(train=train, validation={}, tokenizer=str(beside))
    with pytest.raises(DataError, match=r"data.tokenizer: .*mine.model has sha256"):
        open_datasets(section, sequence_length=4, vocabulary_size=60_000)
    keep(tmp_path, identity, None)  # the run has its own: it is not looked for again
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(DataError, match=r"mine.model has sha256 .* was made with"):
        keep(tmp_path, identity, None)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    assert not keep(tmp_path, TokenizerIdentity(name="t", sha256="0" * 64), None).exists()
