"""Export: transformers loads the folder with equal logits, or there is no folder."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pretrain import export, export_check, export_weights
from pretrain.__main__ import run_command_line
from pretrain.checkpoint.reader import Checkpoint
from pretrain.errors import CheckpointError, ConfigError
from pretrain.export import export_source
from tests.pretrain.checkpoint.states import flip_byte
from tests.pretrain.inference.tiny_runs import EOS, FIELDS, SENTENCES, build_network, write_run, write_tokenizer


@pytest.mark.parametrize("model_type", FIELDS)
@torch.no_grad()
def test_transformers_loads_the_folder_with_equal_logits(tmp_path: Path, model_type: str) -> None:
    network = build_network(model_type)
    write_run(tmp_path / "run", network)
    ids = torch.randint(320, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = network(input_ids=ids).logits

    exact = export_source(tmp_path / "run", tmp_path / "fp32", dtype="fp32")
    assert exact.rounding == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(input_ids=ids).logits, expected)

    rounded = export_source(tmp_path / "run", tmp_path / "bf16")
    assert 0 < rounded.rounding < export_check.ROUNDING_TOLERANCE
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert not torch.equal(loaded(input_ids=ids).logits, expected)
    assert (loaded(input_ids=ids).logits - expected).square().mean() < (0.05 * expected).square().mean()


def test_the_folder_holds_what_other_tools_expect(tmp_path: Path) -> None:
    network = build_network("llama")
    write_run(tmp_path / "run", network)
    report = export_source(tmp_path / "run", tmp_path / "my-model")
    assert {path.name for path in report.folder.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    config = json.loads((report.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True
    assert config["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(EOS)
    assert config["bos_token_id"] is None  # not the family's default, which is an ordinary token here
    assert GenerationConfig.from_pretrained(report.folder).eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]
    card = (report.folder / "README.md").read_text()
    assert "# my-model" in card
    assert "10 steps, 10,000 tokens" in card
    assert (report.step, report.files, report.tensors) == (10, 1, len(list(network.named_parameters())))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build_network("qwen3"))
    export_source(tmp_path / "run", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_shards_have_bounded_size_and_an_index(tmp_path: Path) -> None:
    network = build_network("llama")
    write_run(tmp_path / "run", network)
    report = export_source(tmp_path / "run", tmp_path / "out", dtype="fp32", shard_bytes=100_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) == report.files > 2
    assert all(shard.stat().st_size < 105_000 for shard in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(weight.numel() for weight in network.parameters())
    assert set(index["weight_map"]) == {name for name, _ in network.named_parameters()}
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in network.named_parameters())


def test_the_best_checkpoint_of_a_run_is_exported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build_network("llama", 1), step=1, is_best=True)
    latest = write_run(tmp_path / "run", build_network("llama", 2), step=2)
    assert export_source(tmp_path / "run", tmp_path / "best").step == 1
    assert export_source(latest, tmp_path / "latest").step == 2


def test_a_run_without_tokenizer_is_exported_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path / "run", build_network("llama"), tokenizer={})
    export_source(tmp_path / "run", tmp_path / "out")
    assert "kept no tokenizer" in caplog.text
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_tokenizer_without_configuration_is_made_loadable(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "run" / "tokenizer", with_config=False)
    write_run(tmp_path / "run", build_network("llama"))
    export_source(tmp_path / "run", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode(SENTENCES[1])) == SENTENCES[1]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    with (tmp_path / "run" / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match="has sha256 .*, the model knows"):
        export_source(tmp_path / "run", tmp_path / "out")


def test_an_existing_output_and_wrong_values_are_refused_together(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError) as refusal:
        export_source(tmp_path / "run", tmp_path / "out", dtype="int3", shard_bytes=0)  # type: ignore[arg-type]
    assert len(refusal.value.problems) == 3
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", build_network("llama"))
    flip_byte(next(iter(path.glob("*.safetensors"))), -1)
    with pytest.raises(CheckpointError, match="its hash differs"):
        export_source(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_tensor_is_found_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    write = export_weights._write_shard

    def damaging(checkpoint: Checkpoint, path: Path, *words: Any) -> None:
        write(checkpoint, path, *words)
        flip_byte(path, -1)

    monkeypatch.setattr(export_weights, "_write_shard", damaging)
    with pytest.raises(CheckpointError, match="is not what the checkpoint holds"):
        export_source(tmp_path / "run", tmp_path / "out")
    monkeypatch.setattr(export, "check_tensors", lambda *_: None)  # then the logits must tell
    with pytest.raises(CheckpointError, match="logits of the exported model differ"):
        export_source(tmp_path / "run", tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


def test_a_wrong_configuration_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    card = export.model_card

    def damaging(checkpoint: Checkpoint, name: str, types: Mapping[str, str]) -> str:
        file = tmp_path / f".staging-{name}" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
        return card(checkpoint, name, types)

    monkeypatch.setattr(export, "model_card", damaging)
    with pytest.raises(CheckpointError, match="logits of the exported model differ"):
        export_source(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_much_rounding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    monkeypatch.setattr(export_check, "ROUNDING_TOLERANCE", 1e-6)
    with pytest.raises(CheckpointError, match="export as fp32"):
        export_source(tmp_path / "run", tmp_path / "out")
    export_source(tmp_path / "run", tmp_path / "out", dtype="fp32")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", build_network("llama"))

    def failing(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_weights, "_write_shard", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        export_source(tmp_path / "run", tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


def test_the_commands_write_text_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    run, output = str(tmp_path / "run"), str(tmp_path / "out")
    assert run_command_line(["export", run, "--output", output, "--dtype", "fp32"]) == 0
    assert "tensors and logits equal" in capsys.readouterr().out
    assert run_command_line(["export", run, "--output", output]) == 64
    words = ["--prompt", SENTENCES[0], "--prompt", "rain", "--max-new-tokens", "5", "--temperature", "0"]
    assert run_command_line(["generate", output, *words]) == 0
    from_folder = capsys.readouterr().out
    assert from_folder.startswith(SENTENCES[0])
    assert "\n\nrain" in from_folder
    assert run_command_line(["generate", run, *words]) == 0
    assert capsys.readouterr().out == from_folder
    assert run_command_line(["generate", run, *words, "--top-p", "0"]) == 64
