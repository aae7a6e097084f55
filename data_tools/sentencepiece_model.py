"""Encodes with a sentencepiece model, unigram or BPE, by sentencepiece itself, and makes a tokenizer.json of it.

The tokens are right by definition; the tokenizer.json is for generation, which the tokenizers library does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.document_tokenizer import DocumentTokenizer, require_package, sha256_of
from data_tools.errors import InputError
from data_tools.manifest import TokenizerIdentity

SUFFIX = ".model"
_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # of the model's own description
_CONTROL, _USER_DEFINED = 3, 4


class SentencePieceModel(DocumentTokenizer):
    """A file `tokenizer.model`."""

    may_be_replaced = False  # its normalisation is nobody else's

    def __init__(self, file: Path, eos_token: str | None = None) -> None:
        require_package("sentencepiece", file)
        from sentencepiece import SentencePieceProcessor

        self.file = file
        content = file.read_bytes()
        self._processor: Any = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise InputError(
                f"{file} is not a sentencepiece model ({str(error).splitlines()[0]})",
                "a .model file of sentencepiece, or ranks of tiktoken named .tiktoken",
                "check the file",
            ) from error
        self.vocabulary_size = self._processor.GetPieceSize()
        self.eos_id = self._find_eos(eos_token)
        self.eos_token = self._processor.IdToPiece(self.eos_id)
        numbers = range(self.vocabulary_size)
        self.marked_ids = sorted({self.eos_id, *(n for n in numbers if self._processor.IsControl(n))})
        self.identity = TokenizerIdentity(name=file.stem, sha256=sha256_of(content), file=file.name)

    def tokenizer_json(self) -> bytes:
        """Return the content of a tokenizer.json that encodes alike; it is made anew by every call."""
        return convert_model(self.file, self.file.read_bytes())

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, (tokens + 1,) int32, ending in EOS.

        Raises:
            InputError: the token that shall end documents is one that a text produces.
        """
        documents = [np.array([*ids, self.eos_id], np.int32) for ids in self._processor.EncodeAsIds(list(texts))]
        for ids in documents:
            if (ids[:-1] == self.eos_id).any():
                raise InputError(
                    f"{self.file} encodes plain text as {self.eos_token!r}, which shall end documents",
                    "an end-of-document token that no text can produce",
                    "choose a control token of the model as --eos-token",
                )
        return documents

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens shown."""
        shown, pieces = [], []
        for number in ids:
            pieces.append(int(number))
            if self._processor.IsControl(int(number)):
                pieces.pop()
                shown += [self._processor.DecodeIds(pieces), self._processor.IdToPiece(int(number))]
                pieces = []
        return "".join([*shown, self._processor.DecodeIds(pieces)])

    def _find_eos(self, eos_token: str | None) -> int:
        number = int(self._processor.eos_id())
        if eos_token is not None:
            number = int(self._processor.PieceToId(eos_token))
            if self._processor.IdToPiece(number) != eos_token:
                number = -1
        if number < 0:
            raise InputError(
                f"{self.file} has no token {eos_token}" if eos_token else f"{self.file} names no end-of-document token",
                "a token of its vocabulary",
                "give a control token of the model as --eos-token",
            )
        return number


def convert_model(file: Path, content: bytes) -> bytes:
    """Return the tokenizer.json that does what the model does, as far as the tokenizers library can.

    Raises:
        InputError: the model is neither unigram nor BPE.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, models

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    trainer = proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == _UNIGRAM:
        model: Any = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == _BPE:
        model = models.BPE(
            {piece: number for number, (piece, _) in enumerate(pieces)},
            _merges(pieces),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise InputError(f"{file} is of neither kind", "sentencepiece models of type unigram or BPE", "train one")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = _surroundings(proto)
    added = [piece for piece in proto.pieces if piece.type in {_CONTROL, _USER_DEFINED}]
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL) for piece in added])
    return str(tokenizer.to_str()).encode()


def _merges(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Return all ways to make a piece of two others, the best piece first."""
    numbers = {piece: number for number, (piece, _) in enumerate(pieces)}
    ways = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in numbers and right in numbers:
                ways.append((-score, numbers[piece], numbers[left], numbers[right], left, right))
    return [(left, right) for *_, left, right in sorted(ways)]


def _surroundings(proto: Any) -> tuple[Any, Any, Any]:
    """Return the normalizer, the pre-tokenizer and the decoder."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    decoding: list[Any] = [decoders.Replace(_SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        decoding += [decoders.ByteFallback()]
    decoding += [decoders.Fuse()]
    if spec.add_dummy_prefix:
        decoding += [decoders.Strip(" ", 1, 0)]
    # where no piece crosses the beginning of a word, words may be encoded one by one: that saves time
    crossing = any(_SPACE in piece.piece[1:] for piece in proto.pieces)
    split = None if crossing else pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never")
    return normalizers.Sequence(steps), split, decoders.Sequence(decoding)


def is_sentencepiece(file: Path) -> bool:
    """Whether a file of the name .model is one of sentencepiece: others keep ranks of tiktoken under this name."""
    with file.open("rb") as opened:
        return opened.read(1) == b"\n"  # the mark of the first field of its message
