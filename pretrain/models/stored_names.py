"""How a Hugging Face folder spells the model's parameters: the names in its files, and which slice each of them is.

The one place for families whose files differ from transformers' modules. Reads and writes no file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # (start, stop) along each dimension

# Modules hold all experts of a layer in two tensors; files hold a matrix an expert, as other programs read them.
_FUSED = re.compile(r"^(?P<layer>.*\.layers\.\d+)\.mlp\.experts\.(?P<matrix>gate_up_proj|down_proj)$")
_EXPERT_NAMES: Mapping[str, tuple[str, str, str, str]] = {  # block, gate, up, down
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """One tensor of a folder's files, and the slice of a parameter that it is."""

    name: str  # in the files
    parameter: str  # in the model
    shape: Shape  # of the tensor in the files
    box: Box  # within the parameter


def stored_parts(model_type: str, parameter: str, shape: Shape) -> list[StoredPart]:
    """The tensors that files of this family hold a parameter in; together they cover it exactly once."""
    names = _EXPERT_NAMES.get(model_type)
    found = _FUSED.match(parameter) if names and len(shape) == 3 else None
    if names is None or found is None:
        own = parameter
        if model_type == "mixtral":
            own = re.sub(r"(\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", parameter)
        return [whole_part(parameter, shape, own)]
    block, gate, up, down = names
    if found["matrix"] == "down_proj":
        cuts = [(down, 0, shape[1])]
    else:
        cuts = [(gate, 0, shape[1] // 2), (up, shape[1] // 2, shape[1])]
    return [
        StoredPart(
            name=f"{found['layer']}.{block}.experts.{expert}.{matrix}.weight",
            parameter=parameter,
            shape=(stop - start, shape[2]),
            box=((expert, expert + 1), (start, stop), (0, shape[2])),
        )
        for matrix, start, stop in cuts
        for expert in range(shape[0])
    ]


def whole_part(parameter: str, shape: Shape, name: str | None = None) -> StoredPart:
    """A parameter that is one tensor of the files."""
    return StoredPart(
        name=name or parameter, parameter=parameter, shape=shape, box=tuple((0, length) for length in shape)
    )


def match_parts(
    model_type: str, base_prefix: str, shapes: Mapping[str, Shape], stored: Collection[str]
) -> dict[str, list[StoredPart]]:
    """The parts that make each parameter, with the names that a folder uses for them.

    Files may name parameters as transformers' modules do instead, and those of a base model lack its prefix, as the
    first GPT-2's do. Where nothing fits, the family's own names are given: they are what the folder lacks.
    """
    found = {}
    for parameter, shape in shapes.items():
        own = stored_parts(model_type, parameter, shape)
        candidates = [own, [whole_part(parameter, shape)]]
        candidates += [[_without(base_prefix, part) for part in parts] for parts in list(candidates)]
        fitting = [parts for parts in candidates if all(part.name in stored for part in parts)]
        found[parameter] = fitting[0] if fitting else own
    return found


def parameter_of(model_type: str, stored: str) -> str:
    """The parameter that a tensor of the files belongs to, as transformers' modules name it."""
    names = _EXPERT_NAMES.get(model_type)
    if names is None:
        return stored
    block, gate, up, down = names
    stored = re.sub(rf"(\.layers\.\d+)\.{block}\.", r"\1.mlp.", stored)
    stored = re.sub(rf"(\.experts)\.\d+\.({gate}|{up})\.weight$", r"\1.gate_up_proj", stored)
    return re.sub(rf"(\.experts)\.\d+\.{down}\.weight$", r"\1.down_proj", stored)


def _without(prefix: str, part: StoredPart) -> StoredPart:
    return StoredPart(name=part.name.removeprefix(prefix), parameter=part.parameter, shape=part.shape, box=part.box)
