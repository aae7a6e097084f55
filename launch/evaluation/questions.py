"""The data of the task files beside it, for lm_eval's `custom_dataset`. Reads questions.jsonl; fetches nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(kind: str, **_: Any) -> dict[str, Any]:
    """The questions of one kind, as the split `test`."""
    from datasets import Dataset

    lines = (Path(__file__).parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    found = [question for question in map(json.loads, lines) if question["kind"] == kind]
    return {"test": Dataset.from_list(found)}
