"""The blocks that compare documents: exact duplicates, near duplicates, and texts of evaluations.

They are datatrove's, arranged so that what is kept does not depend on how the inputs were cut in tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from data_tools.choices import BadLinePolicy
from data_tools.corpus import Corpus
from data_tools.curation.accounting import write_whole
from data_tools.curation.recipe import Decontamination, NearDuplicates
from data_tools.documents import Keys
from data_tools.pieces import Piece

MOST_TASKS = 65_000  # datatrove's exact deduplication holds priorities in 16 bits


def text_of(document: Document) -> str:
    """Return what two documents must share to be exact duplicates."""
    text: str = document.text
    return text


def exact_config() -> ExactDedupConfig:
    """Return datatrove's configuration of exact deduplication."""
    return ExactDedupConfig(content_getter=text_of)


class FirstWinsSignature(ExactDedupSignature):
    """Signatures that let the first document of the corpus win: datatrove compares places within tasks only."""

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the signatures of a task."""
        self._priority = MOST_TASKS - rank
        super().run(data, rank, world_size)

    def get_hashes(self, doc: Document, doc_idx: int) -> list[tuple[int, int, int]]:
        """Return hash, priority and place of a document."""
        return [(self.hash_fc(self.config.content_getter(doc)), self._priority, doc_idx)]


def minhash_config(step: NearDuplicates, seed: int) -> MinhashConfig:
    """Return datatrove's configuration of MinHash."""
    return MinhashConfig(
        n_grams=step.words_per_ngram,
        num_buckets=step.buckets,
        hashes_per_bucket=step.hashes_per_bucket,
        seed=seed,
    )


def decontamination_config(step: Decontamination) -> NGramsDecontConfig:
    """Return datatrove's configuration of decontamination."""
    return NGramsDecontConfig(n_grams=step.words_per_ngram)


class IndexEvaluationTexts(PipelineStep):
    """Hashes the n-grams of given texts for NGramsDecontFilter; datatrove's own indexer downloads what it indexes.

    Texts of fewer words than an n-gram are hashed by none: their number is written beside the index.
    """

    type = "decontamination"
    name = "index"

    def __init__(self, step: Decontamination, pieces: Sequence[Piece], folder: Path, words: WordTokenizer) -> None:
        super().__init__()
        self.step = step
        self.pieces = pieces
        self.folder = folder
        self.words = words
        self.config = decontamination_config(step)

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write one index for every file of texts.

        Raises:
            InputError: a record holds none of the texts that it should.
        """
        hash_text = create_hash_func(self.config.hash_config)
        names = [Path(piece.shown).name for piece in self.pieces]
        for number, (name, piece) in enumerate(zip(names, self.pieces, strict=True)):
            hashes: set[int] = set()
            for key in self.step.text_keys:
                corpus = Corpus(pieces=[piece], keys=Keys(text=key), on_bad_line=BadLinePolicy.FAIL)
                for _, found in corpus.documents():
                    words = self.words.word_tokenize(simplify_text(found.text, self.config.norm_config))
                    hashes.update(hash_text(" ".join(part)) for part in ngrams(words, self.config.n_grams))
                    self.stat_update("texts" if len(words) >= self.config.n_grams else "too_short")
            unique = name if names.count(name) == 1 else f"{number}-{name}"
            path = self.folder / f"{unique}.index.hashes"
            write_whole(path, np.array(sorted(hashes), self.config.hash_config.np_descr).tobytes())
