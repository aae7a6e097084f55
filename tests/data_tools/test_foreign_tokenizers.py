"""sentencepiece models and tiktoken ranks: their own libraries' tokens, a tokenizer.json that agrees, one identity."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.choices import Backend, TokenizerType
from data_tools.document_tokenizer import PROBES
from data_tools.errors import InputError
from data_tools.inspect import describe
from data_tools.manifest import load_manifest
from data_tools.prepare import PrepareOptions, prepare
from data_tools.token_shards import open_dataset
from data_tools.tokenizer import DocumentTokenizer, load_tokenizer
from data_tools.tokenizer_training import train_tokenizer
from tests.data_tools.conftest import TEXT, write_lines

REPOSITORY = Path(__file__).parents[2]
LANGUAGES = [
    "Zażółć gęślą jaźń. Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. Съешь ещё этих мягких булок.",
    "視野無限廣，窗外有藍天。いろはにほへと ちりぬるを。 다람쥐 헌 쳇바퀴에 타고파. עטלף אבק נס דרך מזגן",
    "نص حكيم له سر قاطع وذو شأن عظيم. ऋषियों को सताने वाले दुष्ट. เป็นมนุษย์สุดประเสริฐ. Pchnąć w tę łódź.",
]
FORGERIES = ["<|endoftext|>", "</s> and <s> and <unk> in a text", "<0x41>▁x", "▁", " ▁ a", "a<|endoftext|>b"]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    with gzip.open(REPOSITORY / "launch/corpus/documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in islice(lines, 120)]
    return [*documents, *TEXT, *LANGUAGES]


@pytest.fixture(scope="module")
def adversarial() -> list[str]:
    chance = random.Random(7)
    pools = [
        "ab \n\t'sdmt1234",
        "\u00e9\u0301\u0e33\u1100\u1161\ufb01\u2460\u00a0\u3000\u200d\ufeff ab",
        "🏴👩‍🦰ß中 \n\r",
    ]
    made = ["".join(chance.choices(pool, k=chance.randint(1, 40))) for pool in pools for _ in range(400)]
    return [*PROBES, *FORGERIES, *made, "x" * 3000, " " * 500 + "x", "\n" * 301]


def train_model(folder: Path, corpus: list[str], **options: Any) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in corpus for line in text.splitlines() if line]
    prefix = str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines), model_prefix=prefix, minloglevel=2, num_threads=1, **options
    )
    return folder / "tokenizer.model"


LLAMA_LIKE = {
    "model_type": "bpe",
    "vocab_size": 1500,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
T5_LIKE = {"model_type": "unigram", "vocab_size": 1500, "character_coverage": 0.99}
UNIGRAM_BYTES = {
    "model_type": "unigram",
    "vocab_size": 1500,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "user_defined_symbols": ["<sep>"],
}
MODELS = {"llama-like": LLAMA_LIKE, "t5-like": T5_LIKE, "unigram-bytes": UNIGRAM_BYTES}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    return train_model(tmp_path_factory.mktemp(request.param), corpus, **MODELS[request.param])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """Ranks as tiktoken writes them, of a byte-level BPE that was trained here; named as one whose pattern is known."""
    pytest.importorskip("tiktoken")
    from data_tools.tiktoken_ranks import _byte_letters

    trained = train_tokenizer(corpus, TokenizerType.BPE, 1500)
    bytes_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    lines = [
        base64.b64encode(bytes(bytes_of[letter] for letter in token)) + f" {number - 1}\n".encode()
        for token, number in sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
        if token != "<|endoftext|>"
    ]
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
    return folder / "cl100k_base.tiktoken"


def ids_of(tokenizer: DocumentTokenizer, texts: list[str]) -> list[list[int]]:
    return [ids[:-1].tolist() for ids in tokenizer.encode_documents(texts)]


def test_a_sentencepiece_model_gives_its_own_librarys_tokens(
    model: Path, corpus: list[str], adversarial: list[str]
) -> None:
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(model))
    tokenizer = load_tokenizer(model)
    texts = [*corpus, *adversarial]
    assert ids_of(tokenizer, texts) == [theirs.encode(text) for text in texts]
    assert tokenizer.vocabulary_size == theirs.vocab_size()
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", theirs.eos_id())
    assert not any(tokenizer.eos_id in ids for ids in ids_of(tokenizer, FORGERIES))
    assert tokenizer.identity.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert tokenizer.decode([*theirs.encode("a b"), tokenizer.eos_id, *theirs.encode("c")]).count("</s>") == 1


def test_its_tokenizer_json_agrees_on_texts(model: Path, corpus: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(model)
    tokenizer.copy_to(tmp_path / "copy")
    converted = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert (converted.eos_token, converted.eos_token_id) == ("</s>", tokenizer.eos_id)
    differing = 0
    for text, ids in zip(corpus, ids_of(tokenizer, corpus), strict=True):
        found = converted(text, add_special_tokens=False)["input_ids"]
        # two ways to cut a word may be equally likely: the libraries add up their logarithms with other rounding
        assert found == ids or ("unigram" in str(model) and converted.decode(found) == text)
        differing += found != ids
        assert converted.decode(ids) == tokenizer.decode(ids) or "t5" in str(model)  # unknown tokens look otherwise
    assert differing < len(corpus) / 20


def test_ranks_give_tiktokens_tokens(ranks: Path, corpus: list[str], adversarial: list[str]) -> None:
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

    # the pattern as the library has it today, which is written otherwise than ours
    source = __import__("inspect").getsource(ENCODING_CONSTRUCTORS["cl100k_base"])
    pattern = source.split('"pat_str": r"""')[1].split('"""')[0]
    special = {"<|endoftext|>": 100257}
    theirs = Encoding("x", pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(ranks)), special_tokens=special)
    tokenizer = load_tokenizer(ranks)
    texts = [*corpus, *adversarial]
    assert ids_of(tokenizer, texts) == [theirs.encode_ordinary(text) for text in texts]
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("<|endoftext|>", 100257)
    assert tokenizer.vocabulary_size == 100277
    assert tokenizer.identity.sha256 == hashlib.sha256(ranks.read_bytes()).hexdigest()


def test_the_tokenizer_json_of_ranks_agrees(
    ranks: Path, corpus: list[str], adversarial: list[str], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(ranks)
    tokenizer.copy_to(tmp_path / "copy")
    converted = Tokenizer.from_file(str(tmp_path / "copy" / "tokenizer.json"))
    converted.encode_special_tokens = True
    texts = [*corpus, *adversarial]
    assert [converted.encode(text, add_special_tokens=False).ids for text in texts] == ids_of(tokenizer, texts)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs.eos_token_id == 100257
    assert theirs.convert_tokens_to_ids("<|endofprompt|>") == 100276
    assert theirs("ab<|endofprompt|>")["input_ids"][-1] == 100276


@pytest.mark.parametrize("kind", ["llama-like", "ranks"])
@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.TOKENIZERS])
def test_a_dataset_made_with_it(kind: str, backend: Backend, ranks: Path, tmp_path: Path, corpus: list[str]) -> None:
    file = ranks if kind == "ranks" else train_model(tmp_path, corpus, **MODELS[kind])
    source = write_lines(tmp_path / "in.jsonl", [*corpus[:20], *FORGERIES])
    options = PrepareOptions(fractions=(1.0,))
    made = prepare([source], file, tmp_path / "out", options, workers=2, range_bytes=20_000, backend=backend)
    manifest = made.manifests["train"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (manifest.tokenizer.sha256, manifest.tokenizer.file) == (sha256, file.name)
    dataset = open_dataset(tmp_path / "out" / "train")
    expected = np.concatenate(load_tokenizer(file).encode_documents([*corpus[:20], *FORGERIES]))
    assert np.array_equal(dataset.tokens(0, dataset.token_count), expected)
    # what lies beside the data is the same tokenizer, for inspect and for the next prepare alike
    beside = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert beside.identity == manifest.tokenizer
    assert ids_of(beside, corpus[:3]) == ids_of(load_tokenizer(file), corpus[:3])
    assert "tokenizer" in describe(tmp_path / "out", rows=1, sequence_length=64)
    assert load_manifest(tmp_path / "out" / "train").tokenizer == manifest.tokenizer


def test_settings_of_ranks_stand_beside_them(ranks: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.tiktoken"
    file.write_bytes(ranks.read_bytes())
    with pytest.raises(InputError, match="does not say how text is split"):
        load_tokenizer(file)
    settings = {"pattern": r"\p{L}+|[^\p{L}]", "special_tokens": {"<end>": 5000}}
    (tmp_path / "mine.tiktoken.json").write_text(json.dumps(settings))
    mine = load_tokenizer(tmp_path)
    assert (mine.eos_token, mine.eos_id, mine.vocabulary_size) == ("<end>", 5000, 5001)
    assert mine.identity.settings_sha256 != load_tokenizer(ranks).identity.settings_sha256
    with pytest.raises(InputError, match="has no special token <stop>"):
        load_tokenizer(file, "<stop>")
    mine.copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").identity == mine.identity
    (tmp_path / "mine.tiktoken.json").write_text(json.dumps({**settings, "special_tokens": {"<end>": 7}}))
    with pytest.raises(InputError, match="an id of its own"):
        load_tokenizer(file)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "is not a token in base 64": lambda content: content[:-2] + b"x y z\n",
    "has no token for 1 of the 256 bytes": lambda content: content.split(b"\n", 1)[1],
    "gives a rank to two tokens": lambda content: content + b"AAAAAAAA 7\n",
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_ranks(ranks: Path, tmp_path: Path, message: str) -> None:
    file = tmp_path / ranks.name
    file.write_bytes(DAMAGE[message](ranks.read_bytes()))
    with pytest.raises(InputError, match=message):
        load_tokenizer(file)


def test_a_model_that_is_none(tmp_path: Path, ranks: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\nnot a model at all")
    with pytest.raises(InputError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)
    # Llama 3 calls its ranks tokenizer.model
    (tmp_path / "cl100k_base.model").write_bytes(ranks.read_bytes())
    assert load_tokenizer(tmp_path / "cl100k_base.model").eos_id == 100257


def test_a_token_that_texts_produce_cannot_end_documents(model: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    piece = SentencePieceProcessor(model_file=str(model)).encode("the", out_type=str)[-1]
    tokenizer = load_tokenizer(model, piece)
    with pytest.raises(InputError, match="which shall end documents"):
        tokenizer.encode_documents(["the"])
    with pytest.raises(InputError, match="has no token <no>"):
        load_tokenizer(model, "<no>")


def test_a_model_whose_json_would_differ_says_so(tmp_path: Path, corpus: list[str], caplog: Any) -> None:
    tokenizer = load_tokenizer(train_model(tmp_path, corpus, **LLAMA_LIKE))
    tokenizer.copy_to(tmp_path / "copy")
    assert not caplog.records
    vars(tokenizer)["encode_documents"] = lambda texts: [np.array([1, 2, 3])] * len(texts)
    tokenizer.copy_to(tmp_path / "again")
    assert [record.args[1] for record in caplog.records if isinstance(record.args, tuple)] == list(PROBES)


def test_a_text_on_which_tiktoken_fails_is_encoded_by_tokenizers(ranks: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its regular expressions run out of stack on a long run of spaces."""
    tokenizer = load_tokenizer(ranks)
    text = f"a{' ' * 2_000_000}b"
    (ids,) = tokenizer.encode_documents([text])
    assert "tiktoken fails on a text of 2000002 characters" in caplog.text
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert ids[-1] == tokenizer.eos_id
