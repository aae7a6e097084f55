"""The trainable module: a transformers network whose forward gives summed losses of one micro-batch.

Owns the path from a Batch to two sums, recomputation and compilation of layers. Divides by nothing and knows no engine.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.config import ExecutionSection, LossSection
from pretrain.errors import ConfigError, Problem
from pretrain.models.attention import document_inputs, has_packed_rows, known_packing, watched_document_borders
from pretrain.models.batch import Batch, SpanBatch
from pretrain.models.fused_kernels import put_in_liger
from pretrain.models.loss import OutputHead, full_logits_loss
from pretrain.models.recomputation import enable_recomputation
from pretrain.models.router import routers_of
from pretrain.models.source_losses import SourceLosses

logger = logging.getLogger(__name__)

# Model types whose logits are exactly head(hidden): tests compare each with the model's own logits.
PLAIN_HEAD_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "gpt_neox",
        "olmo",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "gemma",
        "starcoder2",
        "stablelm",
        "smollm3",
        "glm",
        "glm4",
        "mixtral",
        "qwen3_moe",
        "olmoe",
    }
)
PREFIX = "network."


class TrainingModel(nn.Module):
    """A causal language model that maps a micro-batch to sums over its target tokens."""

    def __init__(self, network: PreTrainedModel, *, execution: ExecutionSection, loss: LossSection) -> None:
        super().__init__()
        self.network = network
        self._attention: str = network.config._attn_implementation
        self._has_fused_loss = self._fuse_loss(loss)
        self._layers = list(all_layers(network))  # a plain list: registered once, below the network
        self._has_checked_borders = False
        self.source_losses = SourceLosses()
        self.routers = routers_of(network, has_plain_head=self._has_fused_loss)
        if execution.kernels == "liger":
            put_in_liger(network)
        enable_recomputation(network, self._layers, execution)
        if execution.compile:
            for layer in self._layers:
                layer.compile(dynamic=False)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the micro-batch's target tokens, fp32 scalars: cross-entropy (nats), logsumexp of logits squared.

        While a mixture of experts trains, the first holds its routers' weighted balancing loss as well (router.py).
        The objective to differentiate is `first + loss.z_loss * second`, times any factor (see OutputHead.forward).

        Raises:
            ConfigError: at the first batch with packed rows, if the family would let their documents mix.
        """
        if has_packed_rows(batch) and not self._has_checked_borders:
            with watched_document_borders(self._layers, batch):
                sums = self._sums(batch)
            self._has_checked_borders = True
            return sums
        return self._sums(batch)

    def _sums(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        labels = batch.labels.flatten()
        sources = self.source_losses.watch(batch) if self.training else None
        if isinstance(batch, SpanBatch):
            return full_logits_loss(self._logits_of_spans(batch).flatten(0, -2), labels, sources, scores=batch.scores)
        inputs = document_inputs(batch, self._attention)
        if not self._has_fused_loss:
            with known_packing(batch):
                logits = self.network(**inputs, use_cache=False).logits
            return full_logits_loss(logits.flatten(0, -2), labels, sources, scores=batch.scores)
        watched = {"output_router_logits": True} if self.routers and self.training else {}
        with known_packing(batch):
            output = self.network.base_model(**inputs, use_cache=False, **watched)
        head = self.network.get_output_embeddings()
        loss, squared = head(output[0].flatten(0, -2), labels, batch.target_count, sources, scores=batch.scores)
        if self.routers and watched:
            loss = loss + self.routers.watch(output.router_logits, batch.target_count)
        return loss, squared

    def _logits_of_spans(self, batch: SpanBatch) -> torch.Tensor:
        logits: torch.Tensor = self.network(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=self.network.prepare_decoder_input_ids_from_labels(labels=batch.labels),
            use_cache=False,
        ).logits
        return logits

    def use_attention(self, name: str) -> None:
        """Compute attention by another function of transformers' registry, which keeps documents apart by itself."""
        self._attention = self.network.config._attn_implementation = name
        self._has_checked_borders = True

    @staticmethod
    def logical_name(parameter_name: str) -> str:
        """The Hugging Face model's name of one of this module's parameters."""
        return parameter_name.removeprefix(PREFIX)

    def _fuse_loss(self, loss: LossSection) -> bool:
        head = self.network.get_output_embeddings()
        model_type = self.network.config.model_type
        if model_type not in PLAIN_HEAD_TYPES or type(head) is not nn.Linear:
            logger.info("loss from full logits: %s is not known to end in one plain linear", model_type)
            return False
        fused = OutputHead.from_linear(head, chunk_tokens=loss.chunk_tokens, z_loss_weight=loss.z_loss)
        self.network.set_output_embeddings(fused)
        return True


def all_layers(network: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder, after those of its encoder where it has one."""
    if not network.config.is_encoder_decoder:
        return list(decoder_layers(network))
    return [layer for stack in (network.get_encoder(), network.get_decoder()) for layer in decoder_layers(stack)]


def decoder_layers(network: PreTrainedModel) -> nn.ModuleList:
    """The network's list of decoder layers: the outermost list of modules."""
    for module in network.base_model.modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise ConfigError(
        Problem(
            f"{type(network).__name__} has no list of layers", "a decoder of stacked layers", "change model.model_type"
        )
    )
