"""What is asked of a model and what comes back, in tokens; and which requests a model can answer.

Owns the limits of a prompt; how answers are computed is running_batch.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from transformers import GenerationConfig

from pretrain.errors import CheckpointError, ConfigError, Problem
from pretrain.inference.load import LoadedModel
from pretrain.inference.sampling import Sampling

ATTENTION_OF_ROWS = {"full_attention", "sliding_attention"}  # kinds of layers whose memory is keys and values of tokens


class Finish(str, Enum):
    """Why an answer ended; the words are OpenAI's, but for the last."""

    STOP = "stop"  # the end of the text, or a stop string
    LENGTH = "length"  # max_new_tokens
    BROKEN = "broken"  # the model's logits were not numbers


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stops: Sequence[str] = ()
    copy: int = 0  # several answers to one prompt differ by this number

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step added to an answer; `text` may be empty."""

    text: str
    tokens: int  # written so far
    finish: Finish | None  # set in the last piece


def end_tokens(model: LoadedModel) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those that the folder's generation_config.json names.

    A configuration's own default is not asked: families carry numbers that belong to another tokenizer.
    """
    found = {model.tokenizer.eos_token_id}
    if (model.origin / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(model.origin, local_files_only=True).eos_token_id
        found.update(named if isinstance(named, list) else [named])
    return frozenset(token for token in found if token is not None)


def problems_of(request: Request, model: LoadedModel) -> Iterator[Problem]:
    """Why a model cannot answer a request; nothing where it can."""
    if not request.prompt:
        yield Problem(
            "a prompt without tokens", "at least one", "begin the text: documents start without a special token"
        )
    rows = model.network.config.vocab_size
    unknown = [token for token in request.prompt if not 0 <= token < rows]
    if unknown:
        yield Problem(f"token {unknown[0]} in a prompt", f"0 to {rows - 1}", "encode it with the model's tokenizer")
    if request.max_new_tokens < 1:
        yield Problem(f"{request.max_new_tokens} new tokens", "at least 1", "ask for more")
    positions = getattr(model.network.config, "max_position_embeddings", None)
    if positions is not None and request.most_tokens > positions:
        yield Problem(
            f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones",
            f"at most {positions} positions of the model",
            "shorten the prompt or ask for fewer new tokens",
        )
    if any(not stop for stop in request.stops):
        yield Problem("an empty stop string", "at least one character", "leave it out")


def require_decoder(model: LoadedModel) -> None:
    """Refuse models whose memory of a text is not one key and value for each of its tokens.

    Raises:
        CheckpointError: naming what it is instead.
    """
    config = model.network.config
    kinds = set(getattr(config, "layer_types", None) or ATTENTION_OF_ROWS)
    if config.is_encoder_decoder:
        raise CheckpointError(
            Problem(
                f"{model.origin} is an encoder-decoder, which fills gaps and continues no text",
                "a decoder",
                "use `pretrain infill`, with <extra_id_0> in the place of a gap",
            )
        )
    found = ""
    if model.network._is_stateful or not kinds <= ATTENTION_OF_ROWS:
        found = f"layers of {', '.join(sorted(kinds - ATTENTION_OF_ROWS)) or 'a recurrent kind'}"
    if found:
        raise CheckpointError(
            Problem(
                f"{model.origin}: {found}",
                "decoders with full or sliding attention",
                "generate with transformers' own generate()",
            )
        )


def require_answerable(requests: Sequence[Request], model: LoadedModel) -> None:
    """Refuse requests that the model cannot answer.

    Raises:
        ConfigError: with every problem of every request.
    """
    problems = [
        Problem(f"request {number}: {problem.found}" if len(requests) > 1 else problem.found, *_rest(problem))
        for number, request in enumerate(requests, 1)
        for problem in problems_of(request, model)
    ]
    if not requests:
        problems.append(Problem("no prompt", "at least one", "give --prompt TEXT or --prompts FILE.jsonl"))
    if problems:
        raise ConfigError(*problems)


def _rest(problem: Problem) -> tuple[str, str]:
    return problem.allowed, problem.change
