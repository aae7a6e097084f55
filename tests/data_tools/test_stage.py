"""Datasets behind URLs: uploaded, staged, verified; lost connections, truncated objects, a full cache, a kill."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import ShardError, StorageError, UsageError
from data_tools.manifest import TokenizerIdentity, load_manifest, save_manifest
from data_tools.shard_verify import verify_dataset
from data_tools.stage import stage_dataset
from data_tools.storage import Patience
from data_tools.upload import upload_dataset
from tests.data_tools.conftest import write_dataset
from tests.data_tools.storages import CuttingProxy, plain_http_server, s3_server
from tests.distributed.ranks import REPOSITORY

BUCKET = "corpora"
QUICK = Patience(attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.02, timeout_seconds=10)
TOKENIZER = b'{"model": {}}'


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server with one empty bucket, which the environment names to everyone."""
    s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install 'athanor-pretrain[storage]'")
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-word")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    reach(s3_port, monkeypatch)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])


def reach(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two splits of several shards, and the tokenizer that they name."""
    folder = tmp_path / "made"
    for split, count in {"train": 60, "validation": 5}.items():
        write_dataset(folder / split, [[n + 1] * 999 for n in range(count)], shard_tokens=20_000)
        identity = TokenizerIdentity(name="tiny", sha256=hashlib.sha256(TOKENIZER).hexdigest())
        save_manifest(replace(load_manifest(folder / split), split=split, tokenizer=identity), folder / split)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER)
    return folder


@pytest.fixture
def url(s3: Any, dataset: Path) -> str:
    upload_dataset(dataset, f"s3://{BUCKET}/some/tokens", patience=QUICK)
    return f"s3://{BUCKET}/some/tokens"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_comes_is_what_was_sent(url: str, dataset: Path, tmp_path: Path) -> None:
    staged = stage_dataset(url, tmp_path / "cache", patience=QUICK)
    assert contents(staged.folder) == contents(dataset)
    assert staged.fetched_bytes == sum(path.stat().st_size for path in dataset.rglob("shard-*"))
    again = stage_dataset(url + "/", tmp_path / "cache", patience=QUICK)
    assert (again.folder, again.fetched_bytes) == (staged.folder, 0)


def test_one_split_by_name_or_by_url(url: str, dataset: Path, tmp_path: Path) -> None:
    staged = stage_dataset(url, tmp_path / "cache", splits=["validation"], patience=QUICK)
    assert sorted(path.name for path in staged.folder.iterdir()) == ["tokenizer", "validation"]
    more = stage_dataset(url, tmp_path / "cache", splits=["train"], patience=QUICK)
    assert contents(more.folder) == contents(dataset)  # the same entry, now with both
    alone = stage_dataset(f"{url}/validation", tmp_path / "cache", splits=["train"], patience=QUICK)
    assert contents(alone.folder) == contents(dataset / "validation")
    assert (alone.folder.parent / "tokenizer" / "tokenizer.json").read_bytes() == TOKENIZER
    with pytest.raises(ShardError, match="no split test .it has train, validation"):
        stage_dataset(url, tmp_path / "cache", splits=["test"], patience=QUICK)


def test_a_file_that_was_lost_or_cut_is_fetched_again_and_no_other(url: str, dataset: Path, tmp_path: Path) -> None:
    folder = stage_dataset(url, tmp_path / "cache", patience=QUICK).folder
    (folder / "train" / "shard-00001.bin").unlink()
    cut = folder / "train" / "shard-00000.idx"
    cut.write_bytes(cut.read_bytes()[:-5])
    again = stage_dataset(url, tmp_path / "cache", patience=QUICK)
    assert contents(again.folder) == contents(dataset)
    assert again.fetched_bytes == (folder / "train" / "shard-00001.bin").stat().st_size + cut.stat().st_size


@pytest.mark.chaos
def test_connections_that_are_cut_again_and_again(
    url: str, dataset: Path, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.storage.BLOCK_BYTES", 10_000)  # so that files are gone on with in their middle
    proxy = CuttingProxy(s3_port, cuts=12, after_bytes=8_000)
    reach(proxy.port, monkeypatch)
    staged = stage_dataset(url, tmp_path / "cache", workers=2, patience=replace(QUICK, attempts=20))
    proxy.close()
    assert proxy.cut == 12
    assert contents(staged.folder) == contents(dataset)


@pytest.mark.chaos
def test_a_storage_that_stays_away_ends_in_one_error_and_what_came_is_kept(
    url: str, dataset: Path, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = CuttingProxy(s3_port, cuts=-1, after_bytes=30_000)  # manifests pass, no shard does
    reach(proxy.port, monkeypatch)
    with pytest.raises(StorageError, match=r"shard-0000\d.bin .at byte 0. failed 4 times"):
        stage_dataset(url, tmp_path / "cache", splits=["train"], workers=1, patience=QUICK)
    proxy.close()
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert not (entry / "train").exists()
    reach(s3_port, monkeypatch)
    assert contents(stage_dataset(url, tmp_path / "cache", patience=QUICK).folder) == contents(dataset)


def test_a_storage_that_cannot_be_asked_leaves_the_staged_copy_in_use(
    url: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    staged = stage_dataset(url, tmp_path / "cache", patience=QUICK)
    split = stage_dataset(f"{url}/validation", tmp_path / "cache", patience=QUICK)
    reach(CuttingProxy(s3_port, cuts=-1, after_bytes=0).port, monkeypatch)
    again = stage_dataset(url, tmp_path / "cache", splits=["train"], patience=QUICK)
    assert (again.folder, again.fetched_bytes) == (staged.folder, 0)
    again = stage_dataset(f"{url}/validation", tmp_path / "cache", splits=["train"], patience=QUICK)
    assert (again.folder, again.fetched_bytes) == (split.folder, 0)
    assert "is not asked whether it has changed" in caplog.text
    with pytest.raises(StorageError, match="failed 4 times"):
        stage_dataset(url, tmp_path / "other", patience=QUICK)


@pytest.mark.chaos
def test_a_truncated_object_is_refused(url: str, s3: Any, tmp_path: Path) -> None:
    key = "some/tokens/train/shard-00001.bin"
    whole = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    s3.put_object(Bucket=BUCKET, Key=key, Body=whole[:-7])
    with pytest.raises(ShardError, match=rf"shard-00001.bin has {len(whole) - 7} bytes"):
        stage_dataset(url, tmp_path / "cache", patience=QUICK)
    s3.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(ShardError, match=r"shard-00001.bin is (missing|shorter)"):
        stage_dataset(url, tmp_path / "cache", patience=QUICK)
    assert not list((tmp_path / "cache").glob("*/train"))


@pytest.mark.chaos
def test_an_object_of_another_hash_is_never_published(url: str, s3: Any, tmp_path: Path) -> None:
    key = "some/tokens/train/shard-00001.bin"
    whole = bytearray(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    whole[1000] ^= 1
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(whole))
    with pytest.raises(ShardError, match=r"shard-00001.bin does not match the manifest's hash, twice"):
        stage_dataset(url, tmp_path / "cache", patience=QUICK)
    assert not list((tmp_path / "cache").glob("*/train"))
    assert not list((tmp_path / "cache").rglob("shard-00001.bin"))


@pytest.mark.chaos
def test_bad_bytes_of_an_earlier_run_are_thrown_away(url: str, dataset: Path, tmp_path: Path) -> None:
    folder = stage_dataset(url, tmp_path / "cache", patience=QUICK).folder
    name = "shard-00000.bin"
    raw = (folder / "train" / name).read_bytes()
    (folder / "train" / name).unlink()
    (folder / "train" / f"{name}.part").write_bytes(b"\1\2\3\4" + raw[4:5000])
    assert contents(stage_dataset(url, tmp_path / "cache", patience=QUICK).folder) == contents(dataset)


def test_a_tokenizer_whose_file_changed_is_refused(url: str, s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="some/tokens/tokenizer/tokenizer.json", Body=b"{}")
    with pytest.raises(ShardError, match="no file in .*/tokenizer has the sha256"):
        stage_dataset(url, tmp_path / "cache", patience=QUICK)


@pytest.mark.parametrize("change", [{"name": "../../outside"}, {"name": "/etc/outside"}])
def test_a_manifest_that_names_files_outside_is_refused(url: str, s3: Any, tmp_path: Path, change: dict) -> None:
    folder = tmp_path / "bad"
    manifest = write_dataset(folder, [[1, 2]])
    save_manifest(replace(manifest, shards=(replace(manifest.shards[0], **change),)), folder)
    s3.upload_file(str(folder / "manifest.json"), BUCKET, "some/tokens/train/manifest.json")
    with pytest.raises(ShardError, match="leaves the folder"):
        stage_dataset(url, tmp_path / "cache", patience=QUICK)


def test_a_split_whose_name_is_a_path_is_refused(s3: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    save_manifest(replace(write_dataset(folder, [[1, 2]]), split="../../outside"), folder)
    s3.upload_file(str(folder / "manifest.json"), BUCKET, "bad/manifest.json")
    with pytest.raises(ShardError, match="is of a split"):
        stage_dataset(f"s3://{BUCKET}/bad", tmp_path / "cache", patience=QUICK)


def test_no_symbolic_link_in_the_cache_is_followed(url: str, tmp_path: Path) -> None:
    folder = stage_dataset(url, tmp_path / "cache", patience=QUICK).folder
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / "train" / "shard-00000.bin").unlink()
    (folder / "train" / "shard-00000.bin.part").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        stage_dataset(url, tmp_path / "cache", patience=QUICK)
    assert victim.read_text() == "precious"


def test_a_dataset_that_changed_behind_its_url_is_another_one(url: str, s3: Any, tmp_path: Path) -> None:
    first = stage_dataset(url, tmp_path / "cache", splits=["train"], patience=QUICK)
    other = tmp_path / "other"
    write_dataset(other, [[7] * 99])
    for path in other.iterdir():
        s3.upload_file(str(path), BUCKET, f"some/tokens/train/{path.name}")
    s3.delete_object(Bucket=BUCKET, Key="some/tokens/tokenizer/tokenizer.json")
    second = stage_dataset(url, tmp_path / "cache", splits=["train"], patience=QUICK)
    assert second.folder != first.folder
    assert contents(second.folder / "train") == contents(other)
    assert verify_dataset(first.folder) == []  # who reads it goes on


def _stage_and_tell(url: str, cache: Path, answers: Any) -> None:
    answers.put(stage_dataset(url, cache).fetched_bytes)


def test_two_processes_copy_once(dataset: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    words = (f"file://{dataset}", tmp_path / "cache", answers)
    both = [context.Process(target=_stage_and_tell, args=words) for _ in range(2)]
    for process in both:
        process.start()
    fetched = sorted(answers.get(timeout=60) for _ in both)
    for process in both:
        process.join(timeout=60)
    assert fetched[0] == 0
    assert fetched[1] == sum(path.stat().st_size for path in dataset.rglob("shard-*"))


def test_a_server_without_ranges(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with plain_http_server(dataset) as port:
        proxy = CuttingProxy(port, cuts=5, after_bytes=20_000)
        staged = stage_dataset(f"http://127.0.0.1:{proxy.port}", tmp_path / "cache", workers=2, patience=QUICK)
        proxy.close()
    assert proxy.cut == 5
    assert contents(staged.folder) == contents(dataset)
    assert "wrong hash" not in caplog.text  # what came before was kept, and rightly continued


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    patience = replace(QUICK, attempts=2, timeout_seconds=0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(StorageError, match="failed 2 times"):
            stage_dataset(url, tmp_path / "cache", patience=patience)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://key:very-secret@bucket/x", "user name or password"),
        ("https://me:very-secret@host/x", "user name or password"),
        ("https://host/x?X-Amz-Signature=very-secret", "query"),
        ("zip://x.zip::s3://bucket/y", "no URL of a known storage"),
        ("s3://", "no URL of a known storage"),
    ],
)
def test_secrets_in_a_url_are_refused_and_not_repeated(run, tmp_path: Path, url: str, found: str) -> None:
    code, out, err = run("stage", url, "--cache", tmp_path / "cache")
    assert code == 64
    assert found in err
    assert "very-secret" not in out + err


def test_no_secret_is_logged_or_kept(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage_dataset(url, tmp_path / "cache", patience=QUICK)
    assert "a-secret-word" not in caplog.text
    assert not any(b"a-secret-word" in content for content in contents(tmp_path / "cache").values())


def test_an_upload_goes_on_and_refuses_another_dataset(s3: Any, dataset: Path, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/mine"
    total = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert upload_dataset(dataset, url, patience=QUICK).sent_bytes == total
    s3.put_object(Bucket=BUCKET, Key="mine/train/shard-00000.bin", Body=b"damaged")
    size = (dataset / "train" / "shard-00000.bin").stat().st_size
    again = upload_dataset(dataset, url, patience=QUICK)
    assert (again.sent_bytes, again.present_bytes) == (size, total - size)
    write_dataset(tmp_path / "other" / "train", [[1, 2, 3]])
    with pytest.raises(UsageError, match="holds another dataset"):
        upload_dataset(tmp_path / "other", url, patience=QUICK)
    (dataset / "train" / "shard-00001.bin").unlink()
    with pytest.raises(ShardError, match="is missing"):
        upload_dataset(dataset, f"s3://{BUCKET}/elsewhere", patience=QUICK)


def test_an_upload_that_is_cut_off_shows_no_manifest(s3: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_tools import upload

    def lose(file: Any, *, read_back: bool) -> bool:
        return "shard-00001" not in file.path.name

    monkeypatch.setattr(upload, "_holds", lose)
    with pytest.raises(StorageError, match="does not give back what was sent"):
        upload_dataset(dataset, f"s3://{BUCKET}/lost", patience=QUICK)
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix="lost/").get("Contents", [])]
    assert not [key for key in keys if key.endswith("manifest.json")]


def test_the_command_lines(run: Callable[..., tuple[int, str, str]], s3: Any, dataset: Path, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/by/command"
    assert run("upload", dataset, url)[0] == 0
    code, out, err = run("stage", url, "--cache", tmp_path / "cache", "--split", "train", "--max-size", "1GB")
    assert (code, "fetched" in err) == (0, True)
    assert contents(Path(out.strip()) / "train") == contents(dataset / "train")
    code, out, err = run("stage", f"s3://{BUCKET}/nothing", "--cache", tmp_path / "cache")
    assert code == 65
    assert "holds no dataset" in err
    assert run("stage", url, "--cache", tmp_path / "cache", "--max-size", "many")[0] == 64


@pytest.mark.chaos
def test_killed_while_staging_the_next_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    with plain_http_server(dataset) as port:
        stopping = CuttingProxy(port, cuts=-1, after_bytes=20_000)  # bytes come, and shards never end
        url = f"http://127.0.0.1:{stopping.port}"
        program = (
            "import sys; from data_tools.stage import stage_dataset; from data_tools.storage import Patience;"
            "stage_dataset(sys.argv[1], sys.argv[2], patience=Patience(attempts=10**6, first_wait_seconds=0.05))"
        )
        command = [sys.executable, "-c", program, url, str(tmp_path / "cache")]
        process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ}, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cache").rglob("*.part")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        assert list((tmp_path / "cache").rglob("*.part"))
        stopping.left = 0
        staged = stage_dataset(url, tmp_path / "cache", patience=QUICK)
        stopping.close()
    assert contents(staged.folder) == contents(dataset)
