"""A folder of this machine in the place of one in a bucket."""

import logging
import os
import uuid
from pathlib import Path

import pytest
from s3 import Bucket, proxy

from raypipe import mirror as mirrors
from raypipe import storage
from raypipe.mirror import Mirror, mirrored, on_disk
from raypipe.storage import Place, RemotePath, StorageError


@pytest.fixture(params=["s3", "memory"])
def folder(request: pytest.FixtureRequest) -> RemotePath:
    """A folder that does not exist yet, on a file system of pyarrow's and on one of fsspec's."""
    return RemotePath(Bucket().uri("a/b") if request.param == "s3" else f"memory://{uuid.uuid4().hex}/b")


def test_what_has_changed_is_copied_and_nothing_else(folder: RemotePath, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "report.html").write_text("first")
    (tmp_path / "best" / "model.json").write_text("{}")
    (tmp_path / ".unfinished").write_text("")
    (tmp_path / "empty").write_text("")
    mirror = Mirror(tmp_path, folder)
    mirror.push()
    assert sorted(folder.names()) == ["best/model.json", "empty", "report.html"]
    assert (folder / "best" / "model.json").read_text() == "{}"
    (folder / "best" / "model.json").unlink()
    (tmp_path / "report.html").write_text("second")
    mirror.push()
    assert (folder / "report.html").read_text() == "second"
    assert not (folder / "best" / "model.json").exists(), "what has not changed is not copied again"


def test_what_the_place_holds_is_there_and_what_becomes_of_it_is_kept(folder: RemotePath) -> None:
    (folder / "state/a.npz").write_text("1")
    (folder / "history.csv").write_text("1")
    with pytest.raises(ZeroDivisionError), mirrored(folder, last="state/a.npz") as mirror:
        assert (mirror.folder / "state/a.npz").read_text() == "1"
        (mirror.folder / "history.csv").write_text("1,2")
        raise ZeroDivisionError
    assert (folder / "history.csv").read_text() == "1,2"
    assert not mirror.folder.exists()


def test_on_a_disk_the_place_itself_is_the_folder(tmp_path: Path) -> None:
    with mirrored(tmp_path / "trials" / "trial-1", last="x") as mirror:
        assert mirror.folder == tmp_path / "trials" / "trial-1" and mirror.folder.is_dir()
        (mirror.folder / "a").write_text("1")
        mirror.push_in_passing()
    assert [file.name for file in mirror.folder.iterdir()] == ["a"]


def test_the_file_that_speaks_of_others_is_put_last_and_taken_first(tmp_path: Path) -> None:
    bucket = Bucket()
    for name in ("aa", "folds", "zz"):
        (tmp_path / name).write_text("1")
    with proxy() as traffic:
        through = RemotePath(traffic.bucket(bucket).uri("t"))
        Mirror(tmp_path, through, last="folds").push()
        put = [path.split("?")[0].rpartition("/")[2] for method, path in traffic.requests if method == "PUT"]
        traffic.requests.clear()
        Mirror(tmp_path / "back", through, last="folds").pull()
        got = [path.split("?")[0].rpartition("/")[2] for method, path in traffic.requests if method == "GET"]
    assert sorted(put) == ["aa", "folds", "zz"] and put[-1] == "folds"
    assert got[0] == "folds" and {"aa", "zz"} <= set(got)
    assert sorted(os.listdir(tmp_path / "back")) == ["aa", "folds", "zz"]


def test_where_one_file_is_not_taken_the_last_one_is_not_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In passing that is for the next time; in the end it is an error of one line."""
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 1)
    bucket = Bucket()
    for name in ("aa", "folds"):
        (tmp_path / name).write_text("1")
    with proxy() as traffic:
        traffic.fault = lambda method, path: "500" if "/aa" in path else None
        mirror = Mirror(tmp_path, RemotePath(traffic.bucket(bucket).uri("t")), last="folds")
        caplog.set_level(logging.WARNING, "raypipe")
        mirror.push_in_passing()
        assert "takes no copies: " in caplog.text and bucket.names() == []
        with pytest.raises(StorageError) as error:
            mirror.push()
        assert "\n" not in str(error.value) and bucket.names() == []
        traffic.fault = lambda method, path: None
        mirror.push()
    assert bucket.names() == ["t/aa", "t/folds"]


def test_copying_in_passing_takes_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []

    def slow_push(self: Mirror) -> None:
        pushed.append(now[0])
        now[0] += 2.0

    now = [1000.0]
    monkeypatch.setattr(mirrors.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Mirror, "push", slow_push)
    mirror = Mirror(tmp_path, RemotePath("memory://x"))
    for _ in range(100):
        mirror.push_in_passing()
        now[0] += 1.0
    assert pushed == pytest.approx([1000, 1022, 1044, 1066, 1088], abs=1)


def test_a_file_for_what_reads_from_a_disk(folder: RemotePath, tmp_path: Path) -> None:
    (folder / "model.keras").write_bytes(b"123")
    (tmp_path / "model.keras").write_bytes(b"456")
    places: list[tuple[Place, bytes]] = [(folder, b"123"), (tmp_path, b"456")]
    for place, content in places:
        with on_disk(place / "model.keras") as file:
            assert file.name == "model.keras" and file.read_bytes() == content
    assert (tmp_path / "model.keras").exists()
