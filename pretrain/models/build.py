"""Builds the training model: the same weights on every layout, at little cost.

Owns construction and filling as two acts, because ZeRO-3 constructs in pieces and fills through gathered parameters.
Knows no engine; engines pass in how parameters are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pretrain.config import ExecutionSection, LossSection, ModelSection
from pretrain.models.configuration import auto_class, resolve_model_config
from pretrain.models.fused_kernels import require_liger
from pretrain.models.initialization import Gather, initialize, no_gather
from pretrain.models.lora import add_adapters
from pretrain.models.training_model import TrainingModel
from pretrain.models.weights import load_weights


class ModelBuilder:
    """Everything that is needed to make the run's model, on any layout."""

    def __init__(
        self,
        model_section: ModelSection,
        *,
        seed: int,
        sequence_length: int,
        execution: ExecutionSection,
        loss: LossSection,
        precision: str = "bf16",
        read_frozen: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        """Resolve the configuration; `read_frozen` gives the weights by name that model.lora trains beside."""
        self._read_frozen = read_frozen
        self._section, self._seed = model_section, seed
        self._execution, self._loss = execution, loss
        if execution.kernels == "liger":
            require_liger()
        self.config: PretrainedConfig = resolve_model_config(
            model_section, sequence_length=sequence_length, attention=execution.attention, precision=precision
        )

    def construct(self) -> TrainingModel:
        """Make the modules with parameters of arbitrary values, fp32 (or what a surrounding `zero.Init` makes them)."""
        with no_init_weights():
            network: PreTrainedModel = auto_class(self.config).from_config(self.config, dtype=torch.float32)
        network.tie_weights()
        _restore_rotary_buffers(network)
        return TrainingModel(network, execution=self._execution, loss=self._loss)

    def fill(self, model: TrainingModel, gather: Gather = no_gather, known_names: frozenset[str] = frozenset()) -> None:
        """Write every parameter in place, from the weights folder or from (seed, name); collective where gather is.

        `known_names` are those of the whole model where `model` is a part of it: a folder may hold them as well.
        """
        if self._section.weights is not None and is_checkpoint(Path(self._section.weights)):
            self._fill_frozen(model, gather)  # else the run restores it, as any checkpoint, rank by rank
            return
        if self._section.weights is not None:
            load_weights(model.network, Path(self._section.weights), gather=gather, known_names=known_names)
        else:
            initialize(model.network, seed=self._seed, gather=gather)

    def build(self, device: torch.device | str) -> TrainingModel:
        """Construct on the device and fill."""
        with torch.device(device):
            model = self.construct()
        self.fill(model)
        if self._section.lora is not None:
            add_adapters(model.network, self._section.lora, seed=self._seed)
        return model

    @torch.no_grad()
    def _fill_frozen(self, model: TrainingModel, gather: Gather) -> None:
        if self._read_frozen is None:
            return
        for name, parameter in model.network.named_parameters():
            with gather([parameter]):
                parameter.copy_(self._read_frozen(name))


def is_checkpoint(folder: Path) -> bool:
    """True for what `pretrain import` wrote: weights lie there as a checkpoint's fragments."""
    return (folder / "manifest.json").is_file()


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The network without memory: its names, shapes and ties."""
    with torch.device("meta"):
        network: PreTrainedModel = auto_class(config).from_config(config)
    network.tie_weights()
    return network


def _restore_rotary_buffers(network: PreTrainedModel) -> None:
    """Compute rotary frequencies again in fp32: `zero.Init` turns tensors that are made inside it to its own dtype."""
    for module in network.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, torch.Tensor) and frequencies.dtype != torch.float32:
            for name in ("inv_freq", "original_inv_freq"):
                setattr(module, name, nn.Buffer(torch.empty_like(frequencies, dtype=torch.float32), persistent=False))
            network._init_weights(module)
