"""Says what a tokenizer was trained on and how many bytes its tokens stand for, source by source.

The numbers are tokenizer_training.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.tokenizer_training import Density, total_density


def describe_training(record: Mapping[str, Any]) -> str:
    """Return a table of the sources, their sum, and the size of the sample."""
    sample, corpus = record["sample"], record["corpus"]
    densities = [Density(**density) for density in record["densities"]]
    rows = [("source", "bytes", "tokens", "bytes per token", "of the reference")]
    for density in [*densities, *([total_density(densities)] if len(densities) > 1 else [])]:
        reference = density.reference_tokens
        per_token = f"{density.bytes / density.tokens:.3f}"
        beside = "" if reference is None else f"{density.bytes / reference:.3f}"
        rows.append((density.source, f"{density.bytes:,}", f"{density.tokens:,}", per_token, beside))
    shown = 5 if any(row[4] for row in rows[1:]) else 4
    widths = [max(len(row[column]) for row in rows) for column in range(shown)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[1:shown], widths[1:], strict=True)) for row in rows]
    lines = [f"{row[0]:<{widths[0]}}  {line}" for row, line in zip(rows, lines, strict=True)]
    lines.append(
        f"trained on {sample['documents']:,} of {corpus['documents']:,} documents, "
        f"{sample['bytes']:,} of {corpus['bytes']:,} bytes"
    )
    lines += [f"dropped {count:,} records: {reason}" for reason, count in record["dropped"].items()]
    return "\n".join(lines)
