"""Speed of generation: 16 prompts in one batch against the same prompts one by one, and many clients of one server.

    python -m tests.benchmarks.generation [--clients 64] [--requests 2000]

Every text is compared with that of its prompt alone; the exit code is 1 where one differs or a request fails.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles

import openai

from pretrain.inference.generate import continue_prompts
from pretrain.inference.load import LoadedModel, load_source
from pretrain.inference.sampling import Sampling
from tests.pretrain.inference.tiny_runs import SENTENCES, build_network, write_run

GREEDY = Sampling(temperature=0)
NEW_TOKENS = 64
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}


def prompts(count: int) -> list[str]:
    """Of 1 to 12 words, the same for every call."""
    words = " ".join(SENTENCES).split()
    chance = random.Random(0)
    return [" ".join(chance.choice(words) for _ in range(chance.randint(1, 12))) for _ in range(count)]


def batched_against_single(model: LoadedModel, rounds: int) -> bool:
    """Print both speeds and their ratio; False where a text differs."""
    asked = prompts(16)
    continue_prompts(model, asked[:2], max_new_tokens=4, sampling=GREEDY)
    single_seconds, batched_seconds, ratios = [], [], []
    is_equal = True
    for _ in range(rounds):
        began = time.perf_counter()
        single = [continue_prompts(model, [prompt], max_new_tokens=NEW_TOKENS, sampling=GREEDY)[0] for prompt in asked]
        between = time.perf_counter()
        batched = continue_prompts(model, asked, max_new_tokens=NEW_TOKENS, sampling=GREEDY)
        ended = time.perf_counter()
        is_equal = is_equal and single == batched
        single_seconds.append(between - began)
        batched_seconds.append(ended - between)
        ratios.append(single_seconds[-1] / batched_seconds[-1])
    tokens = len(asked) * NEW_TOKENS
    print(f"single   {tokens / median(single_seconds):8.0f} tokens/s")
    print(f"batch 16 {tokens / median(batched_seconds):8.0f} tokens/s")
    print(
        f"ratio {median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}), texts {'equal' if is_equal else 'DIFFER'}"
    )
    return is_equal


def many_clients(run: Path, model: LoadedModel, *, clients: int, requests: int) -> bool:
    """Print latencies of a server in a process of its own; False where a request fails or a text differs."""
    asked = prompts(40)
    expected = {
        prompt: continue_prompts(model, [prompt], max_new_tokens=16, sampling=GREEDY)[0] for prompt in set(asked)
    }
    command = [sys.executable, "-m", "pretrain", "serve", str(run), "--port", "0", "--name", "m", "--running", "64"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([*command, "--waiting", "4096"], stderr=log)
        try:
            address = _address(server, log)
            seconds, wrong, errors, whole = _flood(address, asked, expected, clients=clients, requests=requests)
        finally:
            server.terminate()
            code = server.wait(60)
    shares = quantiles(seconds, n=100)
    print(f"{requests} requests of {clients} clients: {errors} errors, {wrong} answers differ, exit code {code}")
    print(f"p50 {shares[49]:.3f} s, p99 {shares[98]:.3f} s, {16 * requests / whole:.0f} tokens/s, {whole:.1f} s")
    return not wrong and not errors and code == 0


def _address(server: subprocess.Popen[bytes], log) -> str:  # noqa: ANN001 - a file of a private class
    for _ in range(1200):
        log.seek(0)
        found = [line for line in log.read().splitlines() if "serving m on " in line]
        if found:
            return found[0].split("serving m on ")[1].split()[0]
        assert server.poll() is None, "the server ended"
        time.sleep(0.1)
    raise TimeoutError("the server did not start")


def _flood(
    address: str, asked: list[str], expected: dict[str, str], *, clients: int, requests: int
) -> tuple[list[float], int, int, float]:
    here = threading.local()

    def ask(number: int) -> tuple[float, bool | None]:
        here.client = getattr(here, "client", None) or openai.OpenAI(
            base_url=address, api_key="none", max_retries=0, timeout=300
        )
        prompt = asked[number % len(asked)]
        began = time.perf_counter()
        try:
            answer = here.client.completions.create(model="m", prompt=prompt, max_tokens=16, temperature=0)
        except openai.OpenAIError as error:
            print(repr(error))
            return time.perf_counter() - began, None
        return time.perf_counter() - began, answer.choices[0].text == expected[prompt]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(ask, range(requests)))
    whole = time.perf_counter() - began
    wrong = sum(is_right is False for _, is_right in results)
    errors = sum(is_right is None for _, is_right in results)
    return [seconds for seconds, _ in results], wrong, errors, whole


def main() -> int:
    """Measure both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), build_network("llama", **SHAPE))
        model = load_source(Path(folder))
        size = sum(weight.numel() for weight in model.network.parameters())
        print(f"llama of {size:,} parameters, fp32, {NEW_TOKENS} new tokens a prompt")
        is_right = batched_against_single(model, options.rounds)
        is_right &= many_clients(Path(folder), model, clients=options.clients, requests=options.requests)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
