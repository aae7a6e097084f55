"""The shipped DeepSpeed files: DeepSpeed's own keys only, and every key one that DeepSpeed knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig
from pretrain.engines.deepspeed_config import AUTO, OWNED_BY_RUN_CONFIG
from pretrain.engines.deepspeed_import import import_deepspeed
from pretrain.engines.deepspeed_refusals import REMOVED_KEYS, refused_keys

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
    # how to offload the optimizer is DeepSpeed's, whether is not
    own = [key.removeprefix("zero_optimization.").replace("offload_optimizer", "offload") for key in keys]
    assert not [key for key in own if any(word in key.lower() for word in OF_THE_RUN)]
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


def test_the_table_explains_every_file() -> None:
    table = (FILES[0].parent / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in FILES} == set(re.findall(r"^\| `([\w-]+\.json)` \|", table, re.MULTILINE))


def test_removed_keys_are_refused_with_what_to_use_instead() -> None:
    config = RunConfig.model_validate(
        {
            "name": "x",
            "model": {"model_type": "llama"},
            "data": {"train": "x"},
            "batch": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": 1},
        }
    )
    for key in REMOVED_KEYS:
        values: dict[str, Any] = {}
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = {"enabled": True}
        (problem,) = (found for found in refused_keys(values, "file.json", config) if found.found.startswith(key))
        assert "removed" in problem.found
        assert ";" in problem.change, f"{key}: no replacement is named"
