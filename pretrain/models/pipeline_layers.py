"""One stage of a pipeline as modules: only its own layers are ever given memory, with the whole model's values.

The whole network is laid out without memory, what other stages compute is replaced by modules that pass hidden states
on, and the rest runs the family's own forward: masks, rotary positions and layers are transformers'. Knows no engine.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.models.attention import document_inputs, has_packed_rows, known_packing, watched_document_borders
from pretrain.models.batch import Batch
from pretrain.models.build import ModelBuilder
from pretrain.models.initialization import Gather, no_gather
from pretrain.models.loss import OutputHead
from pretrain.models.pipeline_stages import Stage
from pretrain.models.sharding import compute_buffers, materialize
from pretrain.models.training_model import TrainingModel, decoder_layers

# Modules of the base model that come before the layers, beside the token table, for families that have no pp plan.
_FIRST_WITHOUT_PLAN = {"gpt2": ("wpe", "drop")}
_NORM_WITHOUT_PLAN = {"gpt2": "ln_f"}


@dataclass(frozen=True, kw_only=True)
class StageModules:
    """What one stage is made of."""

    embedding: nn.Embedding | None  # the token table: on the first stage, and on the last where the head is tied to it
    body: StageBody
    head: OutputHead | None  # on the last stage
    names: dict[int, str]  # id of a parameter -> its name in the whole model


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """The facts about all stages that each of them needs."""

    shapes: dict[str, tuple[int, ...]]  # of every trained parameter, in the model's order
    config: dict[str, Any]  # the transformers configuration as JSON values


@dataclass(frozen=True, kw_only=True)
class TensorSplit:
    """How a stage is cut over tensor ranks, which engines know about."""

    cut: Callable[[TrainingModel], None]  # while it has no memory
    join_gradients: Callable[[TrainingModel], None]  # once it has
    gather: Gather  # makes parameters whole to be filled


class PassThrough(nn.Module):
    """Stands for a layer of another stage."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The first input as it is."""
        return hidden


class NoPositions(nn.Module):
    """Stands for the learned positions, which the first stage has added already."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """A zero that keeps the dtype of what it is added to."""
        return torch.zeros((), device=position_ids.device)


class StageBody(nn.Module):
    """The layers of one stage: hidden states (B, T, H) in and out."""

    def __init__(self, base_model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.base_model = base_model
        self._attention: str = base_model.config._attn_implementation
        self._layers = list(layers)  # a plain list: registered once, below the base model
        self._has_checked_borders = False

    def forward(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run the layers on rows whose documents stay apart as the batch says.

        Raises:
            ConfigError: at the first batch with packed rows, if the family would let their documents mix.
        """
        if has_packed_rows(batch) and not self._has_checked_borders:
            with watched_document_borders(self._layers, batch):
                hidden = self._run(hidden, batch)
            self._has_checked_borders = True
            return hidden
        return self._run(hidden, batch)

    def _run(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        inputs = document_inputs(batch, self._attention)
        ids = inputs.pop("input_ids")  # variable-length kernels get all rows as one
        with known_packing(batch):
            out: torch.Tensor = self.base_model(
                inputs_embeds=hidden.view(*ids.shape, hidden.shape[-1]), **inputs, use_cache=False
            )[0]
        return out.view(hidden.shape)


def describe_whole(builder: ModelBuilder) -> WholeModel:
    """Lay out the whole model without memory and note what all stages must agree on."""
    network = _lay_out(builder).network
    return WholeModel(
        shapes={name: tuple(weight.shape) for name, weight in network.named_parameters() if weight.requires_grad},
        config=dict(network.config.to_dict()),
    )


def build_stage(
    builder: ModelBuilder, stage: Stage, device: torch.device, split: TensorSplit | None = None
) -> StageModules:
    """Make one stage with its starting weights; nothing of another stage gets memory, nor of another tensor rank."""
    model = _lay_out(builder)
    network, known_names = model.network, _known_names(model.network)
    keeps_table = stage.is_first or (stage.is_last and network.config.tie_word_embeddings)
    own_layers = _drop_other_stages(network, stage, keeps_table=keeps_table)
    if split:
        split.cut(model)
    for _ in materialize(model, device):
        pass
    compute_buffers(model)
    if split:
        split.join_gradients(model)
    builder.fill(model, gather=split.gather if split else no_gather, known_names=known_names)
    embedding = network.get_input_embeddings() if keeps_table else None
    head = network.get_output_embeddings() if stage.is_last else None
    assert head is None or isinstance(head, OutputHead), "families of PIPELINE_TYPES end in one plain linear"
    names = {id(weight): name for name, weight in network.named_parameters()}
    # the table and the head have modules of their own in the pipeline
    network.set_input_embeddings(PassThrough())
    return StageModules(
        embedding=embedding,
        body=StageBody(network.base_model, own_layers),
        head=head,
        names=names,
    )


def _lay_out(builder: ModelBuilder) -> TrainingModel:
    with torch.device("meta"):
        return builder.construct()


def _known_names(network: PreTrainedModel) -> frozenset[str]:
    """Of parameters and buffers, a tied weight under each of its names."""
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return frozenset(weights | {name for name, _ in network.named_buffers()})


def _drop_other_stages(network: PreTrainedModel, stage: Stage, *, keeps_table: bool) -> list[nn.Module]:
    """Replace what other stages compute; the layers that stay, in order."""
    base, layers = network.base_model, decoder_layers(network)
    own = [layers[number] for number in stage.layers]
    for number in range(len(layers)):
        if number not in stage.layers:
            layers[number] = PassThrough()
    before, norm = _ends(network)
    if not stage.is_first:
        for name in before:
            is_table_of_positions = isinstance(getattr(base, name), nn.Embedding)
            setattr(base, name, NoPositions() if is_table_of_positions else PassThrough())
    if not keeps_table:
        network.set_input_embeddings(PassThrough())
    if not stage.is_last:
        setattr(base, norm, PassThrough())
        network.lm_head = PassThrough()
    return own


def _ends(network: PreTrainedModel) -> tuple[tuple[str, ...], str]:
    """Names in the base model of what comes before the layers, beside the token table, and of the final norm."""
    plan = network.config.base_model_pp_plan
    if plan is None:
        model_type = network.config.model_type
        return _FIRST_WITHOUT_PLAN[model_type], _NORM_WITHOUT_PLAN[model_type]
    names = list(plan)
    place = names.index("layers")
    return tuple(names[1:place]), names[place + 1]
