"""Builds the shipped corpus, documents.jsonl.gz, from two Debian packages of permissively licensed text.

Owns the choice and the cleaning of the text; what is done with it belongs to data_tools. Standard library only.
Run `python launch/corpus/build.py` on a Debian 12 machine; the same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = {  # name -> sha256 of the .deb that the shipped file was built from
    "postgresql-doc-15": "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
    "wordnet-base": "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
}
SHORTEST_DOCUMENT = 500  # characters: shorter pages are lists of links
WORDNET_PARTS = {"noun": "Kinds of {}:", "verb": "Ways to {}:"}  # part of speech -> heading of its lists
WORDNET_SMALLEST_FAMILY = 14  # concepts below one parent that make a document worth reading
SKIPPED_PAGES = frozenset(
    ["index", "bookindex", "legalnotice", "biblio", "features", "unsupported-features-sql-standard"]
)
SKIPPED_BEGINNINGS = ("release", "sql-keywords", "errcodes", "features-")  # lists, not prose

Document = dict[str, str]


class PageText(HTMLParser):
    """Collects the readable text of one page: paragraphs parted by empty lines, code kept as it is."""

    BLOCKS = frozenset(
        ["p", "div", "pre", "ul", "ol", "dl", "li", "dt", "dd", "table", "tr", "blockquote", "h1", "h2", "h3", "h4"]
    )
    SKIPPED_TAGS = frozenset(["script", "style", "head"])
    SKIPPED_CLASSES = frozenset(["navheader", "navfooter", "toc"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.skipped_depth = 0
        self.open_tags: list[tuple[str, bool]] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        skipped = tag in self.SKIPPED_TAGS or bool(classes & self.SKIPPED_CLASSES)
        self.open_tags.append((tag, skipped))
        self.skipped_depth += skipped
        self.preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self.pieces.append("\n\n")
        elif tag in {"td", "th"}:
            self.pieces.append("  ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":  # the pages are XHTML: every empty element closes itself, and no other one shows
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        while self.open_tags:
            opened, skipped = self.open_tags.pop()
            self.skipped_depth -= skipped
            self.preformatted -= opened == "pre"
            if opened == tag:
                break
        if tag in self.BLOCKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped_depth:
            self.pieces.append(data if self.preformatted else re.sub(r"[ \t\r\n\xa0]+", " ", data))

    def text(self) -> str:
        lines = [line.rstrip() for line in "".join(self.pieces).replace("\xa0", " ").split("\n")]
        lines = [line if line.startswith("    ") else line.strip() for line in lines]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def page_text(html: str) -> str:
    """Return the readable text of an HTML page."""
    parser = PageText()
    parser.feed(html)
    parser.close()
    return parser.text()


def postgresql_documents(root: Path) -> Iterator[Document]:
    """Yield one document per page of the manual."""
    for page in sorted((root / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        if page.stem in SKIPPED_PAGES or page.stem.startswith(SKIPPED_BEGINNINGS):
            continue
        text = page_text(page.read_text(encoding="utf-8"))
        if len(text) >= SHORTEST_DOCUMENT:
            yield {"text": text, "id": f"postgresql-15/{page.stem}", "source": "postgresql-15"}


def wordnet_documents(root: Path) -> Iterator[Document]:
    """Yield one document per family: a concept, its gloss, and all concepts directly below it with theirs."""
    for part, heading in WORDNET_PARTS.items():
        synsets = {}
        children: dict[str, list[str]] = {}
        for line in (root / "usr/share/wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence, at the head of every file
                continue
            fields, gloss = line.split(" | ", 1)
            offset, words, parents = read_synset(fields.split(" "), part)
            synsets[offset] = f"{words}: {gloss.strip()}"
            for parent in parents:
                children.setdefault(parent, []).append(offset)
        for parent, below in children.items():
            if len(below) >= WORDNET_SMALLEST_FAMILY:
                entries = "\n".join(f"- {synsets[child]}." for child in below)
                name = synsets[parent].split(":")[0].split(", ")[0]
                text = f"{synsets[parent]}.\n\n{heading.format(name)}\n\n{entries}"
                yield {"text": text, "id": f"wordnet-3.0/{part}/{parent}", "source": "wordnet-3.0"}


def read_synset(fields: list[str], part: str) -> tuple[str, str, list[str]]:
    """Return the offset, the words and the parents' offsets of one line of a WordNet data file."""
    word_count = int(fields[3], 16)
    words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * word_count : 2]]
    pointers = fields[5 + 2 * word_count :]
    parents = [
        pointers[at + 1]
        for at in range(0, 4 * int(fields[4 + 2 * word_count]), 4)
        if pointers[at] in {"@", "@i"} and pointers[at + 2] == part[0]
    ]
    return fields[0], ", ".join(words), parents


def write_documents(documents: list[Document], path: Path) -> None:
    """Write JSON lines, compressed without a name or a time, so that equal text gives equal bytes."""
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=9, mtime=0) as file:
        for document in documents:
            file.write((json.dumps(document, ensure_ascii=False) + "\n").encode())


def main() -> None:
    """Fetch the packages (or take them from --packages), unpack them, write the corpus beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="folder with the .deb files; without it they are downloaded")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "documents.jsonl.gz")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = options.packages
        if packages is None:
            packages = Path(scratch)
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
        roots = {}
        for name, expected in PACKAGES.items():
            (package,) = packages.glob(f"{name}_*.deb")
            if hashlib.sha256(package.read_bytes()).hexdigest() != expected:
                print(f"{package.name} is another version than the one shipped: the text will differ", file=sys.stderr)
            roots[name] = Path(scratch) / name
            subprocess.run(["dpkg-deb", "-x", package.resolve(), roots[name]], check=True)
        documents = [
            *postgresql_documents(roots["postgresql-doc-15"]),
            *wordnet_documents(roots["wordnet-base"]),
        ]
    documents.sort(key=lambda document: hashlib.sha256(document["id"].encode()).digest())  # every part of it is alike
    write_documents(documents, options.output)
    characters = sum(len(document["text"]) for document in documents)
    print(
        f"{options.output}: {len(documents)} documents, {characters} characters, {options.output.stat().st_size} bytes"
    )


if __name__ == "__main__":
    main()
