"""A server of a tiny model on a free loopback port, in a thread of the test's own process.

Owns its start and its end; what is asked of it is each test's business.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI

from pretrain.inference.load import LoadedModel, load_source
from pretrain.inference.serving.address import open_socket
from pretrain.inference.serving.app import ModelServer
from pretrain.inference.serving.limits import Limits
from pretrain.inference.serving.server import build_process
from tests.pretrain.inference.tiny_runs import build_network, write_run

END_TOKEN = 0
SECONDS = 240  # for anything, on a machine with much other work
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "{{ message.content }} "
    "{% endfor %}{% if add_generation_prompt %}the{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """What tests know of a running server."""

    model: LoadedModel
    server: ModelServer
    port: int
    token: str | None

    def client(self, *, token: str | None = None) -> OpenAI:
        """The official client; it does not try again, so that tests see the first answer."""
        key = token or self.token or "unused"
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """One request on a connection of its own; returns status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, values: object, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        """POST JSON; returns status and the JSON that came back."""
        body = values if isinstance(values, bytes) else json.dumps(values).encode()
        status, text = self.ask("POST", path, body, **{"content_type": "application/json"} | headers)
        return status, json.loads(text)

    def metric(self, name: str) -> float:
        """The present value of a metric."""
        lines = self.ask("GET", "/metrics", **self._authorization())[1].decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))

    def _authorization(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


@contextlib.contextmanager
def serve_locally(model: LoadedModel, *, token: str | None = None, **limits: Any) -> Iterator[LocalServer]:
    """Serve until the block ends; then the server must end in order."""
    bounds = Limits(**limits)
    server = ModelServer(model, name="tiny", limits=bounds, token=token)
    with open_socket("127.0.0.1", 0) as listening:
        process = build_process(server, listening, name="tiny", limits=bounds)
        thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: process.started or not thread.is_alive())
        try:
            yield LocalServer(model=model, server=server, port=listening.getsockname()[1], token=token)
        finally:
            process.should_exit = True
            thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not end"


def wait_until(is_so: Any) -> None:
    """Look again and again, up to the deadline."""
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "never became so"
        time.sleep(0.01)


def tiny_model(folder: Path, *, with_template: bool = False, **fields: Any) -> LoadedModel:
    """A llama of two layers whose continuations differ from prompt to prompt, and which ends few of them."""
    network = build_network("llama", **fields)
    with torch.no_grad():
        network.lm_head.weight[END_TOKEN] = 0
    write_run(folder, network)
    model = load_source(folder)
    if with_template:
        model.tokenizer.chat_template = TEMPLATE
    return model
