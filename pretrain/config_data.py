"""The data section of the run configuration: sources, mixture, fill-in-the-middle, validation, and how they are read.

What is wrong with names, weights and phases is data/mixture_plan.py's to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pretrain.config_section import Section
from pretrain.errors import Problem


class Source(Section):
    """One corpus of a mixture."""

    path: str
    weight: float | None = Field(default=None, ge=0)  # share of the rows, relative to the others' weights; null: 1
    name: str | None = None  # shown in reports; the folder's name where not given
    max_epochs: float | None = Field(default=None, gt=0)  # then its share goes to the others; null: read for ever


TrainingData = Annotated[
    Annotated[str, Tag("folder")] | Annotated[list[Source], Field(min_length=1), Tag("mixture")],
    Discriminator(lambda value: "mixture" if isinstance(value, list) else "folder"),
]

Weight = Annotated[float, Field(ge=0)]


class MixturePhase(Section):
    """Other weights from a point of training on."""

    from_tokens: int = Field(gt=0)  # seen by the whole run; rounded up to a whole row
    weights: dict[str, Weight]  # name of a source -> weight, of every source; 0: it gives nothing


class MixtureSection(Section):
    """How the weights of the training sources come about, and when they change; see data/mixture_plan.py."""

    temperature: float | None = Field(default=None, gt=0)  # T: weights are tokens ^ (1 / T) in place of given ones
    phases: list[MixturePhase] = Field(default_factory=list)


class FillInTheMiddleSection(Section):
    """Documents turned round, of training only; see data/fill_in_the_middle.py. Sentinels: special tokens' names."""

    rate: float = Field(default=0.5, ge=0, le=1)  # share of the documents
    suffix_first_rate: float = Field(default=0.5, ge=0, le=1)  # of those, the share in the order suffix, prefix, middle
    prefix: str
    middle: str
    suffix: str


class SpanCorruptionSection(Section):
    """Spans of each row are what an encoder-decoder learns to write; see data/span_corruption.py."""

    noise_density: float = Field(default=0.15, gt=0, lt=1)  # share of a row's tokens that is taken out
    mean_span_tokens: float = Field(default=3.0, ge=1)

    def counts(self, tokens: int) -> tuple[int, int]:
        """Tokens taken out of a row of so many (at least two), and the spans that they make."""
        noise = min(max(round(tokens * self.noise_density), 1), tokens - 1)
        return noise, min(max(round(noise / self.mean_span_tokens), 1), noise, tokens - noise)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """Tokens that the encoder reads and the decoder writes of a row: a sentinel for each span, and EOS."""
        if tokens < 2:
            return tokens + 1, 1
        noise, spans = self.counts(tokens)
        return tokens - noise + spans + 1, noise + spans + 1


class DataSection(Section):
    """What to read."""

    train: TrainingData  # a dataset folder or its URL (s3, gs, hf, http, https, file), or a list of sources
    mixture: MixtureSection = MixtureSection()
    fill_in_the_middle: FillInTheMiddleSection | None = None
    span_corruption: SpanCorruptionSection | None = (
        None  # for encoder-decoders, which need it; null: no spans are taken
    )
    validation: dict[str, str] = Field(default_factory=dict)  # name -> dataset folder or URL
    cache: str | None = None  # folder on a local disk of each node that keeps what is fetched from URLs
    cache_max_bytes: int | None = Field(default=None, gt=0)  # then datasets that nobody uses go; null: no limit
    tokenizer: str | None = None  # folder; its hash must equal the datasets'; default: the one kept with the data
    verify: Literal["sizes", "hashes"] = "sizes"  # what is checked of every shard before the first step
    workers: int = Field(default=2, ge=0)  # threads that read ahead
    prefetch_micro_batches: int = Field(default=16, ge=1)

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        train = given.get("train")
        sources = [dict(source).get("path") for source in train] if isinstance(train, list) else [train]
        urls = [str(path) for path in (*sources, *(given.get("validation") or {}).values()) if "://" in str(path)]
        if urls and given.get("cache") is None:
            found = f"{len(urls)} datasets are behind URLs, and data.cache is not set"
            yield Problem(found, "a folder on a local disk of each node that keeps them", "set data.cache=FOLDER")
        if any("@" in url.partition("://")[2].partition("/")[0] for url in urls):
            found = "a URL of the data section holds a user name or password"  # not shown: it would be logged
            change = "take it out, and give credentials by the environment or fsspec's configuration"
            yield Problem(found, "URLs without secrets: the configuration is saved with the run", change)

    @property
    def sources(self) -> list[Source]:
        """The training corpora; a single folder is a mixture of one."""
        return [Source(path=self.train)] if isinstance(self.train, str) else list(self.train)
