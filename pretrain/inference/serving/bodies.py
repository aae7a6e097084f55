"""The bodies of completions and chat completions: what is understood, what changes nothing, and what is refused.

Owns the parameters' names and ranges. None is ignored: one that would change the answer is either obeyed or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.inference.serving.faults import ApiError, bad_request

Stop = Annotated[str, Field(min_length=1, max_length=1000)]

# Parameters of OpenAI's that are not supported, with the values at which they ask for nothing; None always does.
WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": (),
    "web_search_options": (),
}
UNIONS = {
    "prompt": "a text, a list of texts, a list of tokens, or a list of lists of tokens; not empty",
    "stop": "a text, or a list of at most 16 texts; none empty, none longer than 1,000 characters",
}
# For the accounts of a company, which this server has none of.
LABELS = ("user", "safety_identifier", "prompt_cache_key")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream holds besides the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Settings(_Body):
    """What both kinds of requests have; top_k and repetition_penalty are not OpenAI's, but many servers'."""

    model: str
    n: Annotated[int, Field(ge=1, le=64)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionBody(Settings):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    add_special_tokens: bool = False  # such as a first token that an imported model was trained with

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One text, or one list of tokens, a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        # pydantic has checked that all are of one kind
        texts = [prompt for prompt in self.prompt if isinstance(prompt, str)]
        lists = [prompt for prompt in self.prompt if isinstance(prompt, list)]
        return texts or lists or [[token for token in self.prompt if isinstance(token, int)]]


class TextPart(_Body):
    """A part of a message; pictures and sound are refused by their type."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatBody(Settings):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


Parsed = TypeVar("Parsed", CompletionBody, ChatBody)


def parse(kind: type[Parsed], values: Mapping[str, Any]) -> Parsed:
    """Read a body.

    Raises:
        ApiError: 400, naming the first parameter that is wrong, unknown or not supported.
    """
    known: dict[str, Any] = {}
    for name, value in values.items():
        if name in kind.model_fields:
            if value is not None:  # as clients write what is not set
                known[name] = value
        elif name not in LABELS:
            _require_no_effect(name, value)
    for name, field in kind.model_fields.items():
        if field.is_required() and name not in known:
            raise bad_request(f"missing parameter {name!r}", code="missing_parameter", parameter=name)
    try:
        body = kind.model_validate(known)
    except ValidationError as error:
        raise _validation_error(error) from error
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options go with stream=true only", parameter="stream_options")
    return body


def _require_no_effect(name: str, value: object) -> None:
    if name not in WITHOUT_EFFECT:
        raise bad_request(f"unknown parameter {name!r}", code="unknown_parameter", parameter=name)
    harmless = WITHOUT_EFFECT[name]
    # 0 and 0.0 ask for the same, 0 and False do not: logprobs=0 asks for logprobs
    if value is None or any(
        value == other and isinstance(value, bool) is isinstance(other, bool) for other in harmless
    ):
        return
    allowed = ", ".join(map(repr, harmless)) or "null"
    raise bad_request(
        f"{name} is not supported by this server; leave it out (or send {allowed})",
        code="unsupported_parameter",
        parameter=name,
    )


def _validation_error(error: ValidationError) -> ApiError:
    """The first fault; of parameters with several forms all of them, as pydantic tells one fault a form."""
    fault = error.errors(include_url=False, include_input=False)[0]
    name = str(fault["loc"][0])
    if name in UNIONS:
        return bad_request(f"{name}: must be {UNIONS[name]}", code="invalid_value", parameter=name)
    place = ".".join(map(str, fault["loc"]))
    return bad_request(f"{place}: {fault['msg']}", code="invalid_value", parameter=name)
