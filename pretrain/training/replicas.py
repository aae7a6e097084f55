"""Whether ranks that must hold the same state hold the same bits: silent corruption, drift, a collective gone astray.

Which tensors must be equal the engine says, when to look health.py. A difference ends the run: no rank can be trusted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pretrain.distributed import gather_json
from pretrain.engines.base import Replica
from pretrain.errors import Problem, ReplicaError

CHUNK_ELEMENTS = 1 << 22  # summed at a time, as 64-bit numbers


def require_equal_replicas(replicas: Iterable[Replica], step: int) -> None:
    """Compare all that ranks hold in common. Every rank must call; the host waits for the device.

    Ranks exchange one number a group of tensors; only where one differs, one a tensor.

    Raises:
        ReplicaError: on all ranks, with the tensors and the ranks that differ.
    """
    held = list(replicas)
    own = _by_tensor(held)
    combined: dict[str, int] = {}
    for group in ("whole", "sliced"):
        names = {name: value for name, value in own.items() if name.startswith(group)}
        if names:
            # ranks that hold the same tensors and the same slices of them share a key
            key = f"{group} {hash_of(sorted(names))}"
            combined[key] = hash_of([str(names[name]) for name in sorted(names)])
    if not _disagreements(gather_json(combined)):
        return
    differences = _disagreements(gather_json(own))
    found = [f"{name.split(' ', 1)[1]} on {_ranks(values)}" for name, values in differences.items()]
    shown = "; ".join(found[:4]) + f"; and {len(found) - 4} more tensors" * (len(found) > 4)
    raise ReplicaError(
        Problem(
            f"after step {step} ranks that must hold the same bits differ: {shown}",
            "equal weights on all ranks that share them",
            "test the memory and the GPU of those ranks' machines, leave them out, and go on from a checkpoint before "
            "the fault (--resume PATH): the newest may hold it. guard.compare_replicas_every_steps: how often to look",
        )
    )


def fingerprint(values: torch.Tensor) -> torch.Tensor:
    """A number (int64, on the device) that changes with any bit, and with the order of elements."""
    flat = values.detach().contiguous().view(-1)
    bits = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), CHUNK_ELEMENTS):
        part = bits[start : start + CHUNK_ELEMENTS].long()
        # odd factors: no flip of one bit is lost in the sum, whatever it overflows
        factors = torch.arange(start, start + len(part), device=flat.device) * 2 + 1
        total += (part * factors).sum()
    return total


def hash_of(texts: Iterable[str]) -> int:
    """Of some texts in their order."""
    import xxhash

    return int(xxhash.xxh3_64_intdigest("\n".join(texts).encode()) >> 1)


def _by_tensor(held: list[Replica]) -> dict[str, int]:
    if not held:
        return {}
    values = torch.stack([fingerprint(replica.values) for replica in held]).tolist()
    return {
        f"{'sliced' if replica.place else 'whole'} {replica.name} ({replica.kind}{replica.place})": value
        for replica, value in zip(held, values, strict=True)
    }


def _disagreements(by_rank: list[Mapping[str, int]]) -> dict[str, dict[int, list[int]]]:
    """Key -> value -> the ranks that have it, of the keys with several values."""
    found: dict[str, dict[int, list[int]]] = {}
    for rank, values in enumerate(by_rank):
        for key, value in values.items():
            found.setdefault(key, {}).setdefault(value, []).append(rank)
    return {key: values for key, values in found.items() if len(values) > 1}


def _ranks(values: Mapping[int, list[int]]) -> str:
    """The ranks that stand alone against a majority, or all sides where there is none."""
    sizes: Any = Counter({value: len(ranks) for value, ranks in values.items()}).most_common(2)
    majority = sizes[0][0] if sizes[0][1] > sizes[1][1] else None
    sides = [ranks for value, ranks in values.items() if value != majority]
    if majority is not None:
        odd = sorted(rank for ranks in sides for rank in ranks)
        return f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}, against {len(values[majority])} others"
    return " against ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in sides)
