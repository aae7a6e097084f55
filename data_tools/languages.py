"""Loads the model that tells languages apart: py3langid's, which is in its package. Decides nothing by itself."""

from __future__ import annotations

from typing import Any


def load_language_identifier() -> Any:
    """An object whose `classify(text)` gives (label, probability).

    Raises:
        ImportError: py3langid is not installed.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
