"""Memory of an export and an import: how far a process grows over its start, against the model's largest tensor.

    python -m tests.benchmarks.export --preset llama-1b

A checkpoint of random fp32 weights is made, exported as bf16, and the folder imported again, each in a process of its
own. Needs free disk of some eleven bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from pretrain.checkpoint.fragments import MASTER, Fragment, element_count, whole_box
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import ModelSection
from pretrain.export import export_source
from pretrain.import_folder import import_folder
from pretrain.models.build import build_on_meta
from pretrain.models.configuration import resolve_model_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--act", choices=("make", "export", "import"))
    parser.add_argument("--place", type=Path)
    words = parser.parse_args()
    if words.act:
        print(json.dumps(act(words.act, words.place, words.preset)))
        return
    place = Path(tempfile.mkdtemp(prefix="export-benchmark-"))
    try:
        print("| act | seconds | grew by (GB) | largest tensor (GB) | ratio |\n|---|---:|---:|---:|---:|")
        for name in ("make", "export", "import"):
            command = [sys.executable, "-m", "tests.benchmarks.export", "--preset", words.preset]
            done = subprocess.run(
                [*command, "--act", name, "--place", str(place)], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = found["grown"] / found["largest"]
            print(
                f"| {name} | {found['seconds']:.0f} | {found['grown'] / 1e9:.3f} | {found['largest'] / 1e9:.3f} "
                f"| {ratio:.2f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(place)


def act(name: str, place: Path, preset: str) -> dict[str, float]:
    """Do it, and measure this process. Of `make` the largest tensor counts in fp32, else as stored, in bf16."""
    config = resolve_model_config(ModelSection(preset=preset), sequence_length=8, attention="auto")
    shapes = {key: tuple(weight.shape) for key, weight in build_on_meta(config).named_parameters()}
    before, began = peak_bytes(), time.monotonic()
    if name == "make":
        CheckpointStore(place / "run" / "checkpoints", asynchronous=False, file_bytes=64 << 20).save(
            1,
            random_fragments(shapes),
            scalars={},
            progress={"step": 1},
            metadata={"parameters": shapes, "model_config": config.to_dict()},
        )
    elif name == "export":
        export_source(place / "run", place / "exported", check="tensors")
    else:
        import_folder(place / "exported", place / "imported")
    largest = max(map(element_count, shapes.values())) * (4 if name == "make" else 2)
    return {"seconds": time.monotonic() - began, "grown": peak_bytes() - before, "largest": largest}


def random_fragments(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fragment]:
    """A tensor at a time."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        values = torch.empty(element_count(shape)).normal_(0, 0.02, generator=generator)
        yield Fragment(name=name, kind=MASTER, shape=shape, box=whole_box(shape), start=0, values=values)


def peak_bytes() -> int:
    """Most memory that this process has held, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
