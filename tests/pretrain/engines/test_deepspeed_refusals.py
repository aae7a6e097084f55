"""What a DeepSpeed file may not say is told before launch, with the key, the file and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.compatibility import find_conflicts
from pretrain.config import RunConfig
from pretrain.engines.deepspeed_config import build_deepspeed_config, ownership_problems
from pretrain.engines.deepspeed_import import import_deepspeed
from pretrain.engines.deepspeed_refusals import REFUSED, REMOVED_KEYS, lookup, refused_keys
from pretrain.errors import ConfigError
from pretrain.run_plan import plan_run
from tests.pretrain.engines.cases import Case

# A value of every refused key that is wrong in the run beside it, and one that is right there.
EXAMPLES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gradient_allreduce_op": ("sum", "mean", {}),
    "prescale_gradients": (True, False, {"zero_stage": 3}),
    "gradient_predivide_factor": (2.0, 1.0, {"zero_stage": 3}),
    "managed_gradient_accumulation": (False, True, {}),
    "zero_optimization.compute_grad_norm": (False, True, {}),
    "zero_optimization.offload_optimizer.ratio": (0.5, 1.0, {"zero_stage": 2}),
    "zero_optimization.offload_optimizer.super_offload": (True, False, {}),
    "zero_optimization.zenflow": ({"topk_ratio": 0.1}, {}, {}),
    "zero_optimization.zero_quantized_weights": (True, False, {}),
    "zero_optimization.zero_quantized_gradients": (True, False, {}),
    "zero_optimization.zero_hpz_partition_size": (2, 1, {"zero_stage": 3, "tensor": 2}),
    "zero_optimization.reduce_scatter": (False, True, {"expert": 2}),
    "zero_optimization.contiguous_gradients": (False, True, {"expert": 2}),
    "zero_optimization.round_robin_gradients": (True, False, {}),
    "use_data_before_expert_parallelism": (True, False, {}),
    "bf16.bf16_master_weights_and_grads": (True, False, {}),
    "fp16.fp16_master_weights_and_grads": (True, False, {}),
    "torch_autocast.enabled": (True, False, {}),
    "compile.deepcompile": (True, False, {}),
    "tensor_parallel": ({"preset_model": "llama"}, {"autotp_size": "auto"}, {}),
    "expert_parallel": ({"enabled": True}, {}, {}),
}


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return dict(value)


def test_every_refused_key_has_an_example() -> None:
    assert set(EXAMPLES) == {refused.key for refused in REFUSED}


@pytest.mark.parametrize("key", EXAMPLES)
def test_a_wrong_value_is_refused_and_a_right_one_is_not(key: str) -> None:
    wrong, right, parallel = EXAMPLES[key]
    config = Case(engine="zero", **parallel).config
    (problem,) = refused_keys(nested(key, wrong), "file.json", config)
    assert f"{key} = {wrong!r} in file.json" in problem.found
    assert problem.allowed
    assert problem.change.startswith("remove it from file.json")
    assert list(refused_keys(nested(key, right), "file.json", config)) == []


def test_stage_3_alone_splits_its_optimizer_and_knows_no_scaling_before_reduction() -> None:
    share = nested("zero_optimization.offload_optimizer.ratio", 0.5)
    assert list(refused_keys(share, "file.json", Case(zero_stage=3).config)) == []
    assert list(refused_keys({"prescale_gradients": True}, "file.json", Case(zero_stage=1).config)) == []


def test_every_key_that_deepspeed_removed_is_known() -> None:
    import_deepspeed()
    from deepspeed.runtime import config

    removed = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed == set(REMOVED_KEYS)
    for key in REMOVED_KEYS:
        (problem,) = refused_keys(nested(key, {"enabled": True}), "file.json", Case().config)
        assert key in problem.found


def test_the_plan_tells_all_of_them_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"elasticity": {}, "gradient_allreduce_op": "sum", "zero_optimization": {"stage": 2}}))
    values = Case(engine="zero").config.model_dump()
    values["parallel"]["deepspeed_config"] = str(path)
    with pytest.raises(ConfigError) as error:
        plan_run(RunConfig.model_validate(values), 2)
    assert {problem.found.split()[0] for problem in error.value.problems} == {
        "elasticity",
        "gradient_allreduce_op",
        "zero_optimization.stage",
    }


def test_where_to_offload_is_owned_by_the_run_and_how_is_the_files() -> None:
    tuned = {"device": "auto", "pin_memory": False, "buffer_count": 6}
    file = {"zero_optimization": {"offload_optimizer": tuned, "reduce_bucket_size": "auto"}}
    case = Case(engine="zero", zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    built = build_deepspeed_config(case.config, accumulation=1, data_parallel=2, file_values=file)
    section = built["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "buffer_count": 6}
    assert section["offload_param"] == {"device": "cpu"}
    assert "reduce_bucket_size" not in section  # DeepSpeed's own default
    without = build_deepspeed_config(Case(engine="zero").config, accumulation=1, data_parallel=2, file_values=file)
    assert lookup(without, "zero_optimization.offload_optimizer") is None
    owned = {"zero_optimization": {"offload_param": {"device": "cpu"}}}
    (problem,) = ownership_problems(owned, "file.json", case.config)
    assert "parallel.offload_parameters" in problem.found


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(engine="zero", zero_stage=0, offload_optimizer="cpu"), "optimizer offload with ZeRO stage 0"),
        (Case(engine="zero", zero_stage=1, offload_parameters="cpu"), "parameter offload with ZeRO stage 1"),
        (Case(engine="zero", zero_stage=2, offload_parameters="cpu"), "parameter offload with ZeRO stage 2"),
    ],
)
def test_offload_without_what_it_offloads_is_refused(case: Case, expected: str) -> None:
    (problem,) = find_conflicts(case.config, 2)
    assert problem.found.startswith(expected)
    assert "parallel.zero_stage" in problem.change
