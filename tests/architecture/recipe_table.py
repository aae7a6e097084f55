"""Prints the recipes for nodes of 8 A100, their layouts and predicted memory as Markdown, for the README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pretrain.config import RunConfig, load_config
from pretrain.run_plan import RunPlan, plan_run
from tests.architecture.source_files import REPOSITORY

RECIPES = REPOSITORY / "launch" / "recipes"
GIB = 2**30


def world_size_of(recipe: Path) -> int:
    """Ranks that a recipe is made for, as its first line says; 2 where it does not."""
    named = re.search(r"^# World size: (\d+)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    return int(named[1]) if named else 2


def reason_of(recipe: Path) -> str:
    """The paragraph of a recipe that begins with "Why"."""
    told = re.search(r"^# Why: (.*\n(?:# (?!Checked).*\n)*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    assert told, f"{recipe} gives no reason"
    return told[1].replace("\n# ", " ").strip()


def layout_of(config: RunConfig, plan: RunPlan) -> str:
    """The parts of a layout that differ from plain data parallelism."""
    topology, parallel = plan.topology, config.parallel
    words = [f"{axis} {topology.size(axis)}" for axis in ("tensor", "pipeline", "sequence") if topology.size(axis) > 1]
    words += [f"expert {parallel.expert}"] if parallel.expert > 1 else []
    words += [f"data {topology.data}", f"ZeRO {parallel.zero_stage}"]
    words += ["optimizer on the host"] if parallel.offload_optimizer != "none" else []
    words += [f"recomputation {config.execution.recomputation}"] if config.execution.recomputation != "none" else []
    return ", ".join(words)


def rows() -> Iterator[str]:
    recipes = sorted((RECIPES / "a100").glob("*.yaml"), key=lambda path: (_model(path), world_size_of(path)))
    for recipe in recipes:
        ranks = world_size_of(recipe)
        config = load_config(recipe)
        plan = plan_run(config, ranks)
        memory = f"{plan.memory.total / GIB:.0f}"
        if plan.memory.host:
            memory += f" + {plan.memory.host * 8 / GIB:,.0f} a node"
        batch = f"{plan.batch.micro_batch_size} x {plan.batch.accumulation}"
        cells = [_model(recipe), str(ranks // 8), layout_of(config, plan), batch, memory, reason_of(recipe)]
        yield f"| {' | '.join(cells)} |"


def _model(recipe: Path) -> str:
    return re.sub(r"-\d+-nodes?$", "", recipe.stem)


def main() -> None:
    print("| model | nodes | layout | rows x micro-batches | GiB a GPU | why |")
    print("|---|---:|---|---|---:|---|")
    for row in rows():
        print(row)


if __name__ == "__main__":
    main()
