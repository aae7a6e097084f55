"""Inputs cut in tasks: every record belongs to one piece, however they are cut."""

from __future__ import annotations

from pathlib import Path

from data_tools.documents import Document
from data_tools.pieces import Piece
from data_tools.ranges import plan_tasks
from data_tools.readers import open_piece
from tests.data_tools.conftest import TEXT, write_lines


def test_ranges_hold_every_line_once(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [*TEXT, "x" * 5000, "end"])
    expected = [record for record in open_piece(Piece(file=source)).documents()]
    size = source.stat().st_size
    for step in [1, 7, 100, 997, size - 1, size, size + 1]:
        found = []
        for task in plan_tasks([Piece(file=source)], step) if step > 1 else plan_tasks([Piece(file=source)], 50):
            for piece in task.pieces:
                found += list(open_piece(piece).documents())
        assert found == expected
        assert all(isinstance(record, Document) for record in found)


def test_small_files_share_a_task_and_compressed_ones_do_not(tmp_path: Path) -> None:
    sizes = {"a.txt": 30, "b.txt": 30, "c.jsonl": 250, "d.jsonl.gz": 5, "e.txt": 5, "f.txt": 500, "g.txt": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    tasks = plan_tasks([Piece(file=tmp_path / name) for name in sizes], 100)
    names = [" ".join(str(piece).replace(f"{tmp_path}/", "") for piece in task.pieces) for task in tasks]
    assert names == [
        "a.txt b.txt",
        "c.jsonl bytes 0-100",
        "c.jsonl bytes 100-200",
        "c.jsonl bytes 200-250",
        "d.jsonl.gz",
        "e.txt",
        "f.txt",
        "g.txt",
    ]
    assert [task.disk_bytes for task in tasks] == [60, 100, 100, 50, 5, 5, 500, 0]
