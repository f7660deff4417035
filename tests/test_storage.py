"""Storage in a bucket, on a real S3 server on loopback, with faults injected before it."""

import errno
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from features import SPEC, make_store
from fsspec.implementations.local import LocalFileSystem
from pyarrow.dataset import dataset
from runs import FLAGS, ids, write_videos
from s3 import ACCESS_KEY, SECRET_KEY, Bucket, free_port, proxy

from raypipe import storage
from raypipe.config import ExtractConfig, TrialConfig, TuneConfig
from raypipe.dataset import load_dataset
from raypipe.errors import UserError
from raypipe.extract import main as extract
from raypipe.leaderboard import pending_trial
from raypipe.remote_file import open_remote
from raypipe.results import trial_as_json
from raypipe.search import warm_settings
from raypipe.storage import RemotePath, StorageError, open_file_system, place, redacted
from raypipe.store import FeatureStore
from raypipe.tune import earlier_trials
from raypipe.videos import list_videos

# --- addresses ----------------------------------------------------------------------------------------

SECRET_ADDRESSES = [
    ("s3://AKIA:xyz@bucket/a", "s3://***@bucket/a"),
    ("s3://AKIA@bucket/a", "s3://***@bucket/a"),
    ("sftp://me:pass@host/a", "sftp://***@host/a"),
    ("s3://bucket/a?secret_key=xyz&region=x", "s3://bucket/a?secret_key=***&region=x"),
    ("https://host/a.mp4?X-Amz-Signature=xyz", "https://host/a.mp4?X-Amz-Signature=***"),
]


@pytest.mark.parametrize(("address", "shown"), SECRET_ADDRESSES)
def test_an_address_with_credentials_is_refused_and_not_repeated(
    address: str, shown: str, tmp_path: Path
) -> None:
    assert redacted(address) == shown
    manifest = tmp_path / "labels.csv"
    manifest.write_text(f"path\n{address}\n")
    for attempt in (
        lambda: list_videos(address),
        lambda: list_videos(str(manifest)),
        lambda: FeatureStore(address),
        lambda: place(address),
    ):
        with pytest.raises(UserError) as refusal:
            attempt()
        assert shown in str(refusal.value) and "holds credentials" in str(refusal.value)
        assert "xyz" not in str(refusal.value) and "pass@" not in str(refusal.value)


@pytest.mark.parametrize(
    "address", ["s3://bucket/key/a.mp4?region=x", "hdfs://me@host/a", "/a/secret=b.mp4", "a?key=b"]
)
def test_other_addresses_are_not(address: str) -> None:
    assert redacted(address) == address


def test_a_storage_that_nothing_opens() -> None:
    with pytest.raises(UserError, match="nope://x/y: no such storage: Unrecognized filesystem"):
        FeatureStore("nope://x/y")


@pytest.mark.parametrize(
    "option", ["tls_verify_certificates=false", "smart_defaults=standard", "reigon=x", "versioned"]
)
def test_an_option_of_s3_that_would_be_dropped_is_refused(option: str) -> None:
    address, name = f"s3://bucket/a?region=us-east-1&{option}", option.partition("=")[0]
    sentence = f"{name} is not an option of s3:// here; these are: region, scheme, endpoint_override, tls_ca"
    for attempt in (lambda: FeatureStore(address), lambda: list_videos(address)):
        with pytest.raises(UserError, match=f"{re.escape(address)}: .*{re.escape(sentence)}"):
            attempt()


def test_a_switch_of_s3_that_is_neither_on_nor_off() -> None:
    with pytest.raises(UserError, match="not a valid boolean value: 'perhaps'"):
        FeatureStore("s3://bucket/a?region=us-east-1&allow_bucket_creation=perhaps")


