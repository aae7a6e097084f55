"""The recipe of a curation: every key of a recipe YAML, its unit, default and meaning.

Says nothing about how a step is done (text_steps.py, document_filters.py, stages.py) or where (local.py, cluster.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_tools.choices import LONGEST_DOCUMENT_BYTES, BadLinePolicy

Fraction = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Texts = Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    """A group of keys: unknown keys are errors, values are not coerced, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Inputs(Section):
    """What to clean; the kinds of file are those of `data-tools prepare`."""

    paths: list[str] = []  # files, folders, globs; the command line may give them instead
    text_key: str = "text"
    id_key: str = "id"
    metadata: list[str] = []  # further keys of a record that are kept beside the text
    on_bad_line: Literal["fail", "skip", "quarantine"] = "fail"
    max_document_bytes: Count = LONGEST_DOCUMENT_BYTES  # a longer record is a bad one; memory grows with it

    @property
    def policy(self) -> BadLinePolicy:
        """What becomes of a record that holds no usable text."""
        return BadLinePolicy(self.on_bad_line)


class Slurm(Section):
    """What Slurm wants to know; used with --executor slurm."""

    partition: str
    time: str = "24:00:00"  # a task's limit
    cpus_per_task: Count = 1
    memory_gigabytes: Count = 4  # per CPU
    qos: str | None = None
    setup: str | None = None  # shell commands that make this Python environment available on a node
    tasks_per_job: Count = 1
    most_jobs: Count = 1001  # in one job array: the cluster's MaxArraySize
    sbatch: dict[str, str] = {}  # further options of sbatch, as account: physics


class Cluster(Section):
    """A file that says how to use a cluster, for commands that have no recipe."""

    slurm: Slurm


class Unicode(Section):
    """Repair of text that was decoded wrongly (ftfy), then one normal form."""

    step: Literal["unicode"] = "unicode"
    repair: bool = True
    unescape_html: bool | Literal["auto"] = "auto"  # auto: where the text holds no "<"
    normal_form: Literal["NFC", "NFKC"] | None = "NFC"


class ControlCharacters(Section):
    """Removal of control characters, terminal escapes and noncharacters; line ends become newlines."""

    step: Literal["control_characters"] = "control_characters"


class Placeholders(Section):
    """Replacement of what names a person or a place on the net; null leaves a kind as it is."""

    step: Literal["placeholders"] = "placeholders"
    urls: str | None = None
    emails: str | None = "<email>"
    phones: str | None = "<phone>"  # with + and country, or in the grouping of North America
    ip_addresses: str | None = "<ip>"  # versions 4 and 6
    private_ip_addresses: bool = False  # replace also those that no one outside a network can reach


class Emoji(Section):
    """What becomes of emoji."""

    step: Literal["emoji"] = "emoji"
    mode: Literal["keep", "remove", "name"] = "name"  # name: :grinning face:


class Language(Section):
    """Keeps documents in some languages, by py3langid; its label and probability are written to the metadata."""

    step: Literal["language"] = "language"
    keep: list[str] = []  # ISO 639-1; empty keeps all and only labels
    least_probability: Fraction = 0.65
    characters: Count = 2000  # at the beginning of a document that are looked at


class QualityFilter(Section):
    """What filters that look at words share."""

    words: Literal["regex", "datatrove"] = "regex"  # datatrove: its tokenizer of `language`, to be installed apart
    language: str = "eng"  # ISO 639-3, for words: datatrove


