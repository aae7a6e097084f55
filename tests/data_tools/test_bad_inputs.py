"""Damaged, mislabelled and hostile inputs: a clear error or the told policy, never a hang, never silent damage."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import feather, parquet

from data_tools.choices import BadLinePolicy
from data_tools.documents import BadRecord, Document, Keys
from data_tools.errors import InputError, UsageError
from data_tools.input_files import find_inputs
from data_tools.pieces import Piece
from data_tools.prepare import PrepareOptions, prepare
from data_tools.readers import open_piece
from data_tools.token_shards import open_dataset
from tests.data_tools.conftest import TEXT
from tests.data_tools.test_input_kinds import WRITERS

REPOSITORY = Path(__file__).parents[2]
SKIP = PrepareOptions(fractions=(1.0,), on_bad_line=BadLinePolicy.SKIP)
ROWS = [(f"{number} {text}", str(number)) for number, text in enumerate(TEXT * 20)]


def read(path: Path, **keys: int) -> tuple[list[str], list[str]]:
    """Return the texts, and the bad records as they are told."""
    records = list(open_piece(Piece(file=path), Keys(**keys)).documents())  # type: ignore[arg-type]
    good = [record.text for record in records if isinstance(record, Document)]
    return good, [str(record).removeprefix(str(path)) for record in records if isinstance(record, BadRecord)]


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith(("jsonl", "json", "csv"))])
@pytest.mark.parametrize("left", [0.98, 0.5, 0.01])
def test_a_truncated_file(tmp_path: Path, tokenizer_folder: Path, name: str, left: float) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(InputError, match=f"{name} cannot be (decompressed|read as)"):
        prepare([path], tokenizer_folder, tmp_path / "out", SKIP)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_truncated_txt_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name, content in (
        ("a.txt.gz", gzip.compress(b"text" * 999)),
        ("a.txt.zst", pyarrow.compress(b"text" * 999, "zstd", asbytes=True)),
    ):
        (tmp_path / name).write_bytes(content[:-6])
        with pytest.raises(InputError, match=f"{name} cannot be decompressed"):
            prepare([tmp_path / name], tokenizer_folder, tmp_path / "out", SKIP)


GZIP = gzip.compress(b'{"text": "a"}\n')
MISLABELLED = {
    "a.jsonl": (GZIP, "it is a gzip file"),
    "a.jsonl.gz": (b'{"text": "a"}\n', "it is not a gzip file"),
    "a.csv.zst": (GZIP, "it is a gzip file"),
    "a.csv": (b"PAR1\x15\x04" + b"\0" * 20, "it is a parquet file"),
    "a.txt": ("text".encode("utf-16"), "text in UTF-16"),
    "b.txt": (b"PK\x03\x04" + b"\0" * 20, "it is a zip archive"),
    "a.parquet": (b'{"text": "a"}\n' * 9, "cannot be read as parquet"),
    "a.json": (b'\n[\n {"text": "a"}\n]\n', "it is a JSON array, not lines of JSON"),
    "b.parquet": (b"", "cannot be read as parquet"),
    "a.arrow": (b'{"text": "a"}\n' * 9, "cannot be read as arrow"),
}


@pytest.mark.parametrize("name", MISLABELLED)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    content, message = MISLABELLED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} .*{message}"):
        prepare([tmp_path / name], tokenizer_folder, tmp_path / "out", SKIP)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "a.jsonl.bz2", "a.parquet.gz", "jsonl"])
def test_archives_and_unknown_kinds_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """No archive is ever opened, so that none can name a path outside its folder."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="ends in none of the known ways"):
        find_inputs([tmp_path / name])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv.zst", "a.txt", "a.txt.gz"])
def test_an_empty_file_holds_no_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert find_inputs([tmp_path / name])
    good, bad = read(tmp_path / name)
    assert not good
    assert bad == ([":1: empty text"] if ".txt" in name else [])


