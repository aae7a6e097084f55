"""datatrove's own reader reads our exports, and we read what its writer writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.choices import TokenFormat
from data_tools.interchange import export_tokens, import_tokens
from data_tools.token_shards import open_dataset
from tests.data_tools.conftest import write_dataset
from tests.data_tools.test_interchange import DOCUMENTS, documents_of, make_tokenizer

pytest.importorskip("datatrove", reason="datatrove is in the extra curate")


@pytest.mark.parametrize(("dtype", "item_bytes"), [("uint16", 2), ("int32", 4)])
def test_their_reader_reads_our_export(tmp_path: Path, dtype: str, item_bytes: int) -> None:
    from datatrove.utils.dataset import DatatroveFileDataset

    texts = [[60_000 + 10_000 * (item_bytes == 4)] * length for length in (3, 1, 50, 8)]
    write_dataset(tmp_path / "data" / "train", texts, dtype=dtype, shard_tokens=20)
    export_tokens(tmp_path / "data", TokenFormat.DATATROVE, tmp_path / "out")
    length = 9
    theirs = DatatroveFileDataset(
        str(tmp_path / "out" / "train.ds"), length, token_size=item_bytes, return_positions=True
    )
    stream = np.array([token for text in texts for token in [*text, 0]])
    positions = np.concatenate([np.arange(len(text) + 1) for text in texts])
    assert len(theirs) == len(stream) // (length + 1)
    for number in range(len(theirs)):
        part = slice(number * (length + 1), (number + 1) * (length + 1))
        assert theirs[number]["input_ids"].tolist() == stream[part].tolist()
        if number == 0:  # later windows of theirs do not know how far into a document they begin
            assert theirs[number]["positions"].tolist() == positions[part].tolist()


@pytest.mark.parametrize(("words", "item_bytes"), [(400, 2), (70_000, 4)])
def test_what_their_writer_writes_is_imported(tmp_path: Path, words: int, item_bytes: int) -> None:
    pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    file = TokenizedFile(str(tmp_path / "theirs"), "x.ds", token_size=item_bytes)
    for document in DOCUMENTS:
        file.write(document, None)
    file.close()
    (tmp_path / "tokenizer").mkdir()
    tokenizer = make_tokenizer(tmp_path / "tokenizer", words)
    import_tokens([tmp_path / "theirs" / "x.ds"], TokenFormat.DATATROVE, tokenizer, tmp_path / "ours")
    assert documents_of(open_dataset(tmp_path / "ours" / "train")) == DOCUMENTS
