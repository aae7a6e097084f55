"""Liger's kernels: refused where they cannot run or would be wrong; on a GPU they compute what torch's do."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from pretrain.config import ExecutionSection, LossSection, ModelSection, RunConfig
from pretrain.errors import ConfigError
from pretrain.models.build import ModelBuilder
from pretrain.models.fused_kernels import LIGER_FAMILIES, put_in_liger
from pretrain.run_plan import plan_run

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
LENGTH = 48
HAS_LIGER = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))
needs_liger = pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel and triton are not installed (extra gpu)")


def config_of(**model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "kernels",
            "model": {"model_type": "llama", **SMALL, **model},
            "data": {"train": "none"},
            "batch": {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": 1},
            "execution": {"kernels": "liger"},
        }
    )


def build(family: str, kernels: str, device: str) -> Any:
    builder = ModelBuilder(
        ModelSection.model_validate({"model_type": family, **SMALL}),
        seed=0,
        sequence_length=LENGTH,
        execution=ExecutionSection.model_validate({"kernels": kernels}),
        loss=LossSection(),
    )
    return builder.build(device)


@pytest.mark.parametrize("family", LIGER_FAMILIES)
def test_a_plan_may_ask_for_them(family: str) -> None:
    plan_run(config_of(model_type=family), 1)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"model_type": "olmo2"}, "model_type olmo2"),
        ({"model_type": "gpt2", "num_key_value_heads": None, "intermediate_size": None}, "model_type gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
    ],
)
def test_a_model_that_they_would_compute_wrongly_is_refused(model: dict[str, Any], found: str) -> None:
    values = {key: value for key, value in {**SMALL, **model}.items() if value is not None}
    config = config_of().model_copy(update={"model": ModelSection.model_validate({"model_type": "llama", **values})})
    with pytest.raises(ConfigError) as raised:
        plan_run(config, 1)
    [problem] = raised.value.problems
    assert found in problem.found
    assert problem.change == "set execution.kernels=torch"


@pytest.mark.skipif(torch.cuda.is_available() and HAS_LIGER, reason="they can run here")
def test_a_machine_without_them_is_told_before_a_model_is_made() -> None:
    with pytest.raises(ConfigError) as raised:
        build("llama", "liger", "cpu")
    [problem] = raised.value.problems
    assert ("a CUDA device" in problem.found) == (not torch.cuda.is_available())
    assert ("liger_kernel" in problem.found) == (importlib.util.find_spec("liger_kernel") is None)
    assert problem.change.startswith("set execution.kernels=torch")


@needs_liger
@pytest.mark.parametrize("family", LIGER_FAMILIES)
def test_modules_compute_by_liger_and_parameters_stay(family: str) -> None:
    model = build(family, "torch", "cpu")
    before = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    put_in_liger(model.network)
    layer = model.network.model.layers[0]
    assert layer.mlp.forward.__func__.__qualname__ == "LigerSwiGLUMLP.forward"
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.network.model.norm):
        assert norm.forward.__func__.__qualname__ == "LigerRMSNorm.forward"
        assert norm.variance_epsilon == model.network.config.rms_norm_eps
    assert {name: tuple(weight.shape) for name, weight in model.named_parameters()} == before


@needs_liger
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", LIGER_FAMILIES)
def test_losses_and_gradients_are_torchs(family: str) -> None:
    """Never run by this project."""
    from tests.pretrain.engines.cases import packed_row, stack_rows

    batch = stack_rows([packed_row(number) for number in range(4)]).to("cuda")
    found = {}
    for kernels in ("torch", "liger"):  # in this order: liger's rotary embedding stays in the process
        model = build(family, kernels, "cuda")
        loss, _ = model(batch)
        loss.backward()
        found[kernels] = (float(loss), torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert found["liger"][0] == pytest.approx(found["torch"][0], rel=1e-5)
    difference = found["liger"][1] - found["torch"][1]
    assert float(difference.norm()) <= 1e-4 * float(found["torch"][1].norm())