def test_tables_without_rows(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("a.parquet", "a.feather", "a.arrow"):
        WRITERS[name](tmp_path / name, [("x", "y")])
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    parquet.write_table(empty, tmp_path / "a.parquet")
    feather.write_feather(empty, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        with pytest.raises(InputError, match="the inputs hold no document"):
            prepare([tmp_path / name], tokenizer_folder, tmp_path / "out", SKIP)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "a.csv").write_bytes(mark + b"text,id\r\none,1\r\n\r\ntwo,2\r\n")
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    assert read(tmp_path / "a.jsonl") == (["one", "two"], [])
    assert read(tmp_path / "a.csv") == (["one", "two"], [])
    assert read(tmp_path / "a.txt") == (["one"], [])
    first = next(iter(open_piece(Piece(file=tmp_path / "a.jsonl")).documents()))
    assert isinstance(first, Document)
    assert (first.start, first.stop) == (0, 20)


def test_nul_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\u0000b"}\n{"text": "a\0b"}\n\0\0\0\n{"text": "c"}\n')
    good, bad = read(tmp_path / "a.jsonl")
    assert good == ["a\0b", "c"]
    assert [told.split(" (")[0] for told in bad] == [":2: not JSON", ":3: not JSON"]
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    assert read(tmp_path / "a.txt") == (["a\0b"], [])


def test_csv_rows_that_are_none(tmp_path: Path) -> None:
    content = (
        b"id,text\n"
        b"1,one\n"
        b"2\n"  # line 3
        b"3,too,many\n"
        b'4,"a\nb"\n'  # lines 5 and 6
        b'5,"bad" quote\n'  # line 7
        b"6,caf\xe9 in Latin-1\n"
        b'7,"over\ntwo caf\xe9"\n'  # lines 9 and 10
        b"8,\n"
        b"9,nine\n"
        b'10,"never closed\nand on\n'  # line 13
    )
    (tmp_path / "a.csv").write_bytes(content)
    good, bad = read(tmp_path / "a.csv")
    assert good == ["one", "a\nb", "nine"]
    assert bad == [
        ":3: ragged row (1 fields, the header has 2)",
        ":4: ragged row (3 fields, the header has 2)",
        ":7: not CSV (',' expected after '\"')",
        ":8: not UTF-8 (byte 0xe9 at 5)",
        ":9: not UTF-8 (byte 0xe9 at 7)",
        ":11: empty text",
        ":13: not CSV (unexpected end of data)",
    ]
    documents = [d for d in open_piece(Piece(file=tmp_path / "a.csv")).documents() if isinstance(d, Document)]
    assert content[documents[1].start : documents[1].stop] == b'4,"a\nb"\n'


def test_a_csv_header_that_is_none(tmp_path: Path) -> None:
    for content in (b"id,body\n1,x\n", b"text,text\nx,y\n", b"caf\xe9,text\n1,x\n", b'"text\n'):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(InputError, match="a.csv: its first line does not name 'text' once"):
            read(tmp_path / "a.csv")


def test_a_quote_that_is_not_closed_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    rows = "".join(f"{number},row {number}\n" for number in range(1000))
    (tmp_path / "a.csv").write_text(f'id,text\n1,"open\n{rows}')
    good, bad = read(tmp_path / "a.csv", longest_bytes=500)
    assert bad == [":2: too long (more than 500 bytes, or a quote that is not closed)"]
    assert len(good) > 900
    assert good[-1] == "row 999"


def test_cells_that_are_no_text(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"caf\xe9", b"", None, b"end"], pyarrow.binary())
    texts = pyarrow.StringArray.from_buffers(5, *raw.buffers()[1:], raw.buffers()[0])
    for name, write in (("a.arrow", feather.write_feather), ("a.parquet", parquet.write_table)):
        write(pyarrow.table({"text": texts}), tmp_path / name)
        good, bad = read(tmp_path / name)
        assert good == ["good", "end"]
        assert bad == [
            " row 2: not UTF-8 (byte 0xe9 at 3)",
            " row 3: empty text",
            " row 4: text is not a string ('text' is of type NoneType)",
        ]
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[1][0] == " row 1: text is not a string ('text' is of type int)"


@pytest.mark.parametrize("name", [*WRITERS, "a.txt", "a.txt.gz"])
def test_a_document_beyond_the_limit_is_a_bad_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write: dict[str, Callable[[], object]] = {
        "a.txt": lambda: path.write_bytes(b"x" * 2000),
        "a.txt.gz": lambda: path.write_bytes(gzip.compress(b"x" * 2000)),
    }
    write.get(name, lambda: WRITERS[name](path, [("good", "1"), ("x" * 1980, "2"), ("end", "3")]))()
    good, bad = read(path, longest_bytes=1000)
    assert good == ([] if "txt" in name else ["good", "end"])
    assert len(bad) == 1
    assert "too long" in bad[0]
    assert "1,000" in bad[0]
    assert not read(path, longest_bytes=2005)[1]


HUGE = """
import resource, sys
from pathlib import Path
from data_tools.choices import BadLinePolicy
from data_tools.prepare import PrepareOptions, prepare
source, tokenizer, output = map(Path, sys.argv[1:])
options = PrepareOptions(fractions=(1.0,), on_bad_line=BadLinePolicy.QUARANTINE)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = prepare([source], tokenizer, output, options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, dict(made.manifests["train"].dropped))
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_line_of_200_mb_is_passed_in_fixed_memory(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    path = tmp_path / name
    is_csv = name == "a.csv"
    with gzip.open(path, "wb", compresslevel=1) if name.endswith(".gz") else path.open("wb") as file:
        file.write(b"text\ngood\n" if is_csv else b'{"text": "good"}\n{"text": "')
        for _ in range(200):
            file.write(b"0123456 " * (1 << 17))
        file.write(b"\nend\n" if is_csv else b'"}\n{"text": "end"}\n')
    words = [sys.executable, "-c", HUGE, path, tokenizer_folder, tmp_path / "out"]
    said = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=600).stdout
    grown, dropped = said.split(" ", 1)
    assert dropped.strip() == "{'too long': 1}"
    assert int(grown) < 120  # MB: far below the line
    assert open_dataset(tmp_path / "out" / "train").manifest.documents == 2
    (kept,) = (json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert kept["line"] == (3 if is_csv else 2)
    assert len(kept["raw"]) < 10_000


def test_a_wrong_key_is_told_with_the_keys_there_are(tmp_path: Path, tokenizer_folder: Path) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", ROWS)
    with pytest.raises(InputError, match=r"a.jsonl:1: no text key \('body' is not among id, text\)"):
        prepare([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "out", PrepareOptions(text_key="body"))
