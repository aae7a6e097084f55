"""Nothing attends across a document border: a document's logits inside a packed row equal its logits alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from pretrain.config import ExecutionSection
from pretrain.errors import ConfigError
from pretrain.models.attention import document_inputs
from tests.pretrain.models.small_models import packed_batch, small_model

ROWS = ([20, 12], [5, 7, 20], [32])


@torch.no_grad()
def difference_from_documents_alone(model_type: str, attention: str) -> float:
    model = small_model(model_type, execution=ExecutionSection(attention=attention)).eval()
    batch = packed_batch(*ROWS)
    packed = model.network(**document_inputs(batch, attention), use_cache=False).logits
    worst = 0.0
    for row, documents in enumerate(ROWS):
        for tokens, ids in zip(documents, batch.input_ids[row].split(documents), strict=True):
            start = sum(documents[: documents.index(tokens)])
            alone = model.network(input_ids=ids[None], use_cache=False).logits[0]
            inside = packed[row, start : start + tokens]
            worst = max(worst, float((inside - alone).abs().max() / alone.abs().max()))
    return worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "mistral", "olmo2", "olmo3", "gpt_neox", "mixtral"])
def test_a_packed_document_has_the_logits_it_has_alone(model_type: str, attention: str) -> None:
    assert difference_from_documents_alone(model_type, attention) < 2e-6


@pytest.mark.parametrize("model_type", ["opt", "falcon", "bloom", "mamba"])
def test_families_that_would_mix_documents_are_refused(model_type: str) -> None:
    model = small_model(model_type)
    model(packed_batch([32], [32]))
    with pytest.raises(ConfigError, match="cannot keep the documents of one row apart"):
        model(packed_batch(*ROWS))


def test_the_refusal_sees_a_mask_that_leaks() -> None:
    model = small_model("llama")
    leaking = torch.ones(3, 1, 32, 32, dtype=torch.bool).tril()
    with (
        mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", return_value=leaking),
        pytest.raises(ConfigError, match="LlamaDecoderLayer"),
    ):
        model(packed_batch(*ROWS))


def test_borders_are_checked_once_and_leave_no_hooks() -> None:
    model = small_model("llama")
    model(packed_batch(*ROWS))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with mock.patch("pretrain.models.training_model.watched_document_borders") as watch:
        model(packed_batch(*ROWS))
    watch.assert_not_called()


def test_rows_of_one_document_build_no_mask() -> None:
    model = small_model("llama")
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watch(*arguments: torch.Tensor, **keywords: object) -> torch.Tensor:
        calls.append((keywords.get("attn_mask"), keywords.get("is_causal")))
        return original(*arguments, **keywords)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", watch):
        model(packed_batch([32], [32]))
        model(packed_batch([30, 2], [32]))
    assert [(mask is None, causal) for mask, causal in calls] == [(True, True)] * 2 + [(False, False)] * 2


def test_losses_of_packed_rows_are_the_sum_of_the_documents() -> None:
    model = small_model("qwen3").eval()
    batch = packed_batch(*ROWS)
    with torch.no_grad():
        packed = model(batch)[0]
        alone = torch.zeros(())
        for row, documents in enumerate(ROWS):
            for ids in batch.input_ids[row].split(documents):
                one = packed_batch([len(ids)])
                one.input_ids.copy_(ids[None])
                one.labels[0, :-1] = ids[1:]
                alone += model(one)[0]
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_variable_length_kernels_get_one_row_and_its_borders() -> None:
    inputs = document_inputs(packed_batch(*ROWS), "flash_attention_2")
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, 96)
    assert inputs["cu_seq_lens_q"].tolist() == [0, 20, 32, 37, 44, 64, 96]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 32


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "mistral"])
def test_flash_attention_keeps_documents_apart(model_type: str) -> None:
    pytest.importorskip("flash_attn")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    execution = ExecutionSection(attention="flash_attention_2")
    flash = small_model(model_type, execution=execution).to("cuda", torch.bfloat16).eval()
    masked = small_model(model_type, execution=ExecutionSection(attention="sdpa")).to("cuda", torch.bfloat16).eval()
    batch = packed_batch(*ROWS).to("cuda")
    with torch.no_grad():
        torch.testing.assert_close(flash(batch)[0], masked(batch)[0], rtol=2e-3, atol=0)
