"""Requests that are wrong, too big, too many, too slow or abandoned: a proper answer, and the next one is served."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.inference.serving.bodies import LABELS, WITHOUT_EFFECT, ChatBody, CompletionBody
from tests.pretrain.inference.serving.local_server import SECONDS, LocalServer, serve_locally, tiny_model, wait_until

TOKEN = "only-for-this-test-0123456789"
GOOD = {"model": "tiny", "prompt": "the ship", "max_tokens": 4, "temperature": 0}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "the"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model(folder, with_template=True, max_position_embeddings=4096)
    with serve_locally(model, running=4, waiting=6, body_bytes=20_000, body_seconds=1.5, head_seconds=1.5) as server:
        yield server


@pytest.fixture(autouse=True)
def still_serving(local: LocalServer) -> Iterator[None]:
    yield
    require_service(local)


def require_service(local: LocalServer) -> None:
    """Whatever a test did, nothing of it is left, and the next request is answered."""
    status, answer = local.post(GOOD)
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "length"), answer
    wait_until(lambda: local.server.scheduler.running == local.server.scheduler.waiting == 0)


BAD = {
    "no JSON": (b"{", 400, "invalid_json"),
    "empty": (b"", 400, "invalid_json"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "invalid_json"),
    "half a surrogate": (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "invalid_json"),
    "NaN": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "invalid_json"),
    "deep": (b"[" * 9000, 400, "invalid_json"),
    "a list": ([], 400, "invalid_json"),
    "no model": ({"prompt": "a"}, 400, "missing_parameter"),
    "no prompt": ({"model": "tiny"}, 400, "missing_parameter"),
    "another model": (GOOD | {"model": "huge"}, 404, "model_not_found"),
    "empty prompt": (GOOD | {"prompt": ""}, 400, None),
    "no prompts": (GOOD | {"prompt": []}, 400, "invalid_value"),
    "number as prompt": (GOOD | {"prompt": 3}, 400, "invalid_value"),
    "mixed prompts": (GOOD | {"prompt": ["a", 3]}, 400, "invalid_value"),
    "unknown token": (GOOD | {"prompt": [320]}, 400, None),
    "negative token": (GOOD | {"prompt": [-1]}, 400, None),
    "no tokens": (GOOD | {"prompt": [[], [1]]}, 400, None),
    "too long": (GOOD | {"prompt": [5] * 4095}, 400, "context_length_exceeded"),
    "too many new": (GOOD | {"max_tokens": 2049}, 400, None),
    "no new": (GOOD | {"max_tokens": 0}, 400, "invalid_value"),
    "true as number": (GOOD | {"max_tokens": True}, 400, "invalid_value"),
    "text as number": (GOOD | {"temperature": "0"}, 400, "invalid_value"),
    "cold": (GOOD | {"temperature": -1}, 400, "invalid_value"),
    "top_p 0": (GOOD | {"top_p": 0}, 400, "invalid_value"),
    "too many answers": (GOOD | {"n": 40, "prompt": ["a", "b"]}, 400, None),
    "empty stop": (GOOD | {"stop": [""]}, 400, "invalid_value"),
    "stream options alone": (GOOD | {"stream_options": {"include_usage": True}}, 400, None),
    "unknown": (GOOD | {"max_new_tokens": 3}, 400, "unknown_parameter"),
    "logprobs": (GOOD | {"logprobs": 1}, 400, "unsupported_parameter"),
    "logprobs 0": (GOOD | {"logprobs": 0}, 400, "unsupported_parameter"),
    "best_of": (GOOD | {"best_of": 2}, 400, "unsupported_parameter"),
    "echo": (GOOD | {"echo": True}, 400, "unsupported_parameter"),
    "penalty": (GOOD | {"presence_penalty": 0.5}, 400, "unsupported_parameter"),
    "bias": (GOOD | {"logit_bias": {"5": 3}}, 400, "unsupported_parameter"),
}
BAD_TALK = {
    "no messages": (TALK | {"messages": []}, "invalid_value"),
    "a picture": (TALK | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value"),
    "a tool": (TALK | {"tools": [{"type": "function"}]}, "unsupported_parameter"),
    "a role": (TALK | {"messages": [{"role": "ghost", "content": "x"}]}, "invalid_value"),
    "logprobs": (TALK | {"logprobs": True}, "unsupported_parameter"),
    "JSON": (TALK | {"response_format": {"type": "json_object"}}, "unsupported_parameter"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bodies_get_an_error_that_says_why(local: LocalServer, case: str) -> None:
    body, expected, code = BAD[case]
    status, answer = local.post(body)
    assert (status, answer["error"]["code"]) == (expected, code), answer
    assert answer["error"]["message"]


@pytest.mark.parametrize("case", BAD_TALK)
def test_bad_conversations_get_an_error_that_says_why(local: LocalServer, case: str) -> None:
    body, code = BAD_TALK[case]
    status, answer = local.post(body, "/v1/chat/completions")
    assert (status, answer["error"]["code"]) == (400, code), answer


def test_what_asks_for_nothing_is_accepted(local: LocalServer) -> None:
    nothing = {name: values[0] if values else None for name, values in WITHOUT_EFFECT.items()}
    expected = local.post(GOOD)[1]["choices"]
    assert local.post(GOOD | nothing | dict.fromkeys(LABELS, "me"))[1]["choices"] == expected
    assert local.post(GOOD | {"presence_penalty": 0.0, "n": None, "stop": None})[1]["choices"] == expected


def test_wrong_paths_methods_and_kinds_have_error_bodies_too(local: LocalServer) -> None:
    body = json.dumps(GOOD).encode()
    for expected, answer in (
        (404, local.ask("GET", "/v1/nothing")),
        (405, local.ask("GET", "/v1/completions")),
        (405, local.ask("DELETE", "/v1/models")),
        (415, local.ask("POST", "/v1/completions", body)),
        (415, local.ask("POST", "/v1/completions", body, content_type="text/plain")),
        (415, local.ask("POST", "/v1/completions", body, content_type="application/json", content_encoding="gzip")),
        (403, local.ask("POST", "/v1/completions", body, content_type="application/json", host="rebound.example")),
    ):
        assert answer[0] == expected, answer
        assert json.loads(answer[1])["error"]["message"]


def test_oversized_bodies_are_refused_declared_or_not(local: LocalServer) -> None:
    big = json.dumps(GOOD | {"prompt": "the " * 50_000}).encode()
    status, answer = local.post(big)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", local.port, timeout=SECONDS)
    connection.request(
        "POST", "/v1/completions", iter([big[:9000]] * 10), {"content-type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()
    with pytest.raises(openai.APIStatusError) as refusal:
        local.client().completions.create(model="tiny", prompt="the " * 50_000)
    assert refusal.value.status_code == 413


def test_a_body_that_does_not_arrive_is_not_waited_for(local: LocalServer) -> None:
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: local", b"GET /health HTTP/1.1\r\n"])
def test_a_head_that_does_not_arrive_is_not_waited_for(local: LocalServer, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as connection:
        connection.sendall(sent)
        head, _, body = receive_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "slow_head"


def test_a_slow_head_after_an_answer_is_not_waited_for_either(local: LocalServer) -> None:
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /he")
        assert b"HTTP/1.1 408" in receive_all(connection)


def receive_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    return b"".join(iter(lambda: connection.recv(1000), b""))


@pytest.mark.parametrize("text", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\n" * 5000])
def test_what_is_not_http_ends_the_connection(local: LocalServer, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as connection:
        connection.sendall(text)
        answer = connection.recv(1000)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_places(local: LocalServer, is_stream: bool) -> None:
    before = local.metric("pretrain_abandoned_answers_total")
    body = json.dumps(GOOD | {"max_tokens": 2000, "n": 6, "temperature": 1, "stream": is_stream}).encode()
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if is_stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        wait_until(lambda: (local.server.scheduler.running, local.server.scheduler.waiting) == (4, 2))
    wait_until(lambda: local.server.scheduler.running == 0)
    wait_until(lambda: local.metric("pretrain_abandoned_answers_total") == before + 6)


def test_more_than_may_wait_are_refused_and_the_others_answered(local: LocalServer) -> None:
    client = local.client()
    stream = client.completions.create(model="tiny", prompt="the", n=6, max_tokens=2000, stream=True, temperature=1.0)
    wait_until(lambda: local.server.scheduler.running == 4)
    assert local.post(GOOD | {"n": 7})[0] == 429
    with pytest.raises(openai.RateLimitError) as refusal:
        client.completions.create(model="tiny", prompt="the", n=7)
    assert refusal.value.code == "queue_full"
    assert refusal.value.response.headers["retry-after"] == "1"
    stream.close()


def test_a_wrong_token_is_refused_and_health_needs_none(local: LocalServer) -> None:
    with serve_locally(local.model, token=TOKEN) as guarded:
        assert guarded.client().completions.create(model="tiny", prompt="the", max_tokens=2).choices
        for wrong in ("wrong-for-this-test-0123456789", TOKEN + "0", TOKEN[:-1]):
            with pytest.raises(openai.AuthenticationError) as refusal:
                guarded.client(token=wrong).completions.create(model="tiny", prompt="the")
            assert refusal.value.code == "invalid_api_key"
        assert guarded.post(GOOD)[0] == guarded.ask("GET", "/metrics")[0] == guarded.ask("GET", "/v1/none")[0] == 401
        assert guarded.ask("GET", "/health") == (200, b'{"status":"ok"}')
        assert guarded.metric('pretrain_requests_total{route="none",status="401"}') == 6


def test_an_answer_that_takes_too_long_ends(local: LocalServer) -> None:
    with serve_locally(local.model, request_seconds=0.3) as hasty:
        long = GOOD | {"max_tokens": 2000, "n": 4}
        status, answer = hasty.post(long)
        assert (status, answer["error"]["code"]) == (504, "time_limit")
        with pytest.raises(openai.APIError, match="no complete answer within"):
            list(hasty.client().completions.create(**long, stream=True))
        wait_until(lambda: hasty.server.scheduler.running == 0)
        assert hasty.post(GOOD | {"max_tokens": 1})[0] in {200, 504}  # as busy as the machine is


def test_requests_that_no_memory_is_kept_for_are_refused(local: LocalServer) -> None:
    with serve_locally(local.model, cache_gib=0.001) as small:  # 2 layers, 2 heads of 16, fp32: 2,097 tokens
        assert small.post(GOOD)[0] == 200
        status, answer = small.post(GOOD | {"max_tokens": 2048, "prompt": [5] * 100})
        assert (status, "more memory" in answer["error"]["message"]) == (400, True)


def test_told_to_stop_new_requests_are_refused_and_running_ones_finish(local: LocalServer) -> None:
    with serve_locally(local.model) as ending:
        stream = ending.client().completions.create(
            model="tiny", prompt="the", max_tokens=60, stream=True, temperature=0
        )
        first = next(stream)
        ending.server.stop_admitting()
        assert ending.post(GOOD)[0] == 503
        assert ending.ask("GET", "/health")[0] == 503
        assert [chunk.choices[0].finish_reason for chunk in [first, *stream]][-1] == "length"


def test_what_is_not_done_at_the_end_of_the_grace_is_told_so(local: LocalServer) -> None:
    with serve_locally(local.model) as ending:
        stream = ending.client().completions.create(model="tiny", prompt="the", max_tokens=2000, n=6, stream=True)
        next(stream)
        ending.server.give_up()
        with pytest.raises(openai.APIError, match="stopped before this answer"):
            list(stream)


NAMES = st.sampled_from([*CompletionBody.model_fields, *ChatBody.model_fields, *WITHOUT_EFFECT, "x", ""])
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NUMBERS = st.one_of(st.integers(), st.integers(-2, 70), st.floats())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.just("tiny")),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAMES, TEXT), inner, max_size=4)),
    max_leaves=8,
)
CHANGED = st.dictionaries(NAMES, VALUES, min_size=1, max_size=3)
ROUTES = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/%00", "//", "/v1/models/%ff"])
BODIES = st.one_of(
    st.binary(max_size=60),
    CHANGED.map(lambda changes: json.dumps(GOOD | changes).encode()),
    CHANGED.map(lambda changes: json.dumps(TALK | changes).encode()),
    VALUES.map(lambda values: json.dumps(values).encode()),
    st.tuples(CHANGED, st.integers(0, 200)).map(lambda pair: json.dumps(TALK | pair[0]).encode()[: pair[1]]),
)


class Flood:
    """One connection for as many requests as it survives; counts what came back."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        self.statuses: dict[int, int] = {}

    def send(self, method: str, route: str, body: bytes, kind: str) -> None:
        try:
            answer, text = self._ask(method, route, body, kind)
        except ConnectionError:  # it was idle for too long, as this process had no time; never twice
            answer, text = self._ask(method, route, body, kind)
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        assert answer.status in {200, 400, 404, 405, 413, 415, 429}, (answer.status, text, body)
        if answer.status == 200 or method == "HEAD":
            return
        error = json.loads(text)["error"]
        assert error["message"], (text, body)
        assert set(error) == {"message", "type", "param", "code"}

    def _ask(self, method: str, route: str, body: bytes, kind: str) -> tuple[http.client.HTTPResponse, bytes]:
        try:
            self.connection.request(method, route, body, {"content-type": kind})
            answer = self.connection.getresponse()
            return answer, answer.read()
        except OSError:
            self.connection.close()  # the next request opens it again
            raise


