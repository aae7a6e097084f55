"""Small logical states for checkpoint tests, cut into fragments as ranks of any layout would hold them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.fragments import KINDS, Fragment, whole_box
from pretrain.checkpoint.store import CheckpointStore

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    "layer.weight": (7, 3, 2),
    "norm.weight": (6,),
    "scale": (),
}
State = dict[tuple[str, str], torch.Tensor]


def make_state(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> State:
    """A tensor for every parameter and kind."""
    generator = torch.Generator().manual_seed(seed)
    return {(name, kind): torch.randn(shape, generator=generator) for name, shape in shapes.items() for kind in KINDS}


def whole_fragments(state: State) -> Iterator[Fragment]:
    """Every tensor in one piece, as one plain process holds it."""
    for (name, kind), tensor in state.items():
        shape = tuple(tensor.shape)
        yield Fragment(
            name=name, kind=kind, shape=shape, box=whole_box(shape), start=0, values=tensor.reshape(-1).clone()
        )


def cut_fragments(state: State, seed: int) -> list[Fragment]:
    """Every tensor in a grid of boxes, every box in runs, in no order."""
    chooser = random.Random(seed)
    fragments = []
    for (name, kind), tensor in state.items():
        axes = [_intervals(length, chooser) for length in tensor.shape]
        for box in itertools.product(*axes):
            flat = tensor[tuple(slice(*edges) for edges in box)].reshape(-1)
            for start, stop in _intervals(flat.numel(), chooser):
                values = flat[start:stop].clone()
                shape = tuple(tensor.shape)
                fragments.append(Fragment(name=name, kind=kind, shape=shape, box=box, start=start, values=values))
    chooser.shuffle(fragments)
    return fragments


def save_state(store: CheckpointStore, step: int, state: State, **changes: Any) -> Path:
    """Save a state in whole tensors with the smallest metadata."""
    return store.save(step, **_stored(step, state, changes))


def begin_save(store: CheckpointStore, step: int, state: State, **changes: Any) -> None:
    """As `save_state`, without waiting."""
    store.begin(step, **_stored(step, state, changes))


def _stored(step: int, state: State, changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "fragments": whole_fragments(state),
        "scalars": {"optimizer_steps": step},
        "progress": {"step": step},
        "metadata": {"parameters": {name: tuple(tensor.shape) for (name, _), tensor in state.items()}},
    } | changes


def assert_holds(checkpoint: Any, state: State) -> None:
    """Every tensor of the checkpoint equals the state's, bit for bit."""
    for (name, kind), tensor in state.items():
        assert torch.equal(checkpoint.read(name, kind), tensor), (name, kind)


def flip_byte(path: Path, position: int) -> None:
    """Change one byte in the middle of a file, keeping its size."""
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


def _intervals(length: int, chooser: random.Random) -> list[tuple[int, int]]:
    """Consecutive parts of [0, length)."""
    cuts = sorted(chooser.sample(range(1, length), min(chooser.randint(0, 3), length - 1))) if length > 1 else []
    return list(itertools.pairwise([0, *cuts, length]))
