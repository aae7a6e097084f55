"""Training goes on from an imported model, with all weights or with adapters, on every layout that allows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pretrain.__main__ import run_command_line
from pretrain.adapters import open_model
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config import load_config
from pretrain.errors import CheckpointError, ConfigError
from pretrain.inference.load import load_network, load_source
from pretrain.models.build import ModelBuilder
from pretrain.run_plan import load_and_plan
from tests.distributed.ranks import RankPool
from tests.pretrain.continued_runs import STEPS, prepare, train_run
from tests.pretrain.round_trip import logits_of, read_tensors

pytestmark = pytest.mark.ranks

PLAIN = "parallel.engine=plain"
FULL_LAYOUTS = {
    "ZeRO 1": ["parallel.engine=zero"],
    "ZeRO 3": ["parallel.engine=zero", "parallel.zero_stage=3"],
    "pipeline": ["parallel.pipeline=2"],
    "tensor": ["parallel.tensor=2"],
    "FSDP2": ["parallel.data_parallel=shard", "parallel.engine=accelerate"],
}
LORA_LAYOUTS = {
    "ZeRO 0": ["parallel.engine=zero", "parallel.zero_stage=0"],
    "ZeRO 1": ["parallel.engine=zero"],
    "ZeRO 2": ["parallel.engine=zero", "parallel.zero_stage=2"],
    "DDP": ["parallel.engine=accelerate"],
    "ZeRO 1, recomputation": ["parallel.engine=zero", "execution.recomputation=full"],
}
Pool = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, rank_pool: Pool) -> Path:
    """One process' run of all weights in `full`, of adapters in `adapters`."""
    folder = tmp_path_factory.mktemp("continued")
    for kind, lora in (("full", {}), ("adapters", {"rank": 4, "alpha": 8.0})):
        path = prepare(folder, **lora)
        [losses] = rank_pool(1).run(train_run, str(path), str(folder / kind), [PLAIN])
        (folder / f"{kind}.txt").write_text(" ".join(map(repr, losses)))
    return folder


def reference(folder: Path, kind: str) -> list[float]:
    return [float(word) for word in (folder / f"{kind}.txt").read_text().split()]


