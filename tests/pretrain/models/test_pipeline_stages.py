"""How layers are shared out over stages, and what a pipeline refuses and warns of before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config import ModelSection, RunConfig
from pretrain.errors import ConfigError
from pretrain.models.architecture import Architecture, resolve_architecture
from pretrain.models.pipeline_stages import PIPELINE_TYPES, bubble_fraction, partition_layers
from pretrain.run_plan import plan_run

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def shape_of(**changes: Any) -> Architecture:
    return resolve_architecture(ModelSection.model_validate(MODEL | changes), 48)


def counts(stages: int, *, recomputes: bool = False, **changes: Any) -> list[int]:
    cut = partition_layers(shape_of(**changes), stages, sequence_length=48, recomputes=recomputes)
    return [len(stage.layers) for stage in cut]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 12])
def test_every_layer_is_computed_once_and_in_order(stages: int) -> None:
    cut = partition_layers(shape_of(num_hidden_layers=12), stages, sequence_length=48)
    assert [layer for stage in cut for layer in stage.layers] == list(range(12))
    assert all(len(stage.layers) for stage in cut)
    assert [stage.is_first for stage in cut] == [True, *[False] * (stages - 1)]
    assert [stage.is_last for stage in cut] == [*[False] * (stages - 1), True]


def test_a_small_head_leaves_the_stages_even_and_the_rest_to_the_middle() -> None:
    assert counts(4, num_hidden_layers=16, vocab_size=8) == [4, 4, 4, 4]
    assert counts(4, num_hidden_layers=18, vocab_size=8) == [4, 5, 5, 4]


def test_a_large_head_takes_the_place_of_layers() -> None:
    layer = partition_layers(shape_of(num_hidden_layers=1), 1, sequence_length=48)[0].forward_flops - 2 * 512 * 64
    as_four_layers = {"num_hidden_layers": 22, "vocab_size": 4 * layer // (2 * 64)}
    assert counts(4, **as_four_layers) == [6, 6, 7, 3]
    # beside layers whose forward runs twice, the head is worth three
    assert counts(4, **as_four_layers, recomputes=True) == [6, 6, 6, 4]


def test_the_slowest_stage_is_as_fast_as_any_cut_allows() -> None:
    for layers in range(3, 12):
        for vocabulary in (8, 400, 2000, 9000):
            shape = shape_of(num_hidden_layers=layers, vocab_size=vocabulary)
            whole = partition_layers(shape, 1, sequence_length=48)[0].forward_flops
            head = 2 * vocabulary * 64
            layer = (whole - head) / layers
            best = min(
                max(first, second, layers - first - second + head / layer)
                for first in range(1, layers - 1)
                for second in range(1, layers - first)
            )
            cut = partition_layers(shape, 3, sequence_length=48)
            assert max(stage.forward_flops for stage in cut) == pytest.approx(best * layer, rel=1e-6)


def test_bubble() -> None:
    assert bubble_fraction(4, 4) == pytest.approx(3 / 7)
    assert bubble_fraction(1, 8) == 0


def run(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "pipeline",
        "model": MODEL,
        "data": {"train": "unused"},
        "batch": {"sequence_length": 48, "micro_batch_size": 1, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"total_steps": 5},
        "parallel": {"pipeline": 2},
    }
    return RunConfig.model_validate(values | changes)


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "zero 2": (2, {"parallel": {"pipeline": 2, "zero_stage": 2}}, "pipeline parallelism with ZeRO stage 2"),
    "zero 3": (2, {"parallel": {"pipeline": 2, "zero_stage": 3}}, "pipeline parallelism with ZeRO stage 3"),
    "fp16": (2, {"precision": "fp16"}, "pipeline parallelism with precision fp16"),
    "bf16 at stage 0": (
        2,
        {"parallel": {"pipeline": 2, "zero_stage": 0}, "precision": "bf16"},
        "sum gradients in bf16",
    ),
    "zero engine": (2, {"parallel": {"pipeline": 2, "engine": "zero"}}, "pipeline parallelism with engine zero"),
    "plain engine": (1, {"parallel": {"pipeline": 2, "engine": "plain"}}, "pipeline parallelism with engine plain"),
    "one stage": (2, {"parallel": {"engine": "pipeline"}}, "parallel.pipeline is 1"),
    "V without a pipeline": (2, {"parallel": {"pipeline_schedule": "dualpipev"}}, "parallel.pipeline is 1"),
    "more stages than layers": (5, {"parallel": {"pipeline": 5}, "precision": "fp32"}, "5 pipeline stages"),
    "V with one layer a rank": (
        4,
        {"parallel": {"pipeline": 4, "pipeline_schedule": "dualpipev"}},
        "8 pipeline stages (2 on each rank of DualPipeV) for 4 layers",
    ),
    "V with few micro-batches": (
        2,
        {
            "parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev"},
            "batch": {"sequence_length": 48, "micro_batch_size": 4, "global_batch_size": 8},
        },
        "DualPipeV on 2 ranks with 2 micro-batches",
    ),
    "another family": (
        2,
        {"model": MODEL | {"model_type": "mixtral", "router_aux_loss_coef": 0.0}},
        "model_type mixtral: the losses of its routers",
    ),
    "sequence": (4, {"parallel": {"pipeline": 2, "sequence": 2}}, "pipeline parallelism with sequence"),
    "offload": (
        2,
        {"parallel": {"pipeline": 2, "offload_optimizer": "cpu"}},
        "pipeline parallelism with optimizer offload",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_before_launch_with_a_way_out(case: str) -> None:
    world_size, changes, words = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        plan_run(run(**changes), world_size)
    [problem] = [problem for problem in refusal.value.problems if words in problem.found]
    assert problem.allowed
    assert problem.change


@pytest.mark.parametrize(
    "values",
    [
        {"pipeline": {"activation_checkpoint_interval": 1}},
        {"managed_gradient_accumulation": False},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        {"pipeline": {"pipe_partitioned": True}},
    ],
    ids=lambda values: str(next(iter(values))),
)
def test_keys_of_a_deepspeed_file(values: dict[str, Any], tmp_path: Any) -> None:
    import json

    file = tmp_path / "file.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    parallel = {"pipeline": 2, "pipeline_schedule": "dualpipev", "deepspeed_config": str(file)}
    with pytest.raises(ConfigError, match=str(file)):
        plan_run(run(parallel=parallel), 2)


def test_a_ramp_must_fill_both_ends_from_its_first_step() -> None:
    batch = {"sequence_length": 48, "micro_batch_size": 1, "global_batch_size": 8}
    parallel = {"pipeline": 2, "pipeline_schedule": "dualpipev"}
    ramp = {"ramp": [{"until_tokens": 480, "global_batch_size": 2}]}
    assert plan_run(run(batch=batch, parallel=parallel), 2)
    with pytest.raises(ConfigError, match="2 micro-batches"):
        plan_run(run(batch=batch | ramp, parallel=parallel), 2)


def test_few_micro_batches_are_warned_of() -> None:
    few = {"sequence_length": 48, "micro_batch_size": 2, "global_batch_size": 2}
    [warning] = [text for text in plan_run(run(batch=few), 2).warnings if "pipeline" in text]
    assert "50%" in warning
    assert not [text for text in plan_run(run(), 2).warnings if "pipeline" in text]


@pytest.mark.parametrize("model_type", sorted(PIPELINE_TYPES))
def test_every_family_of_the_list_is_planned(model_type: str) -> None:
    fields = MODEL | {"model_type": model_type}
    if model_type == "gpt2":
        del fields["num_key_value_heads"], fields["intermediate_size"]
    plan = plan_run(run(model=fields), 2)
    assert plan.engine == "pipeline"
    assert len(plan.stages) == 2