@pytest.mark.parametrize(("said", "made"), [("", False), ("false", False), ("true", True), ("1", True)])
def test_a_switch_of_s3_reaches_the_client(said: str, made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    name = f"b-{uuid.uuid4().hex[:12]}"
    option = f"&allow_bucket_creation={said}" if said else ""
    system, _ = open_file_system(f"s3://{name}/a{Bucket().options}{option}")
    with nullcontext() if made else pytest.raises(OSError, match="allow_bucket_creation"):
        system.create_dir(name)
    assert system.get_file_info(name).type.name == ("Directory" if made else "NotFound")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the command openssl")
def test_a_server_with_a_certificate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    certificate, key = tmp_path / "own.pem", tmp_path / "own.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    with https(certificate, key) as port:
        options = f"?endpoint_override=localhost:{port}&region=us-east-1"
        with pytest.raises(StorageError, match=r"(?i)certificate|SSL"):
            RemotePath(f"s3://bucket/a{options}").read_bytes()
        options += f"&tls_ca_file_path={certificate}"
        assert RemotePath(f"s3://bucket/a{options}").read_bytes() == b"over TLS"


@contextmanager
def https(certificate: Path, key: Path) -> Iterator[int]:
    """The port of a server that has one object under whatever name."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(b"over TLS")))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(b"over TLS")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


# --- paths --------------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "memory"])
def folder(request: pytest.FixtureRequest) -> RemotePath:
    """A folder that does not exist yet, on a file system of pyarrow's and on one of fsspec's."""
    if request.param == "s3":
        return RemotePath(Bucket().uri("a folder/b").replace(" ", "%20"))
    return RemotePath(f"memory://{uuid.uuid4().hex}/b")


def test_a_remote_path_is_used_like_a_path(folder: RemotePath, tmp_path: Path) -> None:
    file = folder / "x 1.json"
    assert (file.name, file.parent, str(file)) == ("x 1.json", folder, file.address)
    assert not file.exists() and not file.is_file() and not list(folder.glob("*"))
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.stat()
    file.unlink(missing_ok=True)
    folder.mkdir()
    file.write_text("{}")
    assert file.exists() and file.is_file() and file.read_text() == "{}" and file.stat().st_size == 2
    (folder / "y.txt").write_bytes(b"123")
    file.copy_to(folder / "z.json")
    local = tmp_path / "local"
    local.write_bytes(bytes(range(256)) * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "big").put_file(local)
    assert sorted(path.name for path in folder.glob("*.json")) == ["x 1.json", "z.json"]
    assert (folder / "sub" / "big").read_bytes() == local.read_bytes()
    assert sorted(unquote(info.base_name) for info in folder.list(recursive=True)) == [
        "big", "x 1.json", "y.txt", "z.json",
    ]  # fmt: skip
    file.unlink()
    folder.remove_tree()
    assert not folder.list(recursive=True)


# --- neither a disk nor a bucket -----------------------------------------------------------------------


class Unwilling(LocalFileSystem):
    """Files on a disk whose move replaces nothing, as SMB's, and which takes only so much."""

    protocol = "unwilling"
    room_bytes = 100_000_000

    def mv(self, path1: str, path2: str, **kwargs: object) -> None:
        if self.exists(path2):
            raise FileExistsError(errno.EEXIST, "there already", path2)
        super().mv(path1, path2, **kwargs)

    def open(self, path: str, mode: str = "rb", **kwargs: object) -> object:
        file = super().open(path, mode, **kwargs)
        return file if mode == "rb" else Narrow(file, self.room_bytes)


class Narrow:
    """A file that takes its first bytes and then says that its disk is full."""

    def __init__(self, file: BinaryIO, room_bytes: int) -> None:
        self._file, self._room_bytes = file, room_bytes

    def write(self, content: bytes) -> int:
        self._file.write(content[: self._room_bytes])
        if len(content) > self._room_bytes:
            raise OSError(errno.ENOSPC, "no space left")
        return len(content)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


fsspec.register_implementation("unwilling", Unwilling)


@pytest.fixture(params=["local", "memory", "unwilling"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> RemotePath:
    """A folder on a file system of fsspec's, where a reader may see a file grow."""
    root = uuid.uuid4().hex if request.param == "memory" else tmp_path
    folder = RemotePath(f"{request.param}://{root}/a")
    folder.mkdir()
    return folder


def test_whatever_puts_a_file_replaces_the_old_one_and_leaves_nothing(
    other: RemotePath, tmp_path: Path
) -> None:
    file, local = other / "part-1.parquet", tmp_path / "local"
    local.write_bytes(b"second")
    file.write_bytes(b"first")
    file.put_file(local)
    assert file.read_bytes() == b"second"
    (other / "b").write_bytes(b"third")
    (other / "b").copy_to(file)
    assert file.read_bytes() == b"third"
    file.write_bytes(b"fourth")
    assert file.read_bytes() == b"fourth"
    assert sorted(info.base_name for info in other.list()) == ["b", "part-1.parquet"]


SIZE_BYTES = 60_000_000


@pytest.mark.parametrize("way", ["write_bytes", "put_file", "copy_to"])
def test_a_reader_never_sees_a_file_that_grows(way: str, tmp_path: Path) -> None:
    folder, local = RemotePath(f"local://{tmp_path}/a"), tmp_path / "new"
    folder.mkdir()
    file = folder / "part-1.parquet"
    local.write_bytes(b"n" * SIZE_BYTES)
    ways: dict[str, Callable[[], None]] = {
        "write_bytes": lambda: file.write_bytes(local.read_bytes()),
        "put_file": lambda: file.put_file(local),
        "copy_to": lambda: RemotePath(f"local://{local}").copy_to(file),
    }
    file.write_bytes(b"old")
    seen, names, ended = {3}, set(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.add(os.stat(tmp_path / "a" / file.name).st_size)
            names.update(folder.names())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(3):
            ways[way]()
            file.write_bytes(b"old")
    finally:
        ended.set()
        watcher.join()
    assert seen <= {3, SIZE_BYTES} and names == {file.name}


def test_a_write_that_fails_midway_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, local = RemotePath(f"unwilling://{tmp_path}/a"), tmp_path / "new"
    folder.mkdir()
    file = folder / "part-1.parquet"
    file.write_bytes(b"old")
    local.write_bytes(b"n" * 5000)
    monkeypatch.setattr(Unwilling, "room_bytes", 1000)
    for put in (lambda: file.write_bytes(b"n" * 5000), lambda: file.put_file(local)):
        with pytest.raises(StorageError, match="no space left"):
            put()
        assert file.read_bytes() == b"old"
        assert [info.base_name for info in folder.list()] == [file.name]


KILLED = """
import os, sys, threading
from raypipe.storage import RemotePath
folder = RemotePath(sys.argv[1])
def end_when_it_grows():
    while not any(info.size for info in folder.list() if info.base_name != "part-1.parquet"):
        pass
    os._exit(9)
threading.Thread(target=end_when_it_grows).start()
content = bytes(60_000_000)
while True:
    (folder / "part-1.parquet").write_bytes(content)
"""


def test_what_a_killed_writer_leaves_is_not_shown_and_goes_with_the_folder(tmp_path: Path) -> None:
    folder = RemotePath(f"local://{tmp_path}/a")
    (folder / "sub").mkdir()
    file = folder / "part-1.parquet"
    file.write_bytes(bytes(SIZE_BYTES))
    assert subprocess.run([sys.executable, "-c", KILLED, folder.address], timeout=60).returncode == 9
    (leftover,) = {info.base_name for info in folder.list()} - {file.name}
    assert file.stat().st_size == SIZE_BYTES
    (folder / "sub" / leftover).write_in_place(b"x")
    assert folder.names() == [file.name] and list(folder.glob("*")) == [file]
    assert not list(folder.glob("*/*"))
    folder.remove_tree()
    assert not folder.list(recursive=True)


# --- listing ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_keys_are_listed_in_pages() -> None:
    bucket = Bucket()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{bucket.port}", region_name="us-east-1")
    for i in range(10_000):
        key = f"v/{'fight' if i % 2 else 'calm'}/{i:05}.mp4"
        client.put_object(Bucket=bucket.name, Key=key, Body=b"x")
    with proxy() as traffic:
        started_s = time.monotonic()
        listing = list_videos(traffic.bucket(bucket).uri("v"))
        print(f"10,000 keys: {time.monotonic() - started_s:.2f} s, {len(traffic.requests)} requests")
        assert len(listing.videos) == 10_000 and {v.label for v in listing.videos} == {"fight", "calm"}
        assert len(traffic.requests) < 30


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_output_that_does_not_answer_is_one_sentence(
    dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    away = replace(Bucket(), port=free_port())
    config = ExtractConfig(input=str(tmp_path), output=away.uri("features"), dry_run=dry_run)
    with pytest.raises(UserError, match=r"^--output s3://.*/features\?.*: cannot be read: "):
        extract(config)


# --- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "cut", pytest.param("slow", marks=pytest.mark.slow)])
def test_requests_that_fail_are_tried_again(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth request fails: not an object is lost, changed or half there."""
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 2.0)
    bucket = Bucket()
    with proxy() as traffic:
        numbers = iter(range(1_000_000))
        traffic.fault = lambda method, path: fault if next(numbers) % 5 == 1 else None
        folder = RemotePath(traffic.bucket(bucket).uri("features"))
        store = make_store(folder, clips=30)
        assert len(load_dataset(store).clips.labels) == 30
        assert traffic.faults > 2
    assert [key for key in bucket.names() if "/." in key or key.endswith(".json")] == [
        "features/features.json"
    ]
    reread = FeatureStore(bucket.uri("features")).read(["video_id", "features"])
    local = make_store(tmp_path / "features", clips=30).read(["video_id", "features"])
    assert reread.equals(local)


@pytest.mark.parametrize("size", [0, 1, 40, 5000])
def test_a_refusal_longer_than_the_object_is_tried_again(size: int) -> None:
    """pyarrow's client, which is to read 40 bytes and is answered with 300, gives up at once."""
    bucket = Bucket().put({"small": b"x" * size})
    with proxy() as traffic:
        numbers = iter(range(1_000_000))
        traffic.fault = lambda method, path: "500" if method == "GET" and next(numbers) < 2 else None
        through = traffic.bucket(bucket)
        assert RemotePath(through.uri("small")).read_bytes() == b"x" * size
        assert traffic.faults == (2 if size else 0)  # nothing to ask for
        numbers = iter(range(1_000_000))
        assert open_remote(through.uri("small")).read() == b"x" * size


def test_a_small_object_that_is_not_to_be_had_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    bucket = Bucket().put({"small": b"x"})
    with proxy() as traffic:
        traffic.fault = lambda method, path: "500" if method == "GET" else None
        with pytest.raises(StorageError, match="GetObject"):
            RemotePath(traffic.bucket(bucket).uri("small")).read_bytes()
        assert traffic.faults == 2


def test_a_bucket_that_is_away_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 2)
    with proxy() as traffic:
        traffic.fault = lambda method, path: "500"
        address = traffic.bucket(Bucket()).uri("videos")
        with pytest.raises(UserError) as error:
            list_videos(address)
    assert "cannot be listed" in str(error.value) and "\n" not in str(error.value)
    assert SECRET_KEY not in str(error.value) and ACCESS_KEY not in str(error.value)


# --- the store ------------------------------------------------------------------------------------------


def test_plain_readers_read_a_store_in_a_bucket() -> None:
    """Each video once, also while a run has rows staged."""
    bucket = Bucket()
    make_store(RemotePath(bucket.uri("features")), clips=20)
    (shard,) = [key for key in bucket.names() if key.endswith(".parquet")]
    bucket.put({"features/.staging/part-0.parquet": bucket.get(shard)})
    table = pq.read_table(f"{bucket.name}/{shard}", filesystem=bucket.system)
    whole = dataset(
        f"{bucket.name}/features", filesystem=bucket.system, exclude_invalid_files=True
    ).to_table()
    assert table.num_rows == 20 and whole["video_id"].to_pylist() == table["video_id"].to_pylist()
    assert table.schema.field("features").type == pa.fixed_shape_tensor(pa.float16(), (SPEC.steps, SPEC.dim))


def test_rows_are_relabelled_and_nothing_else_is_left(folder: RemotePath) -> None:
    store = make_store(folder, clips=20)
    from raypipe.videos import Video

    with store.writing(SPEC):
        store.relabel({"clip003.mp4": Video("clip003.mp4", "x", label="new")})
    rows = dict(zip(*store.read(["video_id", "label"]).to_pydict().values(), strict=True))
    assert rows["clip003.mp4"] == "new" and len(rows) == 20
    names = sorted(info.base_name for info in folder.list(recursive=True))
    assert [re.sub("part-.*", "part", name) for name in names] == ["features.json", "part"]


def test_a_reader_never_sees_a_shard_half_replaced() -> None:
    """Read in several requests while it is replaced without a pause, a shard is the one or the other."""
    store = make_store(RemotePath(Bucket().uri("features")), clips=40)
    table = store.rows_without(store.shards()[0], ())
    other = table.set_column(
        table.schema.get_field_index("label"), table.schema.field("label"),
        pa.array(["z" * 400 + str(i) for i in range(40)], pa.string()),
    )  # fmt: skip
    ended = threading.Event()

    def replace() -> None:
        with store.writing(SPEC):
            while not ended.is_set():
                for rows in (other, table):
                    store.replace(store.shards()[0], [rows])

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        seen = set()
        for _ in range(15):
            labels = FeatureStore(store.path).read(["label"])["label"].to_pylist()
            seen.add(labels[0][:1])
            assert len(labels) == 40 and len({label[:1] == "z" for label in labels}) == 1
    finally:
        ended.set()
        thread.join()


# --- the commands ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bucket, list[str]]]:
    """Twelve videos and one that is none in a bucket, extracted into it by the command, every fifth request
    failing; and what the runs said."""
    folder = write_videos(tmp_path_factory.mktemp("videos"), 12)
    bucket = Bucket()
    bucket.put({f"videos/{name}": (folder / name).read_bytes() for name in ids(12)})
    bucket.put({"videos/a/broken.mp4": b"no video"})
    said = []
    with proxy() as traffic:
        numbers = iter(range(1_000_000))
        traffic.fault = lambda method, path: "500" if next(numbers) % 5 == 2 else None
        through = traffic.bucket(bucket)
        for _ in range(2):
            run = subprocess.run(
                [sys.executable, "-m", "raypipe.extract", "--input", through.uri("videos"),
                 "--output", through.uri("features"), "--shard-rows", "4", *FLAGS],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert run.returncode == 0, run.stderr[-3000:]
            said.append(run.stderr)
    yield bucket, said


@pytest.mark.slow
def test_extraction_from_a_bucket_into_a_bucket(extracted: tuple[Bucket, list[str]]) -> None:
    bucket, said = extracted
    rows = FeatureStore(bucket.uri("features")).read(["video_id", "outcome", "path"]).to_pylist()
    assert [row["video_id"] for row in rows] == [*ids(12), "a/broken.mp4"]
    assert [row["outcome"] for row in rows] == ["ok"] * 12 + ["failed"]
    assert "13 videos: 13 done before, 0 to do" in said[1] and "Ray" not in said[1]
    names = {key.removeprefix("features/") for key in bucket.names() if key.startswith("features/")}
    assert {name for name in names if not name.startswith("part-")} == {
        "features.json", "summary.json", "failures.csv", "config.yaml",
    }  # fmt: skip


@pytest.mark.slow
def test_no_credentials_are_left_anywhere(extracted: tuple[Bucket, list[str]]) -> None:
    bucket, said = extracted
    kept = "".join(said).encode() + b"".join(bucket.get(key) for key in bucket.names())
    table = FeatureStore(bucket.uri("features")).read(["path", "message"])
    kept += str(table.to_pydict()).encode()
    assert SECRET_KEY.encode() not in kept and ACCESS_KEY.encode() not in kept


# --- an earlier search ----------------------------------------------------------------------------------


def test_a_search_starts_from_the_leaderboard_of_one_in_a_bucket() -> None:
    bucket = Bucket()
    earlier = [
        replace(pending_trial(number, TrialConfig(width=width)), status="done", score=score)
        for number, width, score in (("1", 8, 0.6), ("2", 16, 0.9))
    ]
    files = {f"results/tune/trials/trial-{trial.trial_id}/trial.json": trial for trial in earlier}
    bucket.put({name: json.dumps(trial_as_json(trial)).encode() for name, trial in files.items()})
    found = earlier_trials(bucket.uri("results/tune"))
    assert [trial.trial_id for trial in found] == ["1", "2"]
    config = TuneConfig(trial=TrialConfig(model="gru"), space={"width": [8, 16]}, num_samples=4)
    assert [settings.width for settings in warm_settings(config, found)] == [16, 8]
    with pytest.raises(UserError, match="no trials there"):
        earlier_trials(bucket.uri("results/another"))
