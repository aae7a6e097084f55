"""The reporter of a run: under which names trackers know it, and what they are told of it at every start.

Part of the composition root (run.py). Where numbers go is reporting/'s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from pretrain.checkpoint.reader import Checkpoint
from pretrain.data.open_datasets import OpenedData
from pretrain.reporting.reporter import Reporter, build_reporter
from pretrain.reporting.run_facts import RunFacts, environment_facts, git_facts, joined
from pretrain.reporting.tracker_state import child_state
from pretrain.run_parts import RunParts
from pretrain.training.progress import Progress
from pretrain.yaml_text import write_yaml

MANIFEST = "manifest.json"


def build_run_reporter(parts: RunParts, progress: Progress, checkpoint: Checkpoint | None) -> Reporter:
    """The reporter of this rank. A checkpoint from outside the run's own is another run's: this one is its child."""
    config, place = parts.config, parts.place
    state = dict(checkpoint.manifest.metadata.get("trackers", {})) if checkpoint else {}
    if checkpoint and checkpoint.path.resolve().parent != parts.store.folder.resolve():
        state = child_state(state, checkpoint.path)

    def collect() -> RunFacts:
        return joined(git_facts(Path(__file__).parent), environment_facts(), _run_facts(parts))

    return build_reporter(
        config,
        config.folder,
        is_main_process=place.is_main_process,
        resume_from=progress.step if checkpoint else None,
        tracker_state=state,
        collect_facts=collect,
        node=place.rank // place.local_world_size,
        nodes=-(-place.world_size // place.local_world_size),
        is_first_of_node=place.local_rank == 0,
    )


def _run_facts(parts: RunParts) -> RunFacts:
    plan, topology = parts.plan, parts.plan.topology
    tags = {
        "mlflow.source.name": " ".join(sys.argv),
        "mlflow.source.type": "JOB",
        "athanor.engine": plan.engine,
        "athanor.layout": f"{parts.place.world_size} ranks: pipeline {topology.pipeline}, data {topology.data}, "
        f"sequence {topology.sequence}, expert {topology.expert}, tensor {topology.tensor}",
        "athanor.parameters": str(plan.parameters.total),
    }
    settings = parts.config.model_dump(mode="json")
    settings["reporting"].pop("mlflow_uri")  # may hold a password
    return RunFacts(tags=tags, texts={"config.yaml": write_yaml(settings), **_data_manifests(parts.data)})


def _data_manifests(data: OpenedData) -> Mapping[str, str]:
    named = {f"data/train/{source.name}": source for source in data.training}
    named |= {f"data/validation/{name}": source for name, source in data.validation.items()}
    texts = {}
    for name, source in named.items():
        path = source.dataset.folder / MANIFEST
        if path.is_file():
            texts[f"{name}.json"] = path.read_text(encoding="utf-8")
    return texts
