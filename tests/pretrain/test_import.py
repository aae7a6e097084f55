"""Import: a Hugging Face folder comes in whole and checked, goes out bit-equal, and training starts from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.__main__ import run_command_line
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config import ModelSection
from pretrain.errors import CheckpointError, ConfigError
from pretrain.export import export_source, parse_size
from pretrain.import_folder import import_folder
from pretrain.initial_weights import start_from_import
from tests.pretrain.checkpoint.states import flip_byte
from tests.pretrain.inference.tiny_runs import write_tokenizer
from tests.pretrain.round_trip import REPORT, Row, cases, read_tensors, report, round_trip, save_model


def test_every_family_goes_round_bit_equal(tmp_path: Path) -> None:
    rows: list[Row] = []
    for number, case in enumerate(cases()):
        rows.append(round_trip(*case, tmp_path / str(number)))
        shutil.rmtree(tmp_path / str(number))
        assert rows[-1].is_bit_equal, rows[-1]
        assert rows[-1].logit_difference == 0, rows[-1]
    before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    REPORT.write_text(report(rows), encoding="utf-8")
    assert report(rows) == before, f"{REPORT.name} was another, and is written anew"


def test_configuration_and_tokenizer_come_back(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path / "original")
    (tmp_path / "original" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "top_k": 5}))
    assert run_command_line(["import", str(tmp_path / "original"), "-o", str(tmp_path / "in")]) == 0
    assert run_command_line(["export", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("original", "out"))
    assert {key: value for key, value in before.items() if after.get(key) != value} == {}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["top_k"]) == ([2, 7], 5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "original" / name).read_bytes()
    assert "Imported from the folder original" in (tmp_path / "out" / "README.md").read_text()


def test_experts_that_lie_together_in_the_files_are_read_as_well(tmp_path: Path) -> None:
    """Folders that earlier exports wrote name the modules' tensors; exported again they have the family's names."""
    save_model("mixtral", tmp_path / "original")
    import_folder(tmp_path / "original", tmp_path / "first")
    with Checkpoint(tmp_path / "first") as checkpoint:
        fused = {name: checkpoint.read(name, "master") for name in checkpoint.names()}
    shutil.copytree(tmp_path / "original", tmp_path / "fused")
    save_file(fused, tmp_path / "fused" / "model.safetensors")
    import_folder(tmp_path / "fused", tmp_path / "second")
    export_source(tmp_path / "second", tmp_path / "out")
    before, after = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_faults_of_a_folder_are_named_at_once(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.strange.weight"] = torch.zeros(3)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].double()
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(ConfigError) as refusal:
        import_folder(tmp_path / "bad", tmp_path / "out")
    found = "\n".join(problem.found for problem in refusal.value.problems)
    assert "tokenizer.json has ids up to 299, the model's vocabulary 200 rows" in found
    assert "model.strange.weight is no parameter" in found
    assert "model.norm.weight is not in the folder" in found
    assert "lm_head.weight" in found
    assert "(319, 32)" in found
    assert "has type F64" in found
    assert not (tmp_path / "out").exists()
    assert run_command_line(["import", str(tmp_path / "bad"), "-o", str(tmp_path / "out")]) == 64


@pytest.mark.parametrize("fault", ["missing", "truncated", "misplaced", "no index", "outside"])
def test_a_broken_shard_is_named(tmp_path: Path, fault: str) -> None:
    save_model("llama", tmp_path / "bad", max_shard_size="40KB")
    shard = sorted((tmp_path / "bad").glob("model-*.safetensors"))[1]
    index = tmp_path / "bad" / "model.safetensors.index.json"
    named = shard.name
    if fault == "missing":
        shard.unlink()
    elif fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif fault == "misplaced":
        weight_map = json.loads(index.read_text())
        name = next(name for name, file in weight_map["weight_map"].items() if file != shard.name)
        weight_map["weight_map"][name] = shard.name
        index.write_text(json.dumps(weight_map))
        named = f"{shard} does not hold {name}"
    elif fault == "no index":
        index.write_text("{")
        named = index.name
    else:
        weight_map = json.loads(index.read_text())
        weight_map["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
        index.write_text(json.dumps(weight_map))
        named = "is not the name of a file in the folder"
    with pytest.raises(ConfigError) as refusal:
        import_folder(tmp_path / "bad", tmp_path / "out")
    [problem] = refusal.value.problems
    assert named in problem.found
    assert not any(path.name != "bad" for path in tmp_path.iterdir())


@pytest.mark.parametrize("config", ['{"model_type": "no_such_family"}', '{"model_type": "vit"}', "{", "{}"])
def test_an_unknown_architecture_is_refused(tmp_path: Path, config: str) -> None:
    save_model("llama", tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(config)
    with pytest.raises(ConfigError):
        import_folder(tmp_path / "bad", tmp_path / "out")
    assert run_command_line(["import", str(tmp_path / "bad"), "-o", str(tmp_path / "out")]) == 64


def test_ties_that_the_files_deny_are_refused(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    import_folder(tmp_path / "bad", tmp_path / "twice the same")
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head.weight and transformer.wte.weight differ"):
        import_folder(tmp_path / "bad", tmp_path / "out")


def test_a_tokenizer_that_is_no_file_of_the_tokenizers_library_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        import_folder(tmp_path / "bad", tmp_path / "out")
    (tmp_path / "bad" / "tokenizer.json").rename(tmp_path / "bad" / "tokenizer.model")
    with pytest.raises(ConfigError, match="parts of a tokenizer"):
        import_folder(tmp_path / "bad", tmp_path / "out")


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "original")
    write_tokenizer(tmp_path / "mine")
    with pytest.raises(ConfigError, match="mine exists"):
        import_folder(tmp_path / "original", tmp_path / "mine")
    assert (tmp_path / "mine" / "tokenizer.json").exists()


def test_a_damaged_import_starts_no_run(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "original")
    import_folder(tmp_path / "original", tmp_path / "in")
    flip_byte(next((tmp_path / "in").glob("*.safetensors")), -1)
    with pytest.raises(CheckpointError, match="its hash differs"):
        start_from_import(None, ModelSection(weights=str(tmp_path / "in")))  # type: ignore[arg-type]


def test_sizes_have_units() -> None:
    assert [parse_size(text) for text in ("5GB", "500 MB", "1.5kb", "12")] == [5 * 10**9, 5 * 10**8, 1500, 12]
    with pytest.raises(ConfigError, match="max-shard-size"):
        parse_size("many")
