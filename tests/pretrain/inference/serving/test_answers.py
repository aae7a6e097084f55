"""What the official client gets: the same texts as `continue_prompts`, whole and streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from pretrain.inference.generate import continue_prompts
from pretrain.inference.sampling import Sampling
from tests.pretrain.inference.serving.local_server import LocalServer, serve_locally, tiny_model
from tests.pretrain.inference.tiny_runs import SENTENCES

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(tiny_model(tmp_path_factory.mktemp("run")), waiting=4096) as server:
        yield server


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with serve_locally(tiny_model(tmp_path_factory.mktemp("run"), with_template=True)) as server:
        yield server


def alone(local: LocalServer, prompt: str, count: int, sampling: Sampling = GREEDY) -> str:
    return continue_prompts(local.model, [prompt], max_new_tokens=count, sampling=sampling)[0]


def test_a_completion_is_the_greedy_continuation(local: LocalServer) -> None:
    answer = local.client().completions.create(model="tiny", prompt=SENTENCES[0], max_tokens=12, temperature=0)
    assert answer.choices[0].text == alone(local, SENTENCES[0], 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(local.model.tokenizer.encode(SENTENCES[0]))
    assert (answer.usage.completion_tokens, answer.model) == (12, "tiny")


def test_a_stream_holds_the_same_text_and_the_usage_that_was_asked_for(local: LocalServer) -> None:
    stream = local.client().completions.create(
        model="tiny",
        prompt=SENTENCES[1],
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == alone(local, SENTENCES[1], 20)
    assert len(texts) > 2
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [20]
    assert chunks[-2].choices[0].finish_reason == "length"


def test_several_prompts_and_copies_keep_their_order(local: LocalServer) -> None:
    answer = local.client().completions.create(
        model="tiny", prompt=SENTENCES, max_tokens=9, n=2, seed=5, temperature=1.3
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    sampling = Sampling(temperature=1.3, top_p=1.0, seed=5)
    assert [choice.text for choice in answer.choices[::2]] == [alone(local, text, 9, sampling) for text in SENTENCES]
    assert len({choice.text for choice in answer.choices}) == 6


def test_tokens_are_a_prompt_as_well(local: LocalServer) -> None:
    ids = local.model.tokenizer.encode(SENTENCES[2])
    one = local.client().completions.create(model="tiny", prompt=ids, max_tokens=7, temperature=0)
    two = local.client().completions.create(model="tiny", prompt=[ids, ids[:2]], max_tokens=7, temperature=0)
    assert one.choices[0].text == two.choices[0].text == alone(local, SENTENCES[2], 7)
    assert two.choices[1].text != one.choices[0].text


def test_stop_seed_and_the_settings_of_others_are_obeyed(local: LocalServer) -> None:
    client = local.client()
    whole = alone(local, SENTENCES[0], 12)
    stopped = client.completions.create(
        model="tiny", prompt=SENTENCES[0], max_tokens=12, temperature=0, stop=[whole[4:6], "never"]
    )
    assert stopped.choices[0].text == whole[: whole.index(whole[4:6])]
    assert stopped.choices[0].finish_reason == "stop"

    def write(**extra: object) -> str:
        answer = client.completions.create(
            model="tiny", prompt=SENTENCES[0], max_tokens=12, temperature=1.5, extra_body=extra
        )
        return answer.choices[0].text

    assert write(seed=3) == write(seed=3)
    assert len({write() for _ in range(4)}) == 4
    assert write(top_k=1) == whole
    penalized = Sampling(temperature=0, repetition_penalty=3.0)
    assert write(top_k=1, repetition_penalty=3.0) == alone(local, SENTENCES[0], 12, penalized) != whole


def test_models_are_listed_and_others_are_not_there(local: LocalServer) -> None:
    client = local.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "pretrain"
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.models.retrieve("large")
    with pytest.raises(openai.NotFoundError) as refusal:
        client.completions.create(model="large", prompt="a")
    assert refusal.value.code == "model_not_found"


def test_a_model_without_a_chat_template_refuses_to_chat(local: LocalServer) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        local.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "the"}])
    assert refusal.value.code == "no_chat_template"


def test_chat_goes_through_the_template(talking: LocalServer) -> None:
    client = talking.client()
    turns: list = [
        {"role": "system", "content": SENTENCES[0]},
        {"role": "user", "content": [{"type": "text", "text": "a small"}, {"type": "text", "text": " house"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=turns, max_completion_tokens=10, temperature=0)
    expected = alone(talking, f"{SENTENCES[0]} a small house the", 10)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    chunks = list(
        client.chat.completions.create(model="tiny", messages=turns, max_tokens=10, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    unlimited = client.chat.completions.create(model="tiny", messages=turns, temperature=0)
    assert unlimited.usage is not None
    assert unlimited.usage.total_tokens == 128  # as many as the model has positions
    with pytest.raises(openai.BadRequestError, match="no developers here"):
        client.chat.completions.create(model="tiny", messages=[{"role": "developer", "content": "x"}])


def ask_many(local: LocalServer, *, clients: int, requests: int) -> list[str]:
    """Requests of many clients whose answer differs from the single greedy one, or that failed."""
    words = " ".join(SENTENCES).split()
    prompts = [" ".join(words[start : start + length]) for start in range(8) for length in (1, 3, 7)]
    lengths = (1, 4, 11, 17)
    expected = {(prompt, count): alone(local, prompt, count) for prompt in prompts for count in lengths}
    here = threading.local()

    def ask(number: int) -> str | None:
        prompt, count = prompts[number % len(prompts)], lengths[number % 5 % len(lengths)]
        here.client = getattr(here, "client", None) or local.client()
        try:
            if number % 3:
                answer = here.client.completions.create(model="tiny", prompt=prompt, max_tokens=count, temperature=0)
                text = answer.choices[0].text
            else:
                stream = here.client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=count, temperature=0, stream=True
                )
                text = "".join(chunk.choices[0].text for chunk in stream)
        except openai.OpenAIError as error:
            return f"{number}: {error!r}"
        return None if text == expected[prompt, count] else f"{number}: {text!r} for {prompt!r}"

    with ThreadPoolExecutor(clients) as pool:
        return [wrong for wrong in pool.map(ask, range(requests)) if wrong]


def test_clients_together_get_what_each_would_get_alone(local: LocalServer) -> None:
    assert ask_many(local, clients=16, requests=64) == []


@pytest.mark.slow
def test_64_clients_get_2000_right_answers(local: LocalServer) -> None:
    assert ask_many(local, clients=64, requests=2000) == []
