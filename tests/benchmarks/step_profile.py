"""Where the host waits in the training loop, and how much Python a step takes with more and more parameters.

    python -m tests.benchmarks.step_profile DATASET FOLDER [--only WORD ...]

A whole `pretrain train` (loader, loop, engine, guard) takes steps without reports, of models with 4 and 12 layers.
Counts, no times: calls of Python functions a step by package, the functions whose calls grow most, and every place
where a tensor became a Python number. Calls inside the own forward and backward of the network are left out.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.launch import jobs
from tests.pretrain.engines.host_reads import CountReads

FIRST_STEP, STEPS = 4, 8  # profiled; as many again are watched for reads
FEW, MANY = 4, 12  # layers
PACKAGES = ("pretrain", "deepspeed", "accelerate", "torch")
OF_THE_NETWORK = ("/transformers/", "/torch/nn/modules/", "/pretrain/models/", "/torch/utils/checkpoint")


@dataclass(frozen=True)
class Variant:
    name: str
    ranks: int
    overrides: tuple[str, ...]


VARIANTS = (
    Variant("plain", 1, ("parallel.engine=plain",)),
    Variant("accelerate DDP x2", 2, ("parallel.engine=accelerate",)),
    Variant("accelerate FSDP2 x2", 2, ("parallel.engine=accelerate", "parallel.data_parallel=shard")),
    *(Variant(f"zero {stage} x2", 2, ("parallel.engine=zero", f"parallel.zero_stage={stage}")) for stage in range(4)),
    Variant("pipeline 2", 2, ("parallel.pipeline=2",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="words of which a variant's name holds at least one")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS:
        if any(word in variant.name for word in arguments.only):
            few, many = (measure(variant, arguments.dataset, arguments.folder, layers) for layers in (FEW, MANY))
            tell(variant, few, many)


def measure(variant: Variant, dataset: Path, folder: Path, layers: int) -> dict[str, Any]:
    """Of rank 0: calls a step by function, and places of reads a step."""
    name = f"{variant.name.replace(' ', '-')}-{layers}"
    path = jobs.write_tiny_run(
        folder / f"{name}.yaml",
        data=dataset,
        schedule={"name": "cosine", "total_steps": FIRST_STEP + 2 * STEPS + 1},
        reporting={"mlflow": False, "tensorboard": False, "every_steps": 1000},
        checkpoint={"canary": False},
    )
    found = folder / f"{name}.json"
    torchrun = [jobs.SCRIPTS / "torchrun", "--nproc-per-node", str(variant.ranks), "--master-addr", "127.0.0.1"]
    words = ["--master-port", jobs.free_port(), "-m", "tests.benchmarks.step_profile", "--rank", str(found), str(path)]
    overrides = [*variant.overrides, f"model.num_hidden_layers={layers}"]
    jobs.run([*torchrun, *words, *overrides], log=path.with_suffix(".log"), deadline_seconds=900)
    return dict(json.loads(found.read_text(encoding="utf-8")))


def tell(variant: Variant, few: dict[str, Any], many: dict[str, Any]) -> None:
    """One block: calls by package at both sizes, what grows, and reads."""
    grown = Counter(many["calls"])
    grown.subtract(few["calls"])
    by_package = {
        package: tuple(sum(n for at, n in found["calls"].items() if at.startswith(package)) for found in (few, many))
        for package in PACKAGES
    }
    numbers = ", ".join(f"{package} {small:.0f} -> {large:.0f}" for package, (small, large) in by_package.items())
    print(f"{variant.name}: Python calls a step with {FEW} -> {MANY} layers: {numbers}", flush=True)
    for place, count in grown.most_common(4):
        if count > 0:
            print(f"    grows by {count / (MANY - FEW):.1f} a layer: {place}")
    for place, count in sorted(Counter(many["reads"]).items()):
        print(f"    reads {count:.1f} a step ({few['reads'].get(place, 0):.1f} with {FEW} layers): {place}")


def profile_rank(found: Path, arguments: list[str]) -> int:
    """On a rank: train, and write what its steps did."""
    from pretrain import run, run_parts

    build_engine = run_parts.build_engine
    profile, reads = cProfile.Profile(), CountReads()

    def watched(*given: Any, **named: Any) -> Any:
        engine = build_engine(*given, **named)
        train_step = engine.train_step

        def take(micro_batches: Any, step: int) -> Any:
            if step == FIRST_STEP:
                profile.enable()
            if step == FIRST_STEP + STEPS:
                profile.disable()
                reads.__enter__()
            if step == FIRST_STEP + 2 * STEPS:
                reads.__exit__(None, None, None)
            return train_step(micro_batches, step)

        engine.train_step = take
        return engine

    run_parts.build_engine = watched
    code = run.train(Path(arguments[0]), arguments[1:], "never")
    if os.environ.get("RANK", "0") == "0":
        calls: Counter[str] = Counter()
        for (file, _, function), (_, count, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
            package = next((name for name in PACKAGES if f"/{name}/" in file), None)
            if package and not any(part in file for part in OF_THE_NETWORK):
                calls[f"{package}{file.rpartition(f'/{package}')[2]}:{function}"] += count / STEPS
        places = {place: count / STEPS for place, count in Counter(reads.places).items()}
        found.write_text(json.dumps({"calls": calls, "reads": places}), encoding="utf-8")
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(profile_rank(Path(sys.argv[2]), sys.argv[3:]))
    main()
