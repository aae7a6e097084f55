"""What accelerate launch asks for is laid over the run configuration, or refused where the two contradict."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.accelerate_request import read_accelerate_request
from pretrain.config import RunConfig
from pretrain.errors import ConfigError

ASKS = {"ACCELERATE_USE_DEEPSPEED": "true"}
FILE = {**ASKS, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json", "ACCELERATE_MIXED_PRECISION": "no"}


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(**parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"preset": "gpt2-125m"},
            "data": {"train": "data"},
            "batch": {"sequence_length": 128, "micro_batch_size": 1, "global_batch_size": 8},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": 10},
            "parallel": parallel,
        }
    )


def test_without_accelerate_nothing_changes() -> None:
    assert read_accelerate_request({"ACCELERATE_MIXED_PRECISION": "fp16"}).apply_to(run()) == run()


def test_deepspeed_chooses_the_engine_and_the_file() -> None:
    assert read_accelerate_request(ASKS).apply_to(run()).parallel.engine == "zero"
    parallel = read_accelerate_request(FILE).apply_to(run()).parallel
    assert (parallel.engine, parallel.deepspeed_config) == ("zero", "ds.json")


def test_fsdp_chooses_the_engine_and_the_sharding() -> None:
    parallel = read_accelerate_request(FSDP).apply_to(run()).parallel
    assert (parallel.engine, parallel.data_parallel) == ("accelerate", "shard")


def test_equal_numbers_are_accepted() -> None:
    variables = {**ASKS, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    assert read_accelerate_request(variables).apply_to(run(zero_stage=1)).parallel.zero_stage == 1


@pytest.mark.parametrize(
    ("variables", "parallel", "told"),
    [
        ({**ASKS, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "parallel.zero_stage = 3"),
        ({**ASKS, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "optimizer.clip_norm = 0.5"),
        ({**ASKS, "ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "precision = fp16"),
        ({**ASKS, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "OFFLOAD_PARAM_DEVICE"),
        (ASKS, {"engine": "plain"}, "parallel.engine is plain"),
        (FILE, {"deepspeed_config": "other.json"}, "names ds.json"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP_VERSION = 1"),
        (FSDP, {"engine": "zero"}, "asks for FSDP, parallel.engine is zero"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "FSDP_OFFLOAD_PARAMS = true"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "FSDP_AUTO_WRAP_POLICY"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "execution.recomputation = full"),
        ({**FSDP, "ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "precision = fp16"),
        ({**FSDP, **ASKS}, {}, "ACCELERATE_USE_DEEPSPEED beside"),
    ],
)
def test_contradictions_are_refused(variables: dict[str, str], parallel: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_accelerate_request(variables).apply_to(run(**parallel))
