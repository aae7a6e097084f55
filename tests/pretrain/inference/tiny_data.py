"""Token datasets in the language of the tiny tokenizer (tiny_runs.py)."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_tools.choices import PackMethod
from data_tools.pack import pack
from data_tools.token_shards import ShardWriter, TokenizerIdentity
from tests.pretrain.data.datasets import draft
from tests.pretrain.inference.tiny_runs import EOS, SENTENCES, write_tokenizer

WORDS = sorted({*" ".join(SENTENCES).split(), "über", "€", "河"})


def write_texts(count: int = 40, *, seed: int = 0) -> list[str]:
    """Documents of 3 to 40 words, some of which take several bytes a character."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(3, 41))) for _ in range(count)]


def encode_texts(tokenizer_folder: Path, texts: list[str]) -> list[list[int]]:
    """Ids of each text, with an EOS at its end as `prepare` leaves them."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, eos] for text in texts]


def write_dataset(
    folder: Path, texts: list[str], *, sequence_length: int | None = 24, method: PackMethod = PackMethod.CONCAT
) -> Path:
    """A validation split of these texts, packed unless there is no length; several shards where there is room."""
    sha256 = write_tokenizer(folder / "tokenizer")
    ids = encode_texts(folder / "tokenizer", texts)
    manifest = draft(
        split="validation",
        tokenizer=TokenizerIdentity(name="tiny", sha256=sha256),
        vocabulary_size=300,
        eos_id=ids[0][-1],
    )
    with ShardWriter(folder / "tokens" / "validation", manifest, shard_tokens=400) as writer:
        for document in ids:
            writer.append(np.array(document, dtype=np.uint16))
        writer.finish()
    if sequence_length is None:
        return folder / "tokens"
    pack(folder / "tokens", folder / "packed", sequence_length=sequence_length, method=method, shard_tokens=400)
    return folder / "packed"
