"""Counts where tensors become Python numbers, at each of which the host would wait for a GPU."""

from __future__ import annotations

import traceback
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "item", "equal", "is_nonzero")


class CountReads(TorchDispatchMode):
    """Where tensors are turned into Python numbers: the innermost line of ours or of DeepSpeed's."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if operation.overloadpacket.__name__ in READS:
            self.places.append(_caller())
        return operation(*arguments, **(keywords or {}))


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        for package in ("/pretrain/", "/deepspeed/", "/accelerate/"):
            if package in frame.filename and "/tests/" not in frame.filename:
                return f"{package.strip('/')}/{frame.filename.rpartition(package)[2]}:{frame.name}"
    return "torch"
