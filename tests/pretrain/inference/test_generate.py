"""Generation: sources, padding, seeds, stops, and refusals."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.export import export_source
from pretrain.inference.generate import answer_requests, continue_prompts, encode, generate_from, stream_requests
from pretrain.inference.load import LoadedModel, load_source
from pretrain.inference.requests import Request
from pretrain.inference.running_batch import RunningBatch
from pretrain.inference.sampling import Sampling
from tests.pretrain.checkpoint.states import flip_byte
from tests.pretrain.inference.tiny_runs import EOS, SENTENCES, build_network, write_run, write_tokenizer

GREEDY = Sampling(temperature=0)
WINDOW = {"num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "mixtral": WINDOW | {"sliding_window": None, "num_local_experts": 4},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, build_network(request.param, **FAMILIES[request.param]))
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


def test_rows_that_join_and_leave_between_steps_change_nothing_for_the_others(model: LoadedModel) -> None:
    """More prompts than rows, of lengths that make the cache shift, grow and close gaps."""
    words = " ".join(SENTENCES).split()
    requests = [
        Request(
            prompt=encode(model, " ".join(words[: 1 + 5 * place % 17])),
            max_new_tokens=1 + 11 * place % 29,
            sampling=GREEDY if place % 2 else Sampling(temperature=1.5, top_k=40, repetition_penalty=1.3, seed=place),
        )
        for place in range(14)
    ]
    alone = [next(answer_requests(model, [request], rows_at_a_time=1)) for request in requests]
    for rows in (3, 14):
        assert list(answer_requests(model, requests, rows_at_a_time=rows)) == alone
    assert len({answer.text for answer in alone}) > 10


def test_long_prompts_are_read_in_pieces_while_others_write(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = " ".join(SENTENCES).split()
    prompts = ["the", " ".join(words[:17]), " ".join(words[3:8]), " ".join(words[5:14])]
    requests = [Request(prompt=encode(model, prompt), max_new_tokens=12, sampling=GREEDY) for prompt in prompts]
    alone = [next(answer_requests(model, [request], rows_at_a_time=1)) for request in requests]
    monkeypatch.setattr("pretrain.inference.running_batch.PIECE_TOKENS", 5)
    batch: RunningBatch[int] = RunningBatch(model, max_rows=4)
    texts = [""] * 4
    steps = [batch.step([(0, requests[0])]), batch.step([(1, requests[1]), (2, requests[2]), (3, requests[3])])]
    assert len(batch) == 4
    assert batch.choose_joining([(4, requests[0])]) == 0
    batch.remove(3)  # while its prompt is read
    while len(batch):
        steps.append(batch.step([]))
    for pieces in steps:
        for key, piece in pieces:
            texts[key] += piece.text
    keys = [{key for key, _ in pieces} for pieces in steps]
    reading = (len(requests[1].prompt) - 1) // 5 + 1  # steps that its pieces take
    assert keys[: reading + 1] == [{0}] * reading + [{0, 1, 2}]
    assert texts == [*(answer.text for answer in alone[:3]), ""]
    batch.step([(0, requests[0])])
    batch.step([(1, requests[1])])
    batch.remove(1)
    assert batch.keys == [0]
    assert batch.choose_joining([(4, requests[0])]) == 1


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


def test_a_stop_string_ends_a_text_before_it(model: LoadedModel) -> None:
    prompts = [SENTENCES[0], SENTENCES[2]]
    whole, neighbour = continue_prompts(model, prompts, max_new_tokens=12, sampling=GREEDY)
    stop = whole[3:5]
    short, unchanged = continue_prompts(model, prompts, max_new_tokens=12, sampling=GREEDY, stops=[stop, "never"])
    assert short == whole[: whole.index(stop)]
    assert unchanged == neighbour.split(stop)[0]


def test_pieces_put_together_are_the_answer(model: LoadedModel) -> None:
    sampling = Sampling(temperature=1.2, seed=3)
    requests = [Request(prompt=encode(model, text), max_new_tokens=20, sampling=sampling) for text in SENTENCES]
    texts = ["", "", ""]
    pieces = list(stream_requests(model, requests, rows_at_a_time=2))
    for index, piece in pieces:
        texts[index] += piece.text
    assert texts == [answer.text for answer in answer_requests(model, requests, rows_at_a_time=3)]
    assert len(pieces) > 30
    assert sum(piece.finish is not None for _, piece in pieces) == 3


def test_a_folder_may_name_more_tokens_that_end_a_text(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build_network("llama"))
    export_source(tmp_path / "run", tmp_path / "out", dtype="fp32")
    model = load_source(tmp_path / "out")
    (whole,) = answer_requests(model, [_request_of(model)], rows_at_a_time=1)
    second = greedy_ids(model, encode(model, SENTENCES[0]), 2)[-1]
    (tmp_path / "out" / "generation_config.json").write_text(f'{{"eos_token_id": [0, {second}]}}')
    (short,) = answer_requests(model, [_request_of(model)], rows_at_a_time=1)
    assert (whole.finish, whole.tokens, short.finish, short.tokens) == ("length", 8, "stop", 2)


def _request_of(model: LoadedModel) -> Request:
    return Request(prompt=encode(model, SENTENCES[0]), max_new_tokens=8, sampling=GREEDY)


def test_logits_that_are_not_numbers_are_an_error(tmp_path: Path) -> None:
    network = build_network("llama")
    with torch.no_grad():
        network.model.norm.weight[0] = torch.nan
    write_run(tmp_path, network)
    with pytest.raises(DataError, match="logits are not numbers"):
        continue_prompts(load_source(tmp_path), ["the"], max_new_tokens=2, sampling=GREEDY)


def test_models_whose_memory_is_not_of_tokens_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, build_network("llama"))
    model = load_source(tmp_path)
    model.network.config.is_encoder_decoder = True
    with pytest.raises(CheckpointError, match="is an encoder-decoder"):
        continue_prompts(model, ["the"], max_new_tokens=2, sampling=GREEDY)


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
    assert "request 1: a prompt without tokens" in str(refusal.value)
    assert "request 2: a prompt of" in str(refusal.value)
    assert "at most 128 positions" in str(refusal.value)
    with pytest.raises(ConfigError, match="no prompt"):
        continue_prompts(model, [], max_new_tokens=1, sampling=GREEDY)


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
