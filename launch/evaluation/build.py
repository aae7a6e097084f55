"""Builds questions.jsonl from the corpus that ships: `python -m launch.evaluation.build`.

Only from documents that the quickstart's split keeps out of training, so that its model has not seen them.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.prepare import split_of

FOLDER = Path(__file__).parent
CORPUS = FOLDER.parent / "corpus" / "documents.jsonl.gz"
QUICKSTART_SPLIT = (0.97, 0.02, 0.01)  # of launch/quickstart.sh, with its seed
SEED = 0
CONTEXT_WORDS, CHOICE_WORDS = 40, 10
PASSAGES_OF_A_DOCUMENT = 4
CHOICES = 4
TEXT_CHARACTERS = 1500
HEADING = "\n\nKinds of "


def held_out() -> list[dict[str, Any]]:
    """Documents that the quickstart does not train on."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    return [document for document in documents if split_of(document["text"], QUICKSTART_SPLIT, SEED) != "train"]


def questions() -> Iterator[dict[str, Any]]:
    """One object a question; `kind` says of which task."""
    draw = random.Random(SEED)  # noqa: S311 - the same questions every time, no secret
    documents = held_out()
    passages = [(document["id"], *passage) for document in documents for passage in _passages(document["text"], draw)]
    for identity, context, continuation in passages:
        others = [passage[2] for passage in passages if passage[0] != identity]
        choices = [continuation, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        answer = choices.index(continuation)
        yield {"kind": "completion", "id": identity, "context": context, "choices": choices, "answer": answer}
    for document in documents:
        yield {"kind": "text", "id": document["id"], "text": document["text"][:TEXT_CHARACTERS].rsplit(" ", 1)[0]}
    for document in documents:
        before, heading, after = document["text"].partition(HEADING)
        if heading and re.match(r"[^:\n]+:\n", after):
            answer = after.split(":", 1)[0]
            yield {"kind": "heading", "id": document["id"], "context": before + heading.rstrip(), "answer": answer}


def _passages(text: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Some places of a text: what is before, and how it goes on."""
    words = [(found.start(), found.end()) for found in re.finditer(r"\S+", text)]
    places = range(CONTEXT_WORDS, len(words) - CHOICE_WORDS, CONTEXT_WORDS + CHOICE_WORDS)
    for place in sorted(draw.sample(places, min(PASSAGES_OF_A_DOCUMENT, len(places)))):
        start, middle, stop = words[place - CONTEXT_WORDS][0], words[place - 1][1], words[place + CHOICE_WORDS - 1][1]
        yield text[start:middle], text[middle:stop]


def main() -> None:
    lines = [json.dumps(question, ensure_ascii=False) for question in questions()]
    (FOLDER / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
