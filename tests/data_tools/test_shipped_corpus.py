"""The corpus in launch/corpus: readable, licensed, and its builder's cleaning of pages."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

CORPUS = Path(__file__).parents[2] / "launch" / "corpus"


def test_every_document_is_whole_and_licensed() -> None:
    raw = gzip.decompress((CORPUS / "documents.jsonl.gz").read_bytes())
    documents = [json.loads(line) for line in raw.splitlines()]
    assert {"postgresql-15", "wordnet-3.0"} == {document["source"] for document in documents}
    assert len({document["id"] for document in documents}) == len(documents) > 2000
    assert all(len(document["text"]) > 100 for document in documents)
    readme = (CORPUS / "README.md").read_text()
    assert hashlib.sha256(raw).hexdigest() in readme
    assert "without fee" in (CORPUS / "LICENSES" / "PostgreSQL.txt").read_text()
    assert "Princeton University" in (CORPUS / "LICENSES" / "WordNet.txt").read_text()
    assert 2e6 < (CORPUS / "documents.jsonl.gz").stat().st_size < 4e6


def test_a_page_becomes_text() -> None:
    spec = importlib.util.spec_from_file_location("build", CORPUS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    page = """<html><head><title>T</title><meta name="a" /></head><body><div class="navheader"><a>Next</a><br /></div>
    <h1>Title</h1><p>One   <b>two</b>
    &lt;three&gt;.</p><pre>
    kept  as
      it is</pre><p>End</p><script>no</script></body></html>"""
    assert build.page_text(page) == "Title\n\nOne two <three>.\n\n    kept  as\n      it is\n\nEnd"
