"""A model as lm-evaluation-harness wants it: log-likelihoods of continuations and of whole texts, and generated text.

Owns the translation between texts and tokens. How questions are computed is questions.py's and conductor.py's; tasks
and metrics are lm_eval's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from pretrain.errors import ConfigError, Problem
from pretrain.inference.questions import Question, Score
from pretrain.inference.sampling import Sampling

NEW_TOKENS = 256  # where a task does not say how many

Ask = Callable[[Sequence[Question]], list[Score]]
# prompts (token ids), new tokens at most, sampling, stop strings -> texts
Write = Callable[[Sequence[Sequence[int]], int, Sampling, Sequence[str]], list[str]]


class HarnessModel(TemplateLM):
    """Answers lm_eval's requests.

    Args:
        tokenizer: of the model.
        ask: scores questions.
        write: generates; null where nothing can be, as in training.
        row_tokens: the longest input of one forward.
        adds_bos: begin every text with the tokenizer's own special tokens. Our training data has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ask: Ask,
        write: Write | None,
        *,
        row_tokens: int,
        adds_bos: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._ask = ask
        self._write = write
        self._row_tokens = row_tokens
        self._adds_bos = adds_bos
        if tokenizer.eos_token_id is None:
            change = "name it in tokenizer_config.json (eos_token)"
            raise ConfigError(Problem("the tokenizer has no end-of-text token", "one: texts begin after it", change))

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token for beginnings, else the one for ends."""
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else int(beginning)

    @property
    def max_length(self) -> int:
        """Tokens of the longest input."""
        return self._row_tokens

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests, which we do not use."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text."""
        adds = self._adds_bos if add_special_tokens is None else add_special_tokens
        return cast("list[int]", self.tokenizer.encode(string, add_special_tokens=adds))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        return cast("list[tuple[float, bool]]", super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self._ask([Question(context, continuation) for _, context, continuation in requests])
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that each continue the one before."""
        questions: list[Question] = []
        texts: list[int] = []  # of each question
        for number, request in enumerate(requests := list(requests)):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._row_tokens,
                context_len=1,
            )
            parts = [Question(*make_disjoint_window(window)) for window in windows]
            questions += parts
            texts += [number] * len(parts)
        totals = [0.0] * len(requests)
        for number, score in zip(texts, self._ask(questions), strict=True):
            totals[number] += score.log_probability
        return totals

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of each request's stop strings; several requests of one kind are one batch."""
        assert self._write is not None, "tasks that generate are refused before"
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests := list(requests)):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in kinds.values():
            new_tokens, sampling, stops = _read_settings(requests[numbers[0]].args[1], self._row_tokens)
            room = self._row_tokens - new_tokens
            prompts = [self._prompt(requests[number].args[0])[-room:] for number in numbers]
            for number, text in zip(numbers, self._write(prompts, new_tokens, sampling, stops), strict=True):
                texts[number] = _before_first(text, stops)
        return texts

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]


def _read_settings(given: dict[str, Any], row_tokens: int) -> tuple[int, Sampling, list[str]]:
    values = normalize_gen_kwargs(given, NEW_TOKENS)
    new_tokens = int(values["max_gen_toks"])
    if new_tokens >= row_tokens:
        raise ConfigError(
            Problem(
                f"a task generates {new_tokens} tokens",
                f"fewer than {row_tokens}, as many as the model's rows have",
                "set max_gen_toks in the task's generation_kwargs",
            )
        )
    sampling = Sampling(
        temperature=float(given.get("temperature", 1.0)) if values["do_sample"] else 0.0,
        top_p=float(values.get("top_p", 1.0)),
        top_k=int(values.get("top_k", 0)),
    )
    return new_tokens, sampling, [stop for stop in values["until"] if stop]


def _before_first(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0]
    return text
