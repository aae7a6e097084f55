"""A run's adapters and the imported model beside which they are trained: its hash, and both as one model.

Owns the record in checkpoints and the merge. Where adapters go in a network is models/lora.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.checkpoint.boxes import Box
from pretrain.checkpoint.fragments import MASTER
from pretrain.checkpoint.inspection import open_verified, select_checkpoint
from pretrain.checkpoint.manifest import MANIFEST_NAME
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config import LoraSection, ModelSection
from pretrain.errors import CheckpointError, Problem
from pretrain.initial_weights import opened_import
from pretrain.models.build import build_on_meta
from pretrain.models.lora import DOWN, UP, lora_settings

RECORD = "lora"  # key of a manifest's metadata


@contextmanager
def frozen_weights(model: ModelSection) -> Iterator[Callable[[str], torch.Tensor] | None]:
    """Weights by name of the imported model that adapters are trained beside; None where all weights are trained.

    Raises:
        CheckpointError: it is damaged.
    """
    if model.lora is None or model.weights is None:
        yield None
        return
    with opened_import(Path(model.weights)) as base:
        yield lambda name: base.read(name, MASTER)


def lora_record(model: ModelSection, trained: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a checkpoint of adapters says of them and of their base; empty where all weights are trained."""
    if model.lora is None or model.weights is None:
        return {}
    targets = {name.removesuffix(DOWN).rpartition(".")[2] for name in trained if name.endswith(DOWN)}
    settings = model.lora.model_dump(mode="json") | {"targets": sorted(targets)}
    base = Path(model.weights).absolute()
    return {RECORD: settings | {"base": {"folder": str(base), "xxh3_128": _hash_of(base)}}}


def require_same_base(checkpoint: Checkpoint, model: ModelSection) -> None:
    """Refuse to go on with adapters beside other weights, or scaled otherwise, than those they were trained with.

    Raises:
        CheckpointError: naming both.
    """
    known = checkpoint.manifest.metadata.get(RECORD)
    if known is None or model.lora is None or model.weights is None:
        return  # parameters of another kind are told by require_model
    found = _hash_of(Path(model.weights))
    wanted = known["base"]["xxh3_128"]
    if found != wanted:
        raise CheckpointError(
            Problem(
                f"{checkpoint.path.name} has adapters of a model with hash {wanted[:12]}, "
                f"{model.weights} has {found[:12]}",
                "the imported model that training began with",
                f"set model.weights to it ({known['base']['folder']})",
            )
        )
    if model.lora.alpha != known["alpha"]:
        raise CheckpointError(
            Problem(
                f"{checkpoint.path.name} was trained with model.lora.alpha {known['alpha']:g}, the run says "
                f"{model.lora.alpha:g}",
                "the same scale of adapters",
                f"set model.lora.alpha={known['alpha']:g}",
            )
        )


def open_model(source: Path) -> Checkpoint:
    """A run's best (else latest) checkpoint or a checkpoint folder, verified, as a whole model: adapters are merged.

    Raises:
        CheckpointError: it, or the model that its adapters belong to, is missing or damaged.
    """
    checkpoint = open_verified(select_checkpoint(source))
    return checkpoint if RECORD not in checkpoint.manifest.metadata else MergedCheckpoint(checkpoint)


class MergedCheckpoint(Checkpoint):
    """Weights of an imported model with a run's adapters added: base + alpha / rank x up @ down, as peft merges."""

    def __init__(self, adapters: Checkpoint) -> None:
        known = adapters.manifest.metadata[RECORD]
        base = Path(known["base"]["folder"])
        if not (base / MANIFEST_NAME).is_file() or _hash_of(base) != known["base"]["xxh3_128"]:
            raise CheckpointError(
                Problem(
                    f"{adapters.path} holds adapters of the imported model {base}, which is not there as it was",
                    f"the folder whose {MANIFEST_NAME} has xxh3 hash {known['base']['xxh3_128']}",
                    "bring the folder back",
                )
            )
        self._base, self._adapters = open_verified(base), adapters
        super().__init__(adapters.path)
        self.manifest = replace(adapters.manifest, parameters=self._base.manifest.parameters)
        self._scale = known["alpha"] / known["rank"]
        self._is_transposed = bool(adapter_settings(adapters)["fan_in_fan_out"])
        self._merged: tuple[str, torch.Tensor] | None = None  # the last one asked for

    def read_into(self, target: torch.Tensor, name: str, kind: str, box: Box, start: int) -> None:
        """See Checkpoint; a merged matrix is made whole, since a product of parts may differ in its last bits."""
        if _module(name) + DOWN not in self._adapters.manifest.parameters or not name.endswith(".weight"):
            self._base.read_into(target, name, kind, box, start)
            return
        part = self._whole(name)[tuple(slice(low, high) for low, high in box)]
        target.copy_(part.reshape(-1)[start : start + target.numel()].view(target.shape))

    def close(self) -> None:
        """See Checkpoint."""
        super().close()
        self._merged = None
        self._base.close()
        self._adapters.close()

    def _whole(self, name: str) -> torch.Tensor:
        if self._merged is None or self._merged[0] != name:
            self._merged = None
            up, down = (self._adapters.read(_module(name) + end, MASTER) for end in (UP, DOWN))
            product = up @ down
            added = (product.T if self._is_transposed else product) * self._scale
            self._merged = (name, self._base.read(name, MASTER).add_(added))
        return self._merged[1]


def adapter_settings(adapters: Checkpoint) -> dict[str, Any]:
    """Keywords of peft's LoraConfig for a checkpoint of adapters."""
    values = dict(adapters.manifest.metadata["model_config"])
    config = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    known = {key: value for key, value in adapters.manifest.metadata[RECORD].items() if key != "base"}
    return lora_settings(build_on_meta(config), LoraSection.model_validate(known))


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _hash_of(base: Path) -> str:
    """Of the manifest, which holds the hashes of all files.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return xxhash.xxh3_128_hexdigest((base / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise CheckpointError(
            Problem(f"{base}: {error}", "a folder that `pretrain import` wrote", "import the model again")
        ) from error