class GopherRepetition(QualityFilter):
    """Gopher's rules against repetition (arXiv 2112.11446, table A1); null switches a rule off."""

    step: Literal["gopher_repetition"] = "gopher_repetition"
    max_duplicate_lines: Fraction | None = 0.3  # of lines
    max_duplicate_paragraphs: Fraction | None = 0.3  # of paragraphs
    max_duplicate_line_characters: Fraction | None = 0.2  # of characters, as all below
    max_duplicate_paragraph_characters: Fraction | None = 0.2
    max_top_ngrams: dict[int, Fraction] = {2: 0.2, 3: 0.18, 4: 0.16}  # words of the n-gram -> share of the commonest
    max_duplicate_ngrams: dict[int, Fraction] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class GopherQuality(QualityFilter):
    """Gopher's rules of quality (arXiv 2112.11446, A1.1); null switches a rule off."""

    step: Literal["gopher_quality"] = "gopher_quality"
    min_words: Count | None = 50
    max_words: Count | None = 100_000
    min_mean_word_length: Ratio | None = 3  # characters
    max_mean_word_length: Ratio | None = 10
    max_symbols_per_word: Ratio | None = 0.1  # number signs, and ellipses
    max_bullet_lines: Fraction | None = 0.9
    max_ellipsis_lines: Fraction | None = 0.3
    min_alphabetic_words: Fraction | None = 0.8
    min_stop_words: Count | None = 2  # different ones
    stop_words: list[str] = ["the", "be", "to", "of", "and", "that", "have", "with"]


class C4Quality(QualityFilter):
    """C4's rules (arXiv 1910.10683, section 2.2); it removes lines, and documents of which too little is left."""

    step: Literal["c4_quality"] = "c4_quality"
    min_sentences: Count | None = 5
    min_words_per_line: Count | None = 3
    max_word_length: Count | None = 1000  # characters; lines with longer words are removed
    need_end_punctuation: bool = False  # remove lines that do not end a sentence; C4 did, FineWeb does not
    remove_citations: bool = True  # [1], [edit], [citation needed]
    remove_lines_with_javascript: bool = True
    remove_policy_lines: bool = True  # cookies, terms of use, privacy
    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True


class FineWebQuality(QualityFilter):
    """FineWeb's rules (arXiv 2406.17557, section 3.6)."""

    step: Literal["fineweb_quality"] = "fineweb_quality"
    min_lines_with_end_punctuation: Fraction = 0.12
    max_short_lines: Fraction = 0.67
    short_line_characters: Count = 30
    max_duplicate_line_characters: Fraction = 0.01
    max_newlines_per_word: Ratio = 0.3


class ExactDuplicates(Section):
    """Keeps the first of documents with the same text."""

    step: Literal["exact_duplicates"] = "exact_duplicates"


class NearDuplicates(Section):
    """Keeps one of documents that MinHash finds alike.

    Two documents whose n-grams overlap by the share s meet with probability 1 - (1 - s^hashes)^buckets.
    """

    step: Literal["near_duplicates"] = "near_duplicates"
    words_per_ngram: Count = 5
    buckets: Count = 14
    hashes_per_bucket: Count = 8


class Decontamination(Section):
    """Drops documents that share an n-gram of words with given evaluation texts."""

    step: Literal["decontamination"] = "decontamination"
    texts: Texts  # files, folders, globs
    text_keys: Texts = ["text"]  # each is a text of its own, as question and answer
    words_per_ngram: Count = 13


Step = Annotated[
    Unicode
    | ControlCharacters
    | Placeholders
    | Emoji
    | Language
    | GopherRepetition
    | GopherQuality
    | C4Quality
    | FineWebQuality
    | ExactDuplicates
    | NearDuplicates
    | Decontamination,
    Field(discriminator="step"),
]


class Recipe(Section):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    inputs: Inputs = Inputs()
    output: str | None = None  # a folder; the command line may give it instead
    compression: Literal["zst", "gz"] = "zst"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # of MinHash
    tasks: Count | None = None  # in how many parts the inputs are cut; null: one for every 64 MB
    workers: Count | None = None  # processes on one machine, or tasks at a time on a cluster; null: one a core
    samples_per_reason: Annotated[int, Field(ge=0, le=1000)] = 5  # dropped documents that the report shows
    steps: Annotated[list[Step], Field(min_length=1)]
    slurm: Slurm | None = None

    def evaluation_texts(self) -> Iterator[Path]:
        """Yield the paths of the texts that decontamination looks for."""
        for step in self.steps:
            if isinstance(step, Decontamination):
                yield from map(Path, step.texts)

    def decisive(self) -> dict[str, Any]:
        """Return what decides the documents: not where they go, nor who does the work."""
        chosen: dict[str, Any] = self.model_dump(
            mode="json", exclude={"output": True, "workers": True, "slurm": True, "inputs": {"paths"}}
        )
        return chosen
