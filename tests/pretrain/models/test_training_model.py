from __future__ import annotations

import pytest
import torch

from pretrain.config import ExecutionSection, LossSection
from pretrain.models.loss import OutputHead, full_logits_loss
from pretrain.models.training_model import PLAIN_HEAD_TYPES, TrainingModel, decoder_layers
from tests.pretrain.models.small_models import packed_batch, small_model

BATCH = packed_batch([20, 12], [32])
Z_WEIGHT = 0.01
LOSS = LossSection(chunk_tokens=20, z_loss=Z_WEIGHT)


def gradients(model: TrainingModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss, squared = model(BATCH)
    ((loss + Z_WEIGHT * squared) / BATCH.target_count).backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= relative * value.norm() + 1e-9, name


@pytest.mark.parametrize("model_type", sorted(PLAIN_HEAD_TYPES))
def test_loss_equals_that_of_the_models_own_logits(model_type: str) -> None:
    model = small_model(model_type, loss=LOSS)
    assert isinstance(model.network.get_output_embeddings(), OutputHead)
    found = gradients(model)
    model._has_fused_loss = False
    assert_same(found, gradients(model))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_heads_add_their_gradient_to_the_embedding(tied: bool) -> None:
    model = small_model("llama", loss=LOSS, tie_word_embeddings=tied)
    found = gradients(model)
    assert ("network.lm_head.weight" in found) != tied
    model._has_fused_loss = False
    assert_same(found, gradients(model))


@pytest.mark.parametrize("model_type", ["cohere", "granite", "gemma2"])
def test_families_that_change_logits_after_the_head_use_their_own(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        model = small_model(model_type, loss=LOSS)
    assert "loss from full logits" in caplog.text
    assert not isinstance(model.network.get_output_embeddings(), OutputHead)
    logits = model.network(input_ids=BATCH.input_ids, position_ids=BATCH.position_ids, use_cache=False).logits
    expected = full_logits_loss(logits.flatten(0, 1), BATCH.labels.flatten())
    torch.testing.assert_close(model(BATCH), expected)


def test_sums_of_micro_batches_add_up() -> None:
    """No mean hides in the sums: rows with few targets weigh by their tokens."""
    model = small_model()
    rows = ([20, 12], [32], [1] * 32, [2] * 16)
    together = model(packed_batch(*rows))
    whole = packed_batch(*rows)
    parts = []
    for row, documents in enumerate(rows):
        part = packed_batch(documents)
        part.input_ids.copy_(whole.input_ids[row : row + 1])
        part.labels.copy_(whole.labels[row : row + 1])
        parts.append(torch.stack(model(part)))
    torch.testing.assert_close(torch.stack(together), torch.stack(parts).sum(0))


def test_evaluation_equals_training() -> None:
    model = small_model(loss=LOSS)
    trained = model(BATCH)
    with torch.no_grad():
        assert torch.equal(torch.stack(model.eval()(BATCH)), torch.stack(trained))


def test_recomputation_changes_no_number_and_runs_each_layer_twice() -> None:
    expected = gradients(small_model(loss=LOSS))
    model = small_model(loss=LOSS, execution=ExecutionSection(recomputation="full")).train()
    runs: list[int] = []
    for index, layer in enumerate(decoder_layers(model.network)):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    found = gradients(model)
    assert runs == [0, 1, 1, 0]
    assert_same(found, expected, relative=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_compiled_layers_give_the_eager_numbers(recomputation: str) -> None:
    expected = gradients(small_model(loss=LOSS))
    model = small_model(loss=LOSS, execution=ExecutionSection(compile=True, recomputation=recomputation)).train()
    uncompiled = gradients(model)  # the first packed batch runs eagerly, to watch the borders
    assert_same(uncompiled, expected, relative=1e-6)
    compiled = gradients(model)
    assert_same(compiled, expected, relative=1e-4)
    assert any(not torch.equal(compiled[name], uncompiled[name]) for name in compiled)


def test_names_are_those_of_the_hugging_face_model() -> None:
    model = small_model(execution=ExecutionSection(compile=True))
    names = [model.logical_name(name) for name, _ in model.named_parameters()]
    assert names == [name for name, _ in model.network.named_parameters()]
    assert names[0] == "model.embed_tokens.weight"
