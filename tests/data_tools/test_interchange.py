"""Token files of other projects: read by readers of their own, written as their writers do, refused when damaged."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data_tools.choices import Split, TokenFormat
from data_tools.errors import InputError, ShardError, UsageError
from data_tools.interchange import EMPTY_DOCUMENT, export_tokens, import_tokens
from data_tools.merge import merge
from data_tools.pack import pack
from data_tools.token_shards import ShardWriter, TokenDataset, open_dataset, verify_dataset
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.conftest import draft
from tests.data_tools.test_token_shards import read_megatron

EOS = 7
DOCUMENTS = [[5, 6, EOS], [EOS], [300, 2, EOS, 9, EOS], [1] * 40 + [EOS]]  # the third has an EOS inside
NAMES = {"megatron": "x.bin", "nanogpt": "x.bin", "datatrove": "x.ds", "npy": "x.npy"}


def make_tokenizer(folder: Path, words: int) -> Path:
    """Make a tokenizer of so many words, whose EOS is token 7."""
    names = {"<eos>" if number == EOS else f"word{number}": number for number in range(words)}
    made = Tokenizer(models.WordLevel(names, unk_token="word0"))
    made.add_special_tokens(["<eos>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("words"), 400)


@pytest.fixture(scope="session", params=[400, 70_000])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tokenizer for uint16 shards and one for int32."""
    return make_tokenizer(tmp_path_factory.mktemp("words"), request.param)


@pytest.fixture
def dataset(tokenizer: Path, tmp_path: Path) -> Path:
    loaded = load_tokenizer(tokenizer)
    dtype = "uint16" if loaded.vocabulary_size < 1 << 16 else "int32"
    plain = replace(
        draft(dtype), tokenizer=loaded.identity, vocabulary_size=loaded.vocabulary_size, eos_id=loaded.eos_id
    )
    for split, documents in {"train": DOCUMENTS, "validation": DOCUMENTS[:1]}.items():
        with ShardWriter(tmp_path / "data" / split, plain.for_split(split), shard_tokens=6) as writer:
            for document in documents:
                writer.append(np.array(document, dtype))
            writer.finish()
    return tmp_path / "data"


def documents_of(dataset: TokenDataset) -> list[list[int]]:
    stops = [*dataset.document_starts(1, dataset.token_count).tolist(), dataset.token_count]
    return [dataset.tokens(start, stop - start).tolist() for start, stop in itertools.pairwise([0, *stops])]


def lay_out(path: Path, layout: str, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    """Write a file as its own project does, from the description of its format alone."""
    stream = np.array([token for document in documents for token in document], dtype)
    lengths = [len(document) for document in documents]
    stops = list(itertools.accumulate(lengths))
    if layout == "npy":
        np.save(path, stream)
        return path
    path.write_bytes(stream.tobytes())
    if layout == "datatrove":
        Path(f"{path}.index").write_bytes(struct.pack(f"<{len(stops)}Q", *stops))
    if layout == "megatron":
        pointers = [(stop - length) * stream.itemsize for stop, length in zip(stops, lengths, strict=True)]
        code = {"<u2": 8, "<i4": 4, "<i8": 5, "<f4": 7}[dtype]
        count = len(lengths)
        index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, count, count + 1)
        index += struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *pointers, *range(count + 1))
        path.with_suffix(".idx").write_bytes(index)
    return path


@pytest.mark.parametrize("layout", list(TokenFormat))
def test_what_is_exported_can_be_imported(dataset: Path, tokenizer: Path, tmp_path: Path, layout: TokenFormat) -> None:
    has_borders = layout is not TokenFormat.NANOGPT
    if not has_borders and open_dataset(dataset / "train").manifest.dtype != "uint16":
        with pytest.raises(ShardError, match="uint16 for nanoGPT"):
            export_tokens(dataset, layout, tmp_path / "out")
        return
    paths = export_tokens(dataset, layout, tmp_path / "out")
    assert paths == sorted((tmp_path / "out").iterdir())
    suffix = NAMES[layout.value][1:]
    names = {Split.TRAIN: f"train{suffix}", Split.VALIDATION: f"validation{suffix}" if has_borders else "val.bin"}
    for split, name in names.items():
        folder = tmp_path / split.value
        options = {"split": split, "split_at_eos": not has_borders, "shard_tokens": 6}
        import_tokens([tmp_path / "out" / name], layout, tokenizer, folder, **options)
    merge([tmp_path / split.value for split in names], tmp_path / "back")
    assert verify_dataset(tmp_path / "back") == []
    for split in names:
        ours, theirs = (open_dataset(folder / split.value) for folder in (dataset, tmp_path / "back"))
        if has_borders:
            assert documents_of(theirs) == documents_of(ours)
            assert [shard.files for shard in theirs.manifest.shards] == [shard.files for shard in ours.manifest.shards]
        assert theirs.tokens(0, theirs.token_count).tolist() == ours.tokens(0, ours.token_count).tolist()
        assert replace(theirs.manifest, shards=(), command="", request={}) == replace(
            ours.manifest, shards=(), command="", request={}
        )


