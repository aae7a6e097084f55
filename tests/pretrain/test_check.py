"""`pretrain check` and `pretrain presets`: fast, without torch, right for every recipe, and all problems at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.models.presets import PRESETS
from pretrain.preset_table import RESERVED_GIB, preset_rows
from pretrain.run_plan import plan_run
from tests.architecture.recipe_table import world_size_of
from tests.pretrain.data.datasets import numbered_rows

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").rglob("*.yaml"))
DEVICE_GIB = 80
# Modules that take seconds to import; `pretrain check` of a known family must not.
HEAVY = ("torch", "transformers", "deepspeed", "accelerate", "mlflow", "numpy", "datasets")
PROBE = """
import sys
from pretrain.__main__ import run_command_line
code = run_command_line(sys.argv[1:])
heavy = {heavy!r}
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]
sys.exit(code)
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    probe = PROBE.format(heavy=HEAVY)
    return subprocess.run(
        [sys.executable, "-c", probe, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes name ds_configs/ relative to it


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_and_fits_its_gpus(recipe: Path) -> None:
    world_size = world_size_of(recipe)
    plan = plan_run(load_config(recipe), world_size)
    assert plan.memory.total < (DEVICE_GIB - RESERVED_GIB) * 2**30


def test_recipes_cover_the_presets() -> None:
    used = {load_config(recipe).model.preset for recipe in RECIPES}
    assert used >= set(PRESETS)


def test_check_prints_every_part_without_heavy_imports() -> None:
    done = command("check", "launch/recipes/llama-7b.yaml", "--world-size", "32")
    assert done.returncode == 0, done.stderr
    for words in ("32 ranks", "1,024 rows", "4,194,304 tokens", "6,738,415,616", "forward", "moments", "data 31"):
        assert words in done.stdout, words


def test_json_holds_the_same_numbers() -> None:
    done = command("check", "launch/recipes/llama-7b.yaml", "--world-size", "32", "--json")
    values: dict[str, Any] = json.loads(done.stdout)
    assert values["parameters"]["total"] == 6_738_415_616
    assert values["batch"]["tokens_per_step"] == 1024 * 4096
    assert values["layout"] == {"pipeline": 1, "data": 32, "sequence": 1, "tensor": 1, "expert": 1, "world_size": 32}
    memory = values["memory_per_rank_bytes"]
    assert memory.pop("total") == sum(memory.values())
    flops = values["flops_per_token"]
    assert flops["training"] == flops["forward"] + flops["backward"]


def test_overrides_reach_the_plan() -> None:
    done = command("check", "launch/recipes/gpt2-125m.yaml", "model.n_layer=24", "--json", "--world-size=8")
    assert json.loads(done.stdout)["model"]["layers"] == 24


def test_problems_of_every_part_come_together_with_exit_code_64(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        """
name: wrong
model: {model_type: llama, hiden_size: 256}
data: {train: nowhere}
batch: {sequence_length: 512, micro_batch_size: 4, global_batch_size: 33}
optimizer: {learning_rate: 1e-3}
schedule: {total_steps: 10}
precision: fp16
parallel: {zero_stage: 0, sequence: 2, deepspeed_config: absent.json}
""",
        encoding="utf-8",
    )
    done = command("check", str(path), "--json", "--world-size", "2")
    assert done.returncode == 64
    found = [problem["found"] for problem in json.loads(done.stdout)["problems"]]
    assert len(found) == 5
    for words in ("hiden_size", "33 rows", "fp16 with ZeRO stage 0", "sequence parallelism", "absent.json"):
        assert any(words in text for text in found), words
    assert "1. " in done.stderr
    assert "5. " in done.stderr


def test_a_number_with_two_owners_is_refused_with_both_places(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"own\.json(.|\n)*parallel\.zero_stage") as caught:
        plan_run(load_config(RECIPES[0], [f"parallel.deepspeed_config={file}"]), 8)
    assert len(caught.value.problems) == 1


def test_a_missing_data_folder_is_only_a_warning() -> None:
    plan = plan_run(load_config(RECIPES[0], ["data.train=nowhere"]), 8)
    assert "data.train[0]: nowhere is not a folder here" in plan.warnings


def test_what_is_read_of_each_source_is_shown_and_must_suffice(tmp_path: Path) -> None:
    for name, rows in {"web": 30, "code": 10}.items():
        numbered_rows(tmp_path / name, rows, 16)
    sources = f"data.train=[{{path: {tmp_path}/web, weight: 3}}, {{path: {tmp_path}/code, weight: 1, max_epochs: 2}}]"
    sizes = "batch={sequence_length: 16, micro_batch_size: 1, global_batch_size: 4}"
    common = (str(RECIPES[0]), "model.preset=llama-125m", "model.vocab_size=60000", sources, sizes)
    limited = ("model.max_position_embeddings=16", "schedule={total_steps: 40, warmup_steps: 1}", "data.validation={}")
    values = plan_of(*common, *limited)
    assert values["data"]["given"]["code"] == {"rows": 20, "tokens": 320, "epochs": 2.0}
    assert values["data"]["given"]["web"]["rows"] == 140
    assert "web will be read 4.7 times" in values["data"]["warnings"][0]
    both = sources.replace("weight: 3", "weight: 3, max_epochs: 4")
    refused = plan_of(*common, *limited, both, expected=65)
    (problem,) = refused["problems"]
    assert "asks for 2,560 tokens, and every source that has a weight is used up after 2,240" in problem["found"]


def plan_of(*arguments: str, expected: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "check", *arguments, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def test_other_model_types_are_counted_on_the_built_model() -> None:
    fields = ["model={model_type: gpt_neox, vocab_size: 512, hidden_size: 64, num_attention_heads: 4, "]
    fields[0] += "intermediate_size: 256, num_hidden_layers: 2}"
    plan = plan_run(load_config(RECIPES[0], fields), 8)
    block = 4 * 64 * 64 + 2 * 64 * 256
    assert plan.parameters.matmul_weights == 2 * block + 512 * 64
    assert plan.parameters.total == 2 * (block + 4 * 64 + 256 + 64 + 4 * 64) + 2 * 64 + 2 * 512 * 64
    assert any("gpt_neox" in warning for warning in plan.warnings)


def test_presets_table_is_fast_and_names_all() -> None:
    for option in ([], ["--markdown"]):
        done = command("presets", *option)
        assert done.returncode == 0, done.stderr
        assert all(name in done.stdout for name in PRESETS)


def test_more_sharding_never_needs_more_devices() -> None:
    for row in preset_rows():
        for device in (80, 40):
            whole, sharded = row.fewest[device, 1], row.fewest[device, 3]
            assert sharded is not None
            assert whole is None or sharded <= whole
        assert row.one_device_gib * 2**30 > 18 * row.parameters


def test_mistakes_in_keys_values_model_and_batch_are_told_together() -> None:
    mistakes = ("optimizr.x=1", "model.hidden_sise=3", "batch.global_batch_size=1001", "precision=fp8", "seed=-1")
    result = command("check", "launch/recipes/llama-7b.yaml", *mistakes, "--world-size", "32")
    assert result.returncode == 64
    assert len(re.findall(r"^(?:error: )?\d+\. ", result.stderr, re.MULTILINE)) == len(mistakes)


def test_a_wrong_key_without_a_default_hides_nothing_and_adds_nothing() -> None:
    wrong = ("batch.micro_batch_size=0", "optimizer.learning_rate=fast")
    result = command("check", "launch/recipes/llama-7b.yaml", *wrong, "model.preset=llama-7", "--world-size", "6")
    assert len(re.findall(r"^(?:error: )?\d+\. ", result.stderr, re.MULTILINE)) == 4  # the last: 1024 rows on 6 ranks
