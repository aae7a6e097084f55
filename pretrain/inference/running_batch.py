"""Answers of several requests computed together; each joins and leaves between two steps, and notices no other.

Owns the batch and its order of work. Who waits for a place is decided elsewhere: generate.py, serving/scheduler.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from pretrain.inference.load import LoadedModel
from pretrain.inference.prompt_reading import PromptReading
from pretrain.inference.requests import Finish, Piece, Request, end_tokens, require_decoder
from pretrain.inference.row_cache import RowCache
from pretrain.inference.sampling import Choice, choose_tokens
from pretrain.inference.text_stream import TextStream

PREFILL_TOKENS = 8192  # of prompts that are read together, padding included; one longer prompt is read alone
PIECE_TOKENS = 512  # of each prompt that are read between two steps of the rows that run, which wait so long

Key = TypeVar("Key", bound=Hashable)


@dataclass(kw_only=True)
class _Row(Generic[Key]):
    key: Key
    request: Request
    stream: TextStream
    written: list[int] = field(default_factory=list)


class RunningBatch(Generic[Key]):
    """The requests that are being answered, one row each; `Key` is what the caller calls them by."""

    def __init__(self, model: LoadedModel, *, max_rows: int, max_cached_tokens: int | None = None) -> None:
        """`max_cached_tokens`: rows times the longest of them, prompt and answer at most; null: as many as come."""
        require_decoder(model)
        self._model = model
        self._ends = end_tokens(model)
        self._max_rows = max_rows
        self._max_cached_tokens = max_cached_tokens
        self._rows: list[_Row[Key]] = []
        self._cache = RowCache(max_rows)
        self._joining: list[_Row[Key]] = []  # whose prompts are being read
        self._reading: PromptReading | None = None
        self._left: set[Key] = set()  # of those that join, whose place in the reading is given up at its end

    def __len__(self) -> int:
        return len(self._rows) + len(self._joining)

    @property
    def keys(self) -> list[Key]:
        """Of the rows that are being answered, or read."""
        return [row.key for row in (*self._rows, *self._joining)]

    def can_hold(self, request: Request) -> bool:
        """Whether a request fits when it is alone."""
        return self._max_cached_tokens is None or request.most_tokens <= self._max_cached_tokens

    def choose_joining(self, waiting: Sequence[tuple[Key, Request]]) -> int:
        """How many of those that wait, the first first, can join at the next step; none while prompts are read."""
        if self._joining:
            return 0
        longest = max((row.request.most_tokens for row in self._rows), default=0)
        longest_prompt = 0
        for count, (_, request) in enumerate(waiting):
            rows = len(self._rows) + count + 1
            longest = max(longest, request.most_tokens)
            longest_prompt = max(longest_prompt, len(request.prompt))
            is_too_much = self._max_cached_tokens is not None and rows * longest > self._max_cached_tokens
            if rows > self._max_rows or is_too_much or (count and (count + 1) * longest_prompt > PREFILL_TOKENS):
                return count
        return len(waiting)

    @torch.inference_mode()
    def step(self, joining: Sequence[tuple[Key, Request]]) -> list[tuple[Key, Piece]]:
        """Write one token for every row; for those that join, the first. Rows that end are gone afterwards.

        Long prompts are read over several steps while others run, and their rows write from the last of these on.
        """
        pieces: list[tuple[Key, Piece]] = []
        most_columns = PIECE_TOKENS if self._rows else None
        if self._rows:
            pieces = self._take(self._rows, self._decode())
        if joining:
            self._joining = [_Row(key=key, request=request, stream=self._stream(request)) for key, request in joining]
            self._reading = PromptReading(self._model.network, [request.prompt for _, request in joining])
        if self._reading is not None and (logits := self._reading.read(most_columns)) is not None:
            self._cache.join(self._reading.cache, self._reading.lengths)
            joined, left = self._joining, self._left
            self._stop_reading()
            self._rows += joined
            pieces += [(key, piece) for key, piece in self._take(joined, logits) if key not in left]
            self._drop(left)
        self._drop({key for key, piece in pieces if piece.finish is not None})
        return pieces

    def _stop_reading(self) -> None:
        self._joining, self._reading, self._left = [], None, set()

    def remove(self, key: Key) -> None:
        """Take a row out before its end; nothing where it has ended."""
        self._drop({key})
        self._left |= {row.key for row in self._joining if row.key == key}
        if len(self._left) == len(self._joining):
            self._stop_reading()

    def clear(self) -> None:
        """Forget all rows, and the memory that they had; after a step that failed."""
        self._rows.clear()
        self._cache = RowCache(self._max_rows)
        self._stop_reading()

    def _stream(self, request: Request) -> TextStream:
        return TextStream(self._model.tokenizer, request.prompt, request.stops)

    @torch.inference_mode()
    def _drop(self, keys: set[Key]) -> None:
        places = [place for place, row in enumerate(self._rows) if row.key in keys]
        for place in reversed(places):  # from the end, as the last row moves into each gap
            self._cache.leave(place)
            last = self._rows.pop()
            if place < len(self._rows):
                self._rows[place] = last

    def _decode(self) -> torch.Tensor:
        """Forward of each row's last token; returns (rows, V)."""
        device = self._model.network.device
        lengths = self._cache.lengths
        self._cache.make_room()
        logits: torch.Tensor = self._model.network(
            input_ids=torch.tensor([[row.written[-1]] for row in self._rows], device=device),
            attention_mask=self._cache.mask(device) if len(set(lengths)) > 1 else None,
            position_ids=torch.tensor(lengths, device=device).unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._cache.advance()
        return logits[:, -1]

    def _take(self, rows: Sequence[_Row[Key]], logits: torch.Tensor) -> list[tuple[Key, Piece]]:
        choices = [
            Choice(
                sampling=row.request.sampling,
                copy=row.request.copy,
                position=len(row.written),
                seen=_seen(row, logits.device),
            )
            for row in rows
        ]
        return [
            (row.key, self._piece(row, token)) for row, token in zip(rows, choose_tokens(logits, choices), strict=True)
        ]

    def _piece(self, row: _Row[Key], token: int | None) -> Piece:
        if token is None:
            return Piece(text=row.stream.finish(), tokens=len(row.written), finish=Finish.BROKEN)
        row.written.append(token)
        if token in self._ends:
            return Piece(text=row.stream.finish(), tokens=len(row.written), finish=Finish.STOP)
        text = row.stream.push(token)
        finish = None
        if len(row.written) >= row.request.max_new_tokens and not row.stream.is_stopped:
            text += row.stream.finish()
            finish = Finish.LENGTH
        if row.stream.is_stopped:
            finish = Finish.STOP
        return Piece(text=text, tokens=len(row.written), finish=finish)


def _seen(row: _Row[Key], device: torch.device) -> torch.Tensor | None:
    if row.request.sampling.repetition_penalty == 1:
        return None
    return torch.tensor([*row.request.prompt, *row.written], device=device)