def test_their_readers_read_our_exports(dataset: Path, tmp_path: Path) -> None:
    dtype = open_dataset(dataset / "train").manifest.dtype
    stream = [token for document in DOCUMENTS for token in document]
    stops = list(itertools.accumulate(map(len, DOCUMENTS)))
    for layout in TokenFormat:
        if layout is not TokenFormat.NANOGPT or dtype == "uint16":
            export_tokens(dataset, layout, tmp_path / layout.value)
    assert [document.tolist() for document in read_megatron(tmp_path / "megatron" / "train")] == DOCUMENTS
    if dtype == "uint16":
        assert np.fromfile(tmp_path / "nanogpt" / "train.bin", "<u2").tolist() == stream
    folder = tmp_path / "datatrove"
    assert np.fromfile(folder / "train.ds", "<u2" if dtype == "uint16" else "<u4").tolist() == stream
    assert struct.unpack(f"<{len(stops)}Q", (folder / "train.ds.index").read_bytes()) == tuple(stops)
    lines = (folder / "train.ds.metadata").read_text().split("\n")
    assert lines[0].endswith("|2" if dtype == "uint16" else "|4")
    assert lines[1] == str(len(stream))
    assert np.load(tmp_path / "npy" / "train.npy").tolist() == stream
    assert np.load(tmp_path / "npy" / "train.npy").dtype == dtype
    assert np.load(tmp_path / "npy" / "train.lengths.npy").tolist() == [len(document) for document in DOCUMENTS]


