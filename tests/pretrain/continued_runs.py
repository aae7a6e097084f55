"""Runs that begin with an imported model, with and without adapters. Every function may run on ranks."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from pretrain import distributed
from pretrain.checkpoint.run_lock import hold_run_folder
from pretrain.import_folder import import_folder
from pretrain.run_parts import open_parts
from pretrain.run_plan import load_and_plan
from pretrain.run_training import train_parts
from pretrain.training.phases import Phases
from pretrain.training.stopping import StopRequest
from tests.pretrain.data.datasets import write_documents
from tests.pretrain.round_trip import save_model

LENGTH = 32  # tokens of a row
STEPS = 6


def prepare(folder: Path, family: str = "llama", **lora: object) -> Path:
    """An imported random model, rows that can be learnt, and a run file; with `lora`, of adapters."""
    if not (folder / "imported").exists():
        save_model(family, folder / "original")
        import_folder(folder / "original", folder / "imported")
        documents = [[(3 * number + 7 * place) % 300 + 1 for place in range(LENGTH)] for number in range(60)]
        write_documents(folder / "data" / "train", documents, vocabulary_size=320)
        write_documents(folder / "data" / "validation", documents[:8], vocabulary_size=320, split="validation")
    run = {
        "name": "continued",
        "seed": 1,
        "model": {"weights": str(folder / "imported"), **({"lora": lora} if lora else {})},
        "data": {"train": str(folder / "data"), "validation": {"main": str(folder / "data")}},
        "batch": {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"name": "constant", "total_steps": STEPS},
        "precision": "fp32",
        "checkpoint": {"every_steps": 3},
        "reporting": {"mlflow": False, "tensorboard": False, "console": False},
    }
    path = folder / ("lora.yaml" if lora else "full.yaml")
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def train_run(path: str, run_folder: str, overrides: list[str]) -> list[float]:
    """Train on the ranks of this group; the loss of every step, and of the validation at the end."""
    place = distributed.read_place()
    config, plan = load_and_plan(Path(path), [f"run_folder={run_folder}", *overrides], place.world_size)
    config.folder.mkdir(parents=True, exist_ok=True)
    with hold_run_folder(config.folder) as is_ours:
        stop = StopRequest(distributed.any_rank)
        parts, checkpoint = open_parts(config, plan, place, "auto", stop=stop, phases=Phases(), is_ours=is_ours)
        train_parts(parts, checkpoint)
    lines = [json.loads(line) for line in (Path(run_folder) / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == list(range(1, len(losses) + 1))
    validated = [line["validation/main/loss"] for line in lines if "validation/main/loss" in line]
    return [*losses.values(), validated[-1]]
