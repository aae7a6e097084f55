"""The choices that command lines and functions share; importing them must cost nothing."""

from __future__ import annotations

from enum import Enum

# One document is encoded at once, and the tokenizers library takes about a hundred times its size.
LONGEST_DOCUMENT_BYTES = 1 << 24
SAMPLE_BYTES = 1 << 28  # of text that a tokenizer is trained on; it is held in memory


class TokenizerType(str, Enum):
    """The kinds of tokenizer that can be trained."""

    BPE = "bpe"  # byte-level byte pair encoding, as GPT-2's
    SENTENCEPIECE = "sentencepiece"  # unigram pieces with byte fallback, as sentencepiece's


class Digits(str, Enum):
    """How a trained tokenizer cuts numbers."""

    AS_IS = "as-is"  # as the model learns them
    INDIVIDUAL = "individual"
    GROUPS_OF_3 = "groups-of-3"  # from the left


class Whitespace(str, Enum):
    """How a trained tokenizer writes indentation."""

    AS_IS = "as-is"  # as the model learns it
    RUNS = "runs"  # a token for every run of 2 to 24 spaces: for code


class BadLinePolicy(str, Enum):
    """What to do with a record that holds no usable text."""

    FAIL = "fail"
    SKIP = "skip"  # count it
    QUARANTINE = "quarantine"  # count it and keep it in quarantine.jsonl


class Backend(str, Enum):
    """The libraries that encode; their tokens are the same."""

    AUTO = "auto"  # gigatoken where it is installed and knows the tokenizer, else tokenizers
    TOKENIZERS = "tokenizers"
    GIGATOKEN = "gigatoken"


class PackMethod(str, Enum):
    """How documents are laid into rows."""

    CONCAT = "concat"  # rows are consecutive pieces of the stream; a document may go on in the next row
    BEST_FIT = "best-fit"  # only documents longer than a row are cut; the others are fitted together, rows padded


class Split(str, Enum):
    """The parts of a dataset."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class TokenFormat(str, Enum):
    """Whose token files are imported or exported."""

    MEGATRON = "megatron"  # .bin and .idx
    NANOGPT = "nanogpt"  # .bin of uint16, no boundaries
    DATATROVE = "datatrove"  # .ds and .ds.index
    NPY = "npy"  # a vector, and its documents' lengths beside it


class Executor(str, Enum):
    """Where the tasks of a job run."""

    LOCAL = "local"  # processes of this machine
    SLURM = "slurm"
    RAY = "ray"
