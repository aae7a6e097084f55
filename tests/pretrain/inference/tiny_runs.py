"""Run folders with a checkpoint of a tiny random model and a tiny tokenizer, made without training."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.checkpoint.store import CheckpointStore
from tests.pretrain.checkpoint.states import cut_fragments

EOS = "<|endoftext|>"
SENTENCES = ["the ship left the harbour at dawn", "a small house by the river", "rain fell on the roof all night"]
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96},
    "gpt2": {},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": True},
}


def build_network(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Two layers, 64 wide, with weights large enough that logits differ clearly."""
    common = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"max_position_embeddings": 128, "initializer_range": 0.1, "use_cache": False}
    config = CONFIG_MAPPING[model_type](**common | rest | FIELDS.get(model_type, {}) | fields)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_tokenizer(folder: Path, *, with_config: bool = True) -> str:
    """A byte-level BPE of 300 tokens; returns the sha256 of its file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if with_config:
        (folder / "tokenizer_config.json").write_text(
            f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{EOS}"}}'
        )
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def write_run(
    folder: Path, network: PreTrainedModel, *, step: int = 10, is_best: bool = False, **metadata: Any
) -> Path:
    """Save a network as a run's checkpoint, its weights cut as several ranks would; returns the checkpoint."""
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
    digest = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    state = {(name, "master"): weight.detach().clone() for name, weight in network.named_parameters()}
    known = {
        "parameters": {name: tuple(weight.shape) for (name, _), weight in state.items()},
        "model_config": network.config.to_dict(),
        "tokenizer": {"folder": "../../tokenizer", "sha256": digest},
    }
    return CheckpointStore(folder / "checkpoints", file_bytes=1 << 16).save(
        step,
        cut_fragments(state, random.Random(step).randrange(100)),
        scalars={},
        progress={"step": step, "tokens_seen": step * 1000},
        metadata=known | metadata,
        is_best=is_best,
    )
