"""The safetensors files of a Hugging Face folder: what is in them, tensor by tensor.

Owns finding them and their faults. Knows no model, holds no file open, never unpickles anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pretrain.errors import Problem

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMATS = f"a folder with whole safetensors files: {SINGLE_FILE}, or {INDEX_FILE} and what it names"
CHANGE = "copy the folder again, or convert it to safetensors (pickled .bin files are not read)"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as the header of its file tells it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, F16, ...


class WeightFiles:
    """All tensors of a folder. Opening reads the headers alone; faults are gathered, not raised."""

    def __init__(self, folder: Path) -> None:
        self.problems: list[Problem] = []
        self.unreadable: set[str] = set()  # tensors of files that cannot be read
        self.tensors: dict[str, StoredTensor] = {}
        for path, names in self._files(folder).items():
            self._read_header(path, names)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU, in its stored type."""
        with open_weights(self.tensors[name].path) as file:
            values: torch.Tensor = file.get_tensor(name)
            return values

    def _files(self, folder: Path) -> dict[Path, set[str] | None]:
        """File -> the names that the index gives it; None without an index."""
        index = folder / INDEX_FILE
        if not index.exists():
            return {folder / SINGLE_FILE: None}
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is not the name of a file in the folder")
                named = files.setdefault(folder / file, set())
                assert named is not None, "made a line above"
                named.add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(Problem(f"{index}: {error!r}", FORMATS, CHANGE))
            return {}
        return files

    def _read_header(self, path: Path, expected: set[str] | None) -> None:
        try:
            with open_weights(path) as file:
                held = set(file.keys())
                for name in held:
                    piece = file.get_slice(name)
                    self.tensors[name] = StoredTensor(
                        path=path, shape=tuple(piece.get_shape()), dtype=str(piece.get_dtype())
                    )
        except (OSError, SafetensorError) as error:
            self.problems.append(Problem(f"{path}: {error}", FORMATS, CHANGE))
            self.unreadable |= expected or set()
            return
        for name in sorted((expected or set()) - held):
            self.problems.append(Problem(f"{path} does not hold {name}", f"what {INDEX_FILE} says", CHANGE))
            self.unreadable.add(name)


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file; its pages leave the memory when it is closed."""
    with safe_open(path, framework="pt") as file:
        yield file
