"""Requests as lm_eval makes them for tasks that generate."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance

PROMPTS = ["the ship", "rain fell on the roof all night and", "a small house by"]


def generation_requests() -> list[Instance]:
    """Two kinds of settings, one of which stops at a letter that is sure to come."""
    kinds: list[dict[str, Any]] = [
        {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        {"until": ["e", "a"], "max_gen_toks": 20},
    ]
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, kind), idx=number)
        for number, (prompt, kind) in enumerate((prompt, kind) for kind in kinds for prompt in PROMPTS)
    ]