def layouts(known: dict[str, list[str]], *quick: str) -> list[object]:
    """The names of all; those that are not among the quick ones are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in known]


@pytest.mark.parametrize("layout", layouts(FULL_LAYOUTS, "ZeRO 3", "tensor"))
def test_all_layouts_start_from_the_imported_weights(place: Path, rank_pool: Pool, layout: str) -> None:
    found = rank_pool(2).run(train_run, str(place / "full.yaml"), str(place / layout), FULL_LAYOUTS[layout])[0]
    assert found == pytest.approx(reference(place, "full"), rel=1e-5)
    assert found[-1] < found[0] - 0.3


@pytest.mark.parametrize("layout", layouts(LORA_LAYOUTS, "ZeRO 2", "DDP"))
def test_adapters_train_alike_on_every_layout_that_allows_them(place: Path, rank_pool: Pool, layout: str) -> None:
    folder = place / f"adapters {layout}"
    found = rank_pool(2).run(train_run, str(place / "lora.yaml"), str(folder), LORA_LAYOUTS[layout])[0]
    assert found == pytest.approx(reference(place, "adapters"), rel=1e-5)
    assert found[-1] < found[0] - 0.1


def test_imported_weights_are_those_of_the_folder(place: Path) -> None:
    """A run that reads the Hugging Face folder itself takes the same first step."""
    config = load_config(place / "full.yaml", [f"model.weights={place / 'original'}"])
    model = ModelBuilder(config.model, seed=1, sequence_length=32, execution=config.execution, loss=config.loss).build(
        "cpu"
    )
    with Checkpoint(place / "imported") as checkpoint:
        for name, weight in model.network.named_parameters():
            assert torch.equal(weight, checkpoint.read(name, "master"))


def test_checkpoints_hold_adapters_alone_and_resume_exactly(place: Path, rank_pool: Pool) -> None:
    folder, path = place / "stopped", str(place / "lora.yaml")
    rank_pool(2).run(train_run, path, str(folder), ["parallel.engine=zero", "schedule.stop_at_step=3"])
    with Checkpoint(folder / "checkpoints" / "step-00000003") as checkpoint:
        assert all(".lora_" in name for name in checkpoint.names())
        assert checkpoint.kinds(checkpoint.names()[0]) == ["exp_avg", "exp_avg_sq", "master"]
        assert checkpoint.manifest.metadata["lora"]["base"]["folder"] == str(place / "imported")
    [losses] = rank_pool(1).run(train_run, path, str(folder), [PLAIN])
    assert losses == pytest.approx(reference(place, "adapters"), rel=1e-5)
    assert len(losses) == STEPS + 1
    again = place / "stopped plain"
    rank_pool(1).run(train_run, path, str(again), [PLAIN, "schedule.stop_at_step=3"])
    [losses] = rank_pool(1).run(train_run, path, str(again), [PLAIN])
    assert losses == reference(place, "adapters")


def test_adapters_of_another_base_or_scale_are_refused(place: Path, rank_pool: Pool, tmp_path: Path) -> None:
    shutil.copytree(place / "adapters", tmp_path / "run")
    prepare(tmp_path, family="qwen3")
    other = [PLAIN, f"model.weights={tmp_path / 'imported'}"]
    with pytest.raises(AssertionError, match="has adapters of a model with hash"):
        rank_pool(1).run(train_run, str(place / "lora.yaml"), str(tmp_path / "run"), other)
    with pytest.raises(AssertionError, match=r"model\.lora\.alpha 8, the run says 16"):
        rank_pool(1).run(train_run, str(place / "lora.yaml"), str(tmp_path / "run"), [PLAIN, "model.lora.alpha=16.0"])


def test_the_merged_export_is_pefts_own_merge(place: Path, tmp_path: Path) -> None:
    words = ["export", str(place / "adapters"), "-o"]
    assert run_command_line([*words, str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    assert run_command_line([*words, str(tmp_path / "adapter"), "--adapter"]) == 0
    base = AutoModelForCausalLM.from_pretrained(place / "original", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    logits = logits_of(adapted)
    merged = dict(adapted.merge_and_unload().named_parameters())
    ours = read_tensors(tmp_path / "merged")
    assert all(torch.equal(ours[name], weight) for name, weight in merged.items())
    original = read_tensors(place / "original")
    assert not torch.equal(ours["model.layers.0.mlp.up_proj.weight"], original["model.layers.0.mlp.up_proj.weight"])
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(found, logits, atol=1e-4)
    with open_model(place / "adapters") as checkpoint:
        assert torch.equal(logits_of(load_network(checkpoint)), found)
    assert run_command_line(["export", str(place / "full"), "-o", str(tmp_path / "no"), "--adapter"]) == 64


def test_gpt2s_matrices_lie_the_other_way_round(tmp_path: Path, rank_pool: Pool) -> None:
    path = prepare(tmp_path, family="gpt2", rank=2, targets=["c_attn", "c_proj"])
    [losses] = rank_pool(1).run(train_run, str(path), str(tmp_path / "run"), [PLAIN])
    assert losses[-1] < losses[0]
    assert run_command_line(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert run_command_line(["export", str(tmp_path / "run"), "-o", str(tmp_path / "adapter"), "--adapter"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    merged = dict(PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    ours = read_tensors(tmp_path / "out")
    assert all(torch.equal(ours[name], weight) for name, weight in merged.items())


def test_a_run_whose_base_is_gone_says_so(place: Path, tmp_path: Path, rank_pool: Pool) -> None:
    path = prepare(tmp_path, rank=2)
    rank_pool(1).run(train_run, str(path), str(tmp_path / "run"), [PLAIN])
    (tmp_path / "imported").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="which is not there as it was"):
        load_source(tmp_path / "run")


def test_wishes_that_cannot_be_met_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="did not write"):
        load_and_plan(place / "lora.yaml", [f"model.weights={place / 'original'}"], 1)
    with pytest.raises(ConfigError, match="no weights that adapters"):
        load_and_plan(place / "lora.yaml", ["model.weights=null", "model.model_type=llama"], 1)
    with pytest.raises(ConfigError, match="LoRA with ZeRO stage 3"):
        load_and_plan(place / "lora.yaml", ["parallel.zero_stage=3"], 2)
    config = load_config(place / "lora.yaml", ["model.lora.targets=[q_proj, nothing]"])
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: nothing"):
        ModelBuilder(config.model, seed=1, sequence_length=32, execution=config.execution, loss=config.loss).build(
            "cpu"
        )
