"""Inputs behind URLs: the dataset is that of local files; cut connections, changes and secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools import remote_inputs as module
from data_tools.errors import InputError, UsageError
from data_tools.input_files import find_inputs
from data_tools.remote_inputs import remote_inputs
from data_tools.storage import Patience
from tests.data_tools.conftest import TEXT, write_lines
from tests.data_tools.storages import CuttingProxy, plain_http_server, s3_server

QUICK = Patience(attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.02, timeout_seconds=10)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "remote"
    (folder / "more").mkdir(parents=True)
    write_lines(folder / "a.jsonl", TEXT[:40])
    write_lines(folder / "more" / "b.jsonl", TEXT[40:])
    (folder / "notes.pdf").write_bytes(b"%PDF")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "default_cache", lambda: tmp_path / "inputs")
    return tmp_path / "inputs"


def names(pieces: Any) -> list[str]:
    return [piece.shown for piece in pieces]


def test_a_dataset_from_urls_is_that_of_the_files(run, files: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    words = ["--tokenizer", tokenizer_folder, "--workers", 1, "--output"]
    assert run("prepare", files / "a.jsonl", *words, tmp_path / "local")[0] == 0
    with plain_http_server(files) as port:
        url = f"http://127.0.0.1:{port}/a.jsonl"
        code, _, err = run("prepare", url, *words, tmp_path / "remote-made")
        assert code == 0, err
    for path in (tmp_path / "local").rglob("shard-*"):
        assert (tmp_path / "remote-made" / path.relative_to(tmp_path / "local")).read_bytes() == path.read_bytes()
    manifest = json.loads((tmp_path / "remote-made" / "train" / "manifest.json").read_text())
    assert manifest["request"]["inputs"][0]["file"] == url
    assert {source["file"] for shard in manifest["shards"] for source in shard["sources"]} == {url}


def test_folders_and_patterns_of_a_storage(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{files}"
    assert names(find_inputs([url])) == [f"{url}/a.jsonl", f"{url}/more/b.jsonl"]
    assert "1 files of other kinds are left aside" in caplog.text
    assert names(find_inputs([f"{url}/*.jsonl"])) == [f"{url}/a.jsonl"]
    assert names(find_inputs([f"{url}/**/b.jsonl"])) == [f"{url}/more/b.jsonl"]
    with pytest.raises(InputError, match="does not exist, or holds no file"):
        find_inputs([f"{url}/none/*.jsonl"])
    with pytest.raises(UsageError, match="twice"):
        find_inputs([f"{url}/a.jsonl", url])


def test_an_object_of_s3(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs, boto3 = pytest.importorskip("s3fs"), pytest.importorskip("boto3")
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="texts")
        client.upload_file(str(files / "a.jsonl"), "texts", "some/a.jsonl")
        first = find_inputs(["s3://texts/some"])
        assert names(first) == ["s3://texts/some/a.jsonl"]
        assert first[0].file.read_bytes() == (files / "a.jsonl").read_bytes()
        client.upload_file(str(files / "more" / "b.jsonl"), "texts", "some/a.jsonl")
        second = find_inputs(["s3://texts/some/*.jsonl"])  # another version is another copy
        assert second[0].file.read_bytes() == (files / "more" / "b.jsonl").read_bytes()
        assert second[0].file != first[0].file
    s3fs.S3FileSystem.clear_instance_cache()


def test_cut_connections_and_a_copy_that_is_kept(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "remote").mkdir()
    file = write_lines(tmp_path / "remote" / "long.jsonl", TEXT * 60)
    with plain_http_server(tmp_path / "remote") as port:
        proxy = CuttingProxy(port, cuts=2, after_bytes=file.stat().st_size // 2)
        (piece,) = remote_inputs(f"http://127.0.0.1:{proxy.port}/long.jsonl", cache, QUICK)
        assert proxy.cut == 2
        assert piece.file.read_bytes() == file.read_bytes()
        proxy.left = -1  # facts still pass, the file would not
        proxy.after_bytes = 2000
        (again,) = remote_inputs(f"http://127.0.0.1:{proxy.port}/long.jsonl", cache, QUICK)
        proxy.close()
    assert again == piece


def test_a_file_that_changes_while_it_is_copied(files: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = module._copy

    def copy_and_write(file: Any, part: Path, facts: Any) -> None:
        copy(file, part, facts)
        write_lines(files / "a.jsonl", TEXT[:41])

    monkeypatch.setattr(module, "_copy", copy_and_write)
    with pytest.raises(InputError, match="changed while it was copied"):
        find_inputs([f"file://{files}/a.jsonl"])
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_what_cannot_be_is_refused(files: Path) -> None:
    with plain_http_server(files) as port:
        for name, error, message in (
            ("none.jsonl", InputError, "does not exist"),
            ("more", UsageError, "ends in none of the known ways"),
            ("*.jsonl", UsageError, "cannot be listed"),
            ("a.jsonl?key=secret", UsageError, "query"),
        ):
            with pytest.raises(error, match=message):
                find_inputs([f"http://127.0.0.1:{port}/{name}"])
