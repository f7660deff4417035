"""Of several writers one writes; those that died are in nobody's way."""

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from s3 import Bucket

from raypipe import lease as leases
from raypipe.errors import RunFailed, UserError
from raypipe.lease import Lease, only_writer
from raypipe.storage import Place, RemotePath


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.3)
    monkeypatch.setattr(leases, "LEASE_S", 4.0)


@pytest.fixture
def locks() -> RemotePath:
    return RemotePath(Bucket().uri("features/.lock"))


def test_a_second_writer_is_refused_and_the_first_goes_on(locks: RemotePath, quick: None) -> None:
    first = Lease(locks, refuse="another run writes")
    first.take()
    with pytest.raises(UserError, match="another run writes"):
        Lease(locks, refuse="another run writes").take()
    first.check()
    first.close()
    second = Lease(locks, refuse="")
    second.take()
    second.close()
    assert not list(locks.glob("*"))


def test_a_writer_of_another_machine_that_has_died_is_waited_for_and_removed(
    locks: RemotePath, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raypipe")
    (locks / "dead").write_text(json.dumps({"machine": "another", "pid": 1, "started": "1", "beat": 3}))
    lease = Lease(locks, refuse="")
    lease.take()
    assert "another run may be writing" in caplog.text
    (marker,) = locks.glob("*")
    assert marker.name != "dead"
    lease.close()


def test_a_killed_writer_of_this_machine_is_not_waited_for(
    locks: RemotePath, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raypipe")
    code = f"""
import os
from raypipe.lease import Lease
from raypipe.storage import RemotePath
Lease(RemotePath({locks.address!r}), refuse="").take()
os.kill(os.getpid(), 9)"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(locks.glob("*"))) == 1
    lease = Lease(locks, refuse="")
    lease.take()
    assert "another run may be writing" not in caplog.text
    lease.close()


def test_a_writer_that_was_taken_for_dead_writes_no_more(
    locks: RemotePath, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 60.0)  # it is away
    lease = Lease(locks, refuse="")
    lease.take()
    for marker in locks.glob("*"):
        marker.unlink()
    time.sleep(leases.LEASE_S / 2 + 0.5)
    with pytest.raises(RunFailed, match="lost its place as the writer there"):
        lease.check()
    lease.close()


def test_a_writer_that_was_away_is_not_the_writer_again_for_its_marker_came_back(
    locks: RemotePath, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat was on its way while it stood still."""
    lease = Lease(locks, refuse="")
    lease.take()
    (locks / "another").write_text("{}")
    awake_s = leases._awake_s
    monkeypatch.setattr(leases, "_awake_s", lambda: awake_s() + leases.LEASE_S)
    time.sleep(3 * leases.BEAT_S)
    (locks / "another").unlink()  # it wrote, and has ended
    with pytest.raises(RunFailed, match="another run writes there now"):
        lease.check()
    lease.close()


def test_of_many_that_begin_at_once_never_two_write(locks: RemotePath, quick: None) -> None:
    writing, most, lock = 0, 0, threading.Lock()

    def run() -> None:
        nonlocal writing, most
        lease = Lease(locks, refuse="")
        try:
            lease.take()
        except UserError:
            return
        with lock:
            writing += 1
            most = max(most, writing)
        time.sleep(0.5)
        with lock:
            writing -= 1
        lease.close()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 1  # none, where each saw another
    alone = Lease(locks, refuse="")
    alone.take()
    alone.close()


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_folder_has_one_writer_whatever_it_is_on(kind: str, tmp_path: Path, quick: None) -> None:
    folder: Place = tmp_path / "run" if kind == "disk" else RemotePath(Bucket().uri("run"))
    with only_writer(folder, named="--name run", refuse="somebody is there") as check:
        check()
        with (
            pytest.raises(UserError, match="--name run: somebody is there"),
            only_writer(folder, named="--name run", refuse="somebody is there"),
        ):
            pass
    with only_writer(folder, named="--name run", refuse="somebody is there"):
        pass
    with (
        pytest.raises(UserError, match=r"--name x: cannot be written: .*NO_SUCH_BUCKET"),
        only_writer(RemotePath(Bucket().uri("x").replace("s3://b-", "s3://c-")), named="--name x", refuse=""),
    ):
        pass
