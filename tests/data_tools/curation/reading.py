"""Reads what a curation has written."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import zstandard


def records(output: Path) -> list[dict[str, Any]]:
    """The documents of an output, in order."""
    lines: list[bytes] = []
    for path in sorted(output.glob("*.jsonl.*")):
        content = path.read_bytes()
        whole = gzip.decompress(content) if path.suffix == ".gz" else _unpacked(content)
        lines += whole.splitlines()
    return [json.loads(line) for line in lines]


def hashes(output: Path) -> dict[str, str]:
    """The hash of every file but the report, which says how long the steps took."""
    files = (path for path in sorted(output.iterdir()) if path.name != "report.html")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _unpacked(content: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(content)
