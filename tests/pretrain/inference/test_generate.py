"""Generation: sources, padding, seeds, stops, and refusals."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import CheckpointError, ConfigError
from pretrain.export import export_source
from pretrain.inference.generate import Sampling, continue_prompts, generate_from
from pretrain.inference.load import LoadedModel, load_source
from tests.pretrain.checkpoint.states import flip_byte
from tests.pretrain.inference.tiny_runs import EOS, FIELDS, SENTENCES, build_network, write_run, write_tokenizer

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=FIELDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, build_network(request.param))
    return load_source(folder)


@torch.no_grad()
def greedy_without_cache(model: LoadedModel, prompt: str, count: int) -> str:
    """The likeliest continuation, every token from a whole new forward."""
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    start = len(ids)
    for _ in range(count):
        logits = model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            return model.tokenizer.decode(ids[start:-1])
    return model.tokenizer.decode(ids[start:])


def test_batched_prompts_give_what_each_gives_alone_and_without_cache(model: LoadedModel) -> None:
    prompts = ["the", "rain fell on the roof all night and", "a small"]
    together = continue_prompts(model, prompts, max_new_tokens=12, sampling=GREEDY)
    for prompt, text in zip(prompts, together, strict=True):
        assert [text] == continue_prompts(model, [prompt], max_new_tokens=12, sampling=GREEDY)
        assert text == greedy_without_cache(model, prompt, 12)
    assert len(set(together)) > 1


def test_equal_seeds_write_equal_text_and_others_do_not(model: LoadedModel) -> None:
    def write(**changes: float) -> str:
        sampling = dataclasses.replace(Sampling(temperature=1.0, top_p=1.0), **changes)
        return continue_prompts(model, [SENTENCES[0]], max_new_tokens=20, sampling=sampling)[0]

    state = torch.random.get_rng_state()
    assert write(seed=1) == write(seed=1)
    assert len({write(seed=seed) for seed in range(4)}) == 4
    assert torch.equal(torch.random.get_rng_state(), state)
    greedy = continue_prompts(model, [SENTENCES[0]], max_new_tokens=20, sampling=GREEDY)[0]
    assert write(top_k=1) == write(top_p=1e-6) == greedy != write(seed=1)


def test_end_of_text_ends_a_text_and_is_not_shown(tmp_path: Path) -> None:
    write_run(tmp_path, build_network("llama"))
    model = load_source(tmp_path)
    (whole,) = continue_prompts(model, [SENTENCES[0]], max_new_tokens=8, sampling=GREEDY)
    ids = model.tokenizer.encode(SENTENCES[0])
    third = greedy_ids(model, ids, 3)[-1]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(third)
    (short,) = continue_prompts(model, [SENTENCES[0]], max_new_tokens=8, sampling=GREEDY)
    assert whole.startswith(short)
    assert len(short) < len(whole)


@torch.no_grad()
def greedy_ids(model: LoadedModel, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model.network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_run_checkpoint_and_exported_folder_write_the_same(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", build_network("llama"))
    export_source(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    texts = {
        generate_from(source, [SENTENCES[1]], max_new_tokens=10, sampling=Sampling(seed=5))[0]
        for source in (tmp_path / "run", tmp_path / "run" / "checkpoints", checkpoint, tmp_path / "exported")
    }
    assert len(texts) == 1


def test_a_lower_precision_can_be_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, build_network("llama"))
    model = load_source(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.network.parameters()} == {torch.bfloat16}
    assert continue_prompts(model, [SENTENCES[0]], max_new_tokens=3, sampling=GREEDY)


def test_bad_prompts_are_refused_together(model: LoadedModel) -> None:
    with pytest.raises(ConfigError) as refusal:
        continue_prompts(model, ["", "the " * 100], max_new_tokens=100, sampling=GREEDY)
    assert "has no tokens" in str(refusal.value)
    assert "at most 128 positions" in str(refusal.value)
    with pytest.raises(ConfigError, match="no prompt"):
        continue_prompts(model, [], max_new_tokens=1, sampling=GREEDY)


def test_bad_sampling_is_refused_together() -> None:
    with pytest.raises(ConfigError) as refusal:
        Sampling(temperature=-1, top_p=0, top_k=-1, seed=-1)
    assert len(refusal.value.problems) == 4


def test_special_tokens_in_a_prompt_stay_what_the_tokenizer_makes_of_them(model: LoadedModel) -> None:
    assert model.tokenizer.encode(EOS, add_special_tokens=False) == [model.tokenizer.eos_token_id]


def test_damaged_checkpoints_and_missing_parts_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", build_network("llama"))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_source(tmp_path / "nowhere")
    write_run(tmp_path / "bare", build_network("llama"), tokenizer={})
    with pytest.raises(CheckpointError, match="comes without a tokenizer"):
        load_source(tmp_path / "bare")
    flip_byte(next(iter(path.glob("*.safetensors"))), -1)
    with pytest.raises(CheckpointError, match="its hash differs"):
        load_source(tmp_path / "run")


def test_a_configuration_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    network = build_network("llama")
    values = network.config.to_dict() | {"intermediate_size": 80}
    write_run(tmp_path, network, model_config=values)
    with pytest.raises(CheckpointError, match=r"\(96, 64\) in the checkpoint, \(80, 64\) in the model"):
        load_source(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    network = build_network("llama")
    write_run(tmp_path, network, model_config=network.config.to_dict() | {"vocab_size": 299})
    with pytest.raises(CheckpointError, match="the tokenizer has 300 tokens, the model 299"):
        load_source(tmp_path)


def test_an_exported_folder_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    export_source(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys.*layers\.1\.mlp\.up_proj"):
        load_source(tmp_path / "out")


def test_a_tokenizer_made_of_a_model_file_is_known_by_that_file(tmp_path: Path) -> None:
    """As of sentencepiece: the hash in the manifest is the .model's, the tokenizer.json lies beside it."""
    (tmp_path / "tokenizer").mkdir()
    model = tmp_path / "tokenizer" / "mine.model"
    model.write_bytes(b"pieces")
    write_tokenizer(tmp_path / "tokenizer")
    known = {"folder": "../../tokenizer", "file": model.name, "sha256": hashlib.sha256(b"pieces").hexdigest()}
    write_run(tmp_path, build_network("llama"), tokenizer=known)
    assert load_source(tmp_path).tokenizer.eos_token == EOS
    model.write_bytes(b"others")
    with pytest.raises(CheckpointError, match=r"mine.model has sha256 .* the model knows"):
        load_source(tmp_path)