@pytest.mark.parametrize("layout", ["megatron", "datatrove"])
def test_documents_without_eos_get_one_and_empty_ones_are_counted(
    small_tokenizer: Path, tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = lay_out(tmp_path / NAMES[layout], layout, [[3, 4], [], [5, EOS], [6]])
    manifest = import_tokens([path], TokenFormat(layout), small_tokenizer, tmp_path / "out").manifests["train"]
    assert documents_of(open_dataset(tmp_path / "out" / "train")) == [[3, 4, EOS], [5, EOS], [6, EOS]]
    assert manifest.dropped == {EMPTY_DOCUMENT: 1}
    assert "2 documents did not end in EOS (7) and were given one" in caplog.text
    assert [str(source) for source in manifest.shards[0].sources] == [f"{path} tokens 0-5"]


@pytest.mark.parametrize("layout", ["nanogpt", "npy"])
def test_files_without_boundaries(small_tokenizer: Path, tmp_path: Path, layout: str) -> None:
    paths = [lay_out(tmp_path / f"{number}{NAMES[layout]}", layout, DOCUMENTS[number:]) for number in (0, 2)]
    import_tokens(paths, TokenFormat(layout), small_tokenizer, tmp_path / "whole")
    streams = [[token for document in DOCUMENTS[number:] for token in document] for number in (0, 2)]
    assert documents_of(open_dataset(tmp_path / "whole" / "train")) == streams
    import_tokens(paths, TokenFormat(layout), small_tokenizer, tmp_path / "cut", split_at_eos=True)
    ends = [[5, 6, EOS], [EOS], [300, 2, EOS], [9, EOS], DOCUMENTS[3]]
    assert documents_of(open_dataset(tmp_path / "cut" / "train")) == [*ends, *ends[2:]]


def test_documents_of_several_sequences_and_wider_integers(small_tokenizer: Path, tmp_path: Path) -> None:
    """Megatron-LM may cut a document in sequences, sentences for example."""
    lay_out(tmp_path / "x.bin", "megatron", [[1, 2], [3], [4, 5], [6]], "<i8")
    raw = (tmp_path / "x.idx").read_bytes()
    borders = struct.pack("<3q", 0, 3, 4)
    (tmp_path / "x.idx").write_bytes(raw[:26] + struct.pack("<Q", 3) + raw[34 : 34 + 12 * 4] + borders)
    for name in ("x", "x.bin", "x.idx"):
        import_tokens([tmp_path / name], TokenFormat.MEGATRON, small_tokenizer, tmp_path / f"out-{name}")
        found = documents_of(open_dataset(tmp_path / f"out-{name}" / "train"))
        assert found == [[1, 2, 3, 4, 5, EOS], [6, EOS]]


@pytest.mark.parametrize(
    ("layout", "suffix", "change", "message"),
    [
        ("megatron", "bin", lambda raw: raw[:-2], "do not follow one another to their end"),
        ("megatron", "bin", lambda raw: raw[:-1], "not a multiple of 2"),
        ("megatron", "bin", lambda raw: raw + b"\1\0", "do not follow one another to their end"),
        ("megatron", "idx", lambda raw: raw[:-1], "do not fit its 2 sequences"),
        ("megatron", "idx", lambda raw: raw[:20], "no MMIDIDX"),
        ("megatron", "idx", lambda raw: b"", "no MMIDIDX"),
        ("megatron", "idx", lambda raw: b"X" + raw[1:], "no MMIDIDX"),
        ("megatron", "idx", lambda raw: raw[:17] + b"\7" + raw[18:], "of integers"),
        ("megatron", "idx", lambda raw: raw[:42] + b"\1" + raw[43:], "do not follow one another in the .bin"),
        ("megatron", "idx", lambda raw: raw[:-8] + b"\1" + raw[-7:], "belong to no document"),
        ("megatron", "idx", None, r"lacks .*x\.idx"),
        ("nanogpt", "bin", lambda raw: raw[:-1], "not a multiple of 2"),
        ("nanogpt", "bin", lambda raw: b"", "holds no token"),
        ("nanogpt", "bin", lambda raw: b"\xff\xff" * 40_000 + raw, "holds the token 65535, the tokenizer has"),
        ("datatrove", "ds", lambda raw: raw[:-2], "neither 2 nor 4 bytes"),
        ("datatrove", "ds", lambda raw: raw + b"\1\0", "do not follow one another to their end"),
        ("datatrove", "ds.index", lambda raw: raw[:-1], "not a multiple of 8"),
        ("datatrove", "ds.index", lambda raw: b"\x09" + raw[1:], "do not follow one another"),
        ("datatrove", "ds.index", None, r"lacks .*x\.ds\.index"),
        ("npy", "npy", lambda raw: raw[:-1], "cannot be read"),
        ("npy", "npy", lambda raw: b"", "cannot be read"),
        ("npy", "npy", lambda raw: raw.replace(b"<u2", b"<f2"), "not a vector of integers"),
        ("npy", "npy", lambda raw: raw.replace(b"(6,), }  ", b"(2, 3), }"), "not a vector of integers"),
        ("npy", "npy", None, "lacks"),
    ],
)
def test_damaged_files_are_refused(small_tokenizer: Path, tmp_path: Path, layout, suffix, change, message) -> None:
    path = lay_out(tmp_path / NAMES[layout], layout, [[5, 6, EOS], [300, 2, EOS]])
    damaged = tmp_path / f"x.{suffix}"
    if change is None:
        damaged.unlink()
    else:
        assert change(damaged.read_bytes()) != damaged.read_bytes()
        damaged.write_bytes(change(damaged.read_bytes()))
    with pytest.raises(InputError, match=message):
        import_tokens([path], TokenFormat(layout), small_tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_negative_tokens_and_needless_options_are_refused(small_tokenizer: Path, tmp_path: Path) -> None:
    path = lay_out(tmp_path / "x.bin", "megatron", [[5, -1, EOS]], "<i4")
    with pytest.raises(InputError, match="holds the token -1"):
        import_tokens([path], TokenFormat.MEGATRON, small_tokenizer, tmp_path / "out")
    path = lay_out(tmp_path / "y.bin", "megatron", [[5, EOS]])
    with pytest.raises(InputError, match="says itself where its documents end"):
        import_tokens([path], TokenFormat.MEGATRON, small_tokenizer, tmp_path / "out", split_at_eos=True)


def test_exports_that_cannot_be(dataset: Path, tmp_path: Path) -> None:
    pack(dataset, tmp_path / "packed", sequence_length=8)
    with pytest.raises(ShardError, match="is packed"):
        export_tokens(tmp_path / "packed", TokenFormat.NPY, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="not an empty folder"):
        export_tokens(dataset, TokenFormat.NPY, tmp_path / "packed")


def test_the_command_line(run, dataset: Path, tokenizer: Path, tmp_path: Path) -> None:
    code, out, err = run("export", dataset, "--to", "npy", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'out' / 'train.npy'}: " in out
    words = ["import", tmp_path / "out" / "train.npy", "--from", "npy", "--tokenizer", tokenizer]
    code, out, err = run(*words, "--split", "test", "--output", tmp_path / "in")
    assert (code, err) == (0, "")
    assert out == f"test: {len(DOCUMENTS)} documents, {sum(map(len, DOCUMENTS))} tokens\n"
    assert (tmp_path / "in" / "tokenizer" / "tokenizer.json").is_file()
    assert "nothing to do" in run(*words, "--split", "test", "--output", tmp_path / "in")[1]
    code, _, err = run(*words, "--split-at-eos", "--output", tmp_path / "new")
    assert code == 65
    assert "change:  leave --split-at-eos out" in err
    assert run("import", "x", "--from", "mds", "--tokenizer", tokenizer, "--output", tmp_path / "new")[0] == 64
