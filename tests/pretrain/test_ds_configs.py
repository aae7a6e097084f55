"""The shipped DeepSpeed files: DeepSpeed's own keys only, and every key one that DeepSpeed knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.engines.deepspeed_config import AUTO, OWNED_BY_RUN_CONFIG
from pretrain.engines.deepspeed_import import import_deepspeed

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
# Numbers of the run in whatever section, besides the list that the engine refuses.
OF_THE_RUN = ("batch", "lr", "learning", "warmup", "total_num_steps", "optimizer", "scheduler", "clipping", "enabled")


def dotted_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{key}.")
    return keys


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_there_is_a_file_for_every_stage() -> None:
    assert {path.stem for path in FILES} >= {"zero0", "zero1", "zero2", "zero3"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_number_of_the_run(path: Path) -> None:
    keys = dotted_keys(read(path))
    assert not [key for key in keys if key in OWNED_BY_RUN_CONFIG]
    assert not [key for key in keys if any(word in key.lower() for word in OF_THE_RUN)]
    assert AUTO not in json.dumps(read(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_knows_every_zero_key(path: Path) -> None:
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    given = read(path)["zero_optimization"]
    assert set(given) <= known
    DeepSpeedZeroConfig(**given)
