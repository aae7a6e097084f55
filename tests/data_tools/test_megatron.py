"""Megatron-core's own classes read our shards and our exports, and we read what they write."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.choices import TokenFormat
from data_tools.interchange import export_tokens, import_tokens
from data_tools.pack import pack
from data_tools.token_shards import open_dataset
from tests.data_tools.conftest import write_dataset
from tests.data_tools.test_interchange import EOS, documents_of, make_tokenizer
from tests.distributed.ranks import REPOSITORY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed; test_token_shards.py reads the format from its description",
)
PROGRAM = Path(__file__).with_name("megatron_reader.py")
DOCUMENTS = [[[5, 6], [EOS]], [[300, 2, EOS]], [[1] * 40, [2] * 7, [EOS]], [[9, EOS]]]


def megatron(*words: object, documents: object = None) -> list[list[list[list[int]]]]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, words)],
        input=json.dumps(documents),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=900,  # its imports take minutes on a crowded machine
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) if done.stdout else []


def test_their_reader_reads_shards_packed_rows_and_exports(tmp_path: Path) -> None:
    narrow, wide, out, packed = (tmp_path / name for name in ("narrow", "wide", "out", "packed"))
    texts = {narrow: [[65_000] * length for length in (3, 1, 50, 8)], wide: [[100_000, 7], [1] * 30, [2]]}
    stems = []
    for folder, dtype in ((narrow, "uint16"), (wide, "int32")):
        manifest = write_dataset(folder / "train", texts[folder], shard_tokens=20, dtype=dtype)
        stems.append([folder / "train" / shard.name for shard in manifest.shards])
        assert len(stems[-1]) > 1
    export_tokens(narrow, TokenFormat.MEGATRON, out)
    pack(narrow, packed, sequence_length=8)
    found = megatron("read", *stems[0], *stems[1], out / "train", packed / "train" / "shard-00000")
    ended = {folder: [[[*text, 0]] for text in documents] for folder, documents in texts.items()}
    assert [document for shard in found[: len(stems[0])] for document in shard] == ended[narrow]
    assert [document for shard in found[len(stems[0]) : -2] for document in shard] == ended[wide]
    assert found[-2] == ended[narrow]
    rows = open_dataset(packed / "train")
    assert found[-1] == [[rows.row(index, 8).tokens.tolist()] for index in range(rows.row_count(8))]


def test_what_their_builder_writes_is_imported(tmp_path: Path) -> None:
    dtypes = ("uint16", "int32", "int64")
    megatron("write", tmp_path / "theirs", *dtypes, documents=DOCUMENTS)
    (tmp_path / "tokenizer").mkdir()
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 400)
    flat = [[token for sequence in document for token in sequence] for document in DOCUMENTS]
    for dtype in dtypes:
        theirs, ours = tmp_path / f"theirs-{dtype}.bin", tmp_path / f"ours-{dtype}" / "train"
        import_tokens([theirs], TokenFormat.MEGATRON, tokenizer, ours.parent)
        assert documents_of(open_dataset(ours)) == flat
        if dtype == "uint16":  # then even the bytes are the same
            assert (ours / "shard-00000.bin").read_bytes() == theirs.read_bytes()
