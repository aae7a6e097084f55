"""Every recipe for GPU nodes trains two steps on CPU ranks: its own layout, smaller, on a model of the same kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig, load_config
from tests.architecture.recipe_table import RECIPES, world_size_of
from tests.distributed.ranks import REPOSITORY, run_on_ranks

pytestmark = pytest.mark.launch

LONGEST_AXIS = 2  # ranks of a tensor group, stages of a pipeline
STEPS = 2
FILES = sorted((RECIPES / "a100").glob("*.yaml"))
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
SMALL_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def shrunken(config: RunConfig) -> tuple[int, dict[str, Any]]:
    """Ranks, and what to override so that they can run the recipe."""
    parallel = config.parallel
    sizes = {axis: min(getattr(parallel, axis), LONGEST_AXIS) for axis in ("tensor", "pipeline", "sequence", "expert")}
    group = sizes["tensor"] * sizes["pipeline"] * sizes["sequence"]
    data = 2 if group == 1 else 1
    model = SMALL | (SMALL_EXPERTS if "moe" in str(config.model.preset) or "a3b" in str(config.model.preset) else {})
    return group * data, {
        **{f"model.{key}": value for key, value in model.items()},
        **{f"parallel.{axis}": size for axis, size in sizes.items()},
        "batch.sequence_length": 64,
        "batch.global_batch_size": config.batch.micro_batch_size * data * 2,
        "schedule.total_tokens": "null",
        "schedule.total_steps": STEPS,
        "schedule.warmup_steps": 1,
        "reporting.mlflow": "false",
        "reporting.tensorboard": "false",
        "reporting.every_steps": 1,
    }


def test_there_is_a_recipe_for_every_size() -> None:
    nodes = {}
    for file in FILES:
        nodes.setdefault(file.stem.rsplit("-", 2)[0], set()).add(world_size_of(file) // 8)
    assert {"llama-1b", "llama-7b", "llama-13b", "llama-70b", "qwen3-30b-a3b"} <= set(nodes)
    assert all(found == {1, 4, 16, 64} for found in nodes.values())


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    """Kind of layout -> the lines of its metrics."""
    return {}


@pytest.mark.parametrize("recipe", FILES, ids=lambda path: path.stem)
def test_recipe_trains_when_it_is_shrunken(
    recipe: Path,
    trained: dict[str, list[dict[str, Any]]],
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ranks, overrides = shrunken(load_config(recipe))
    config = load_config(recipe)
    # recipes of one layout differ in names and batches alone: each layout runs once
    kind = json.dumps([ranks, overrides, config.parallel.model_dump(), config.execution.model_dump()], default=str)
    lines = _train(trained, kind, recipe, ranks, tuple(overrides.items()), tiny_dataset, tmp_path_factory)
    assert [line["step"] for line in lines if "loss" in line] == [1, STEPS]
    assert lines[-1].get("skipped", 0) == 0


def _train(
    trained: dict[str, list[dict[str, Any]]],
    kind: str,
    recipe: Path,
    ranks: int,
    overrides: tuple[tuple[str, Any], ...],
    dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    if kind not in trained:
        folder = tmp_path_factory.mktemp("recipe")
        words = [f"{key}={value}" for key, value in overrides]
        words += [f"data.train={dataset}", f"data.validation.main={dataset}", f"run_folder={folder / 'run'}"]
        run_on_ranks(ranks, train, str(recipe), words, deadline_seconds=500)
        text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
        trained[kind] = [json.loads(line) for line in text.splitlines()]
    return trained[kind]


def train(recipe: str, overrides: list[str]) -> None:
    import os

    from pretrain.__main__ import run_command_line

    os.chdir(REPOSITORY)  # recipes name ds_configs/ relative to it
    assert run_command_line(["train", recipe, *overrides]) == 0
