"""The table of what works together: every refusal fires, and only where it should."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.compatibility import USES, Choice, choose_engine, find_conflicts, refusal_of, table_rows
from pretrain.config import RunConfig
from pretrain.refused_pairs import IMPLIED, REFUSED, Feature

BASE: dict[str, Any] = {
    "name": "run",
    "model": {"preset": "gpt2-125m"},
    "data": {"train": "data"},
    "batch": {"sequence_length": 128, "micro_batch_size": 1, "global_batch_size": 8},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"total_steps": 10},
}
# A change of the run that makes it use a feature and, where possible, nothing else of the table.
SWITCHES: dict[Feature, dict[str, Any]] = {
    "engine plain": {"parallel": {"engine": "plain"}},
    "engine zero": {"parallel": {"engine": "zero"}},
    "engine pipeline": {"parallel": {"engine": "pipeline"}},
    "engine accelerate": {"parallel": {"engine": "accelerate"}},
    "ZeRO stage 0": {"parallel": {"zero_stage": 0}},
    "ZeRO stage 1": {"parallel": {"engine": "zero", "zero_stage": 1}},
    "ZeRO stage 2": {"parallel": {"zero_stage": 2}},
    "ZeRO stage 3": {"parallel": {"zero_stage": 3}},
    "precision fp16": {"precision": "fp16"},
    "guard.on_non_finite stop": {"guard": {"on_non_finite": "stop"}},
    "guard.on_non_finite rollback": {"guard": {"on_non_finite": "rollback"}},
    "tensor parallelism": {"parallel": {"tensor": 2}},
    "pipeline parallelism": {"parallel": {"pipeline": 2}},
    "sequence parallelism": {"parallel": {"sequence": 2}},
    "expert parallelism": {"parallel": {"expert": 2}},
    "DualPipeV": {"parallel": {"pipeline_schedule": "dualpipev"}},
    "sharded data parallelism": {"parallel": {"data_parallel": "shard"}},
    "optimizer offload": {"parallel": {"offload_optimizer": "cpu"}},
    "parameter offload": {"parallel": {"offload_parameters": "cpu", "zero_stage": 3}},
    "NVMe offload": {"parallel": {"offload_optimizer": "nvme", "offload_folder": "nvme", "zero_stage": 3}},
    "NVMe offload of parameters": {
        "parallel": {"offload_parameters": "nvme", "offload_folder": "nvme", "zero_stage": 3}
    },
    "selective recomputation": {"execution": {"recomputation": "selective"}},
    "recomputation of some layers": {"execution": {"recomputation": "full", "recompute_every": 2}},
    "compiled layers": {"execution": {"compile": True}},
    "liger's kernels": {"execution": {"kernels": "liger"}},
    "several processes": {},
    "a DeepSpeed file": {"parallel": {"deepspeed_config": "ds_configs/zero1.json"}},
    "LoRA": {"model": {"preset": None, "weights": "imported", "lora": {}}},
    "an encoder-decoder": {"data": {"train": "data", "span_corruption": {}}},
}


def run(*features: Feature) -> tuple[RunConfig, int]:
    values: dict[str, Any] = dict(BASE)
    for feature in features:
        for key, change in SWITCHES[feature].items():
            values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return RunConfig.model_validate(values), 8 if "several processes" in features else 1


def test_every_feature_of_the_table_can_be_switched_on() -> None:
    assert set(SWITCHES) == set(USES)
    assert {*IMPLIED, *IMPLIED.values()} <= set(USES)
    assert {name for pair in REFUSED for name in pair} <= set(USES)
    for feature in USES:
        config, world_size = run(feature)
        chosen = choose_engine(config, world_size)
        assert USES[feature](Choice(config=config, engine=chosen, world_size=world_size)), feature


@pytest.mark.parametrize("pair", REFUSED, ids=" + ".join)
def test_every_refusal_names_the_reason_and_the_way_out(pair: tuple[Feature, Feature]) -> None:
    found = find_conflicts(*run(*pair))
    (problem,) = [problem for problem in found if problem.found.endswith(REFUSED[pair].reason)][:1]
    assert problem.allowed
    assert problem.change.startswith("set ")


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_the_engines_are_tested_for_is_not_refused(precision: str, stage: int, world_size: int) -> None:
    config = RunConfig.model_validate({**BASE, "precision": precision, "parallel": {"zero_stage": stage}})
    expected = 1 if (precision, stage) == ("fp16", 0) else 0
    assert len(find_conflicts(config, world_size)) == expected


def test_pairs_are_symmetric_and_complete() -> None:
    rows = list(table_rows())
    assert len(rows) == len(USES) * (len(USES) + 1) // 2
    refused = {frozenset((first, second)) for first, second, refusal in rows if refusal}
    assert {frozenset(pair) for pair in REFUSED} <= refused
    assert frozenset(("DualPipeV", "ZeRO stage 3")) in refused  # by what it implies
    assert len(refused) < len(rows) / 2
    assert all(refusal_of(first, second) is refusal_of(second, first) for first, second, _ in rows)


@pytest.mark.parametrize(
    ("parallel", "precision", "world_size", "engine"),
    [
        ({}, "bf16", 1, "plain"),
        ({}, "bf16", 2, "zero"),
        ({"zero_stage": 3}, "bf16", 1, "zero"),
        ({"deepspeed_config": "x.json"}, "bf16", 1, "zero"),
        ({}, "fp16", 1, "zero"),
        ({"engine": "zero"}, "fp32", 1, "zero"),
        ({"pipeline": 2}, "fp32", 2, "pipeline"),
        ({"data_parallel": "shard"}, "bf16", 2, "accelerate"),
        ({"offload_optimizer": "cpu"}, "bf16", 1, "zero"),
        ({"engine": "plain"}, "fp32", 2, "plain"),
    ],
)
def test_the_engine_that_auto_means(parallel: dict[str, Any], precision: str, world_size: int, engine: str) -> None:
    config = RunConfig.model_validate({**BASE, "precision": precision, "parallel": parallel})
    assert choose_engine(config, world_size) == engine