def flood(local: LocalServer, examples: int) -> dict[int, int]:
    sender = Flood(local.port)

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(
        method=st.sampled_from(["POST"] * 12 + ["GET", "PUT", "OPTIONS", "HEAD"]),
        route=st.one_of(st.sampled_from(["/v1/completions", "/v1/chat/completions"]), ROUTES),
        body=BODIES,
        kind=st.sampled_from(["application/json"] * 12 + ["text/plain", "application/json; charset=latin-1", ""]),
    )
    def ask(method: str, route: str, body: bytes, kind: str) -> None:
        sender.send(method, route, body, kind)

    ask()
    sender.connection.close()
    return sender.statuses


@pytest.fixture
def flooded(local: LocalServer) -> Iterator[LocalServer]:
    """A server of its own: what is asked at random is often right, and may want all the tokens there are."""
    with serve_locally(local.model, running=4, waiting=6, body_bytes=20_000, new_tokens=8) as server:
        yield server
        require_service(server)


def test_malformed_requests_get_proper_answers(flooded: LocalServer) -> None:
    assert flood(flooded, 200)[400] > 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_10000_malformed_requests_leave_no_trace(flooded: LocalServer) -> None:
    import gc

    import psutil

    process = psutil.Process()
    flood(flooded, 500)
    gc.collect()
    files, memory = process.num_fds(), process.memory_info().rss
    began = time.monotonic()
    statuses: dict[int, Any] = flood(flooded, 10_000)
    gc.collect()
    print(f"{statuses} in {time.monotonic() - began:.0f} s")
    assert sum(statuses.values()) >= 10_000
    assert process.num_fds() <= files + 2
    assert process.memory_info().rss < memory + (150 << 20)
