"""Asks a model that `pretrain serve` serves, with OpenAI's own client: its name, a whole answer, a stream, two copies.

    pretrain serve runs/mine --port 8000 &
    python launch/ask_model.py http://127.0.0.1:8000/v1 "The server"

Owns nothing: it shows how any program asks. A server with a token finds it in OPENAI_API_KEY.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main(address: str, prompt: str) -> None:
    """Print the answers as they come."""
    client = OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "none-needed"))
    model = client.models.list().data[0].id
    print(f"model: {model}")

    likeliest = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0)
    print(f"likeliest: {prompt}{likeliest.choices[0].text}")

    print(f"streamed: {prompt}", end="", flush=True)
    pieces = 0
    stream = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0, stream=True)
    for chunk in stream:
        pieces += 1
        print(chunk.choices[0].text, end="", flush=True)
    print(f"\npieces: {pieces}")

    copies = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0.8, n=2, seed=1)
    for choice in copies.choices:
        print(f"sampled {choice.index}: {prompt}{choice.text}")
    if copies.usage is not None:
        print(f"tokens: {copies.usage.prompt_tokens} of the prompt, {copies.usage.completion_tokens} written")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} http://127.0.0.1:8000/v1 PROMPT")
    main(sys.argv[1], sys.argv[2])
