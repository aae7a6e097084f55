"""A corpus that has something for every step, of which it is known what must become of each document."""

from __future__ import annotations

import json
import random
from pathlib import Path

from data_tools.curation.recipe import Recipe

NAMES = (
    *("river", "forest", "engine", "market", "letter", "garden", "mountain", "kitchen", "harbour", "village"),
    *("station", "library", "valley", "town", "bridge", "teacher", "farmer", "sailor", "window", "morning"),
    *("winter", "summer", "story", "music", "paper", "silver", "table", "candle", "horse", "ladder"),
)
LINKS = (
    *("the", "and", "of", "with", "that", "have", "to", "be", "from", "into"),
    *("over", "under", "which", "before", "after", "near", "without", "beside", "they", "were"),
)
GERMAN = (
    "Der Fluss fließt durch das Tal, und die Leute des Dorfes gehen am Abend über die Brücke nach Hause. "
    "Sie haben den ganzen Tag auf dem Feld gearbeitet und freuen sich auf das Essen. "
)
QUESTION = "which of the seven sleepers of the old harbour town first wrote down the tale of the drowned bell"


def story(seed: int, sentences: int = 14) -> str:
    """English prose, more or less, that passes every quality filter; another one for every seed."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = [word for _ in range(draw.randrange(7, 12)) for word in (draw.choice(LINKS), draw.choice(NAMES))]
        lines.append(" ".join(words).capitalize() + f" in the year {draw.randrange(1000, 2000)}.")
    return "\n".join(lines)


def near(seed: int) -> str:
    """A story like `story(seed)` but for one word."""
    return story(seed).replace("in the year", "about the year", 1)


def documents(stories: int = 30) -> list[dict[str, str]]:
    """The corpus: stories, and between them what is to be dropped or changed."""
    texts = [("story", story(seed)) for seed in range(stories)]
    texts[5:5] = [("copy", story(2)), ("near", near(3)), ("german", GERMAN * 4)]
    texts[12:12] = [
        ("short", story(902, sentences=2)),
        ("repeated", "The same line again and again.\n" * 40),
    ]
    texts[20:20] = [("copy", story(2)), ("contaminated", f"{story(900)}\nI know {QUESTION}, and so do you.")]
    texts += [("copy", story(20)), ("mail", f"{story(901)}\nWrite to jane.doe@gmail.com or +49 30 901820 today.")]
    return [{"text": text, "id": f"{kind}-{number}", "kind": kind} for number, (kind, text) in enumerate(texts)]


def write_corpus(path: Path, stories: int = 30) -> Path:
    lines = [json.dumps(document) + "\n" for document in documents(stories)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_evaluation(path: Path) -> Path:
    path.write_text(json.dumps({"question": QUESTION, "answer": "Nobody knows"}) + "\n", encoding="utf-8")
    return path


def full_recipe(evaluation: Path, **more: object) -> Recipe:
    """Every step there is."""
    steps = [
        {"step": "unicode"},
        {"step": "control_characters"},
        {"step": "emoji"},
        {"step": "language", "keep": ["en"]},
        {"step": "gopher_repetition"},
        {"step": "gopher_quality"},
        {"step": "c4_quality"},
        {"step": "fineweb_quality"},
        {"step": "exact_duplicates"},
        {"step": "near_duplicates"},
        {"step": "decontamination", "texts": [str(evaluation)], "text_keys": ["question", "answer"]},
        {"step": "placeholders"},
    ]
    return Recipe.model_validate({"name": "full", "inputs": {"metadata": ["kind"]}, "steps": steps, **more})
