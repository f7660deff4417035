"""The feature store: what a reader may see of it, and what any crash may leave."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from features import SPEC, add, around_renames, five_clips, make_store, rows, vector
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from torn import killed_while_writing

from raypipe.commits import Commits
from raypipe.errors import UserError
from raypipe.plan import Plan, plan_run
from raypipe.schema import ROW_SCHEMA
from raypipe.shards import features_array, shard_table, stage_shard
from raypipe.store import FeatureStore
from raypipe.videos import Video

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
"""Python 3.12 warns of locks that other threads may hold; Arrow's threads are made anew in a forked child."""


def stored(store: FeatureStore) -> list[str]:
    return store.read(["video_id"])["video_id"].to_pylist()


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return five_clips(tmp_path / "features")


# --- reading ----------------------------------------------------------------------------------------


def test_what_is_written_reads_as_it_was(store: FeatureStore) -> None:
    table = FeatureStore(store.path).read(["video_id", "label", "group", "features"])
    assert table.column_names == ["video_id", "label", "group", "features"]
    assert table["video_id"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert table["label"].to_pylist() == ["x", "x", "x", "y", "y"]
    assert table["group"].to_pylist() == [None, None, None, "g", "g"]
    expected = np.stack([vector(video_id) for video_id in "abcde"])
    np.testing.assert_array_equal(features_array(table["features"], SPEC), expected)
    assert store.spec() == SPEC
    assert json.loads((store.path / "features.json").read_text())["fingerprint"] == SPEC.fingerprint


def test_a_failed_video_has_no_features(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        add(store, rows("a"), rows("b", outcome="failed", reason="damaged", message="cut"))
    table = store.read(["outcome", "reason", "message", "features"])
    assert table.drop_columns(["features"]).to_pylist() == [
        {"outcome": "ok", "reason": None, "message": None},
        {"outcome": "failed", "reason": "damaged", "message": "cut"},
    ]
    assert table["features"].is_null().to_pylist() == [False, True]
    expected = [vector("a"), np.zeros((SPEC.steps, SPEC.dim))]
    np.testing.assert_array_equal(features_array(table["features"], SPEC), expected)


def test_an_empty_store(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    assert not store.exists() and list(store.index()) == []
    with store.writing(SPEC):
        pass
    assert store.exists() and store.read(["video_id", "features"]).num_rows == 0
    assert features_array(store.read(["features"])["features"], SPEC).shape == (0, SPEC.steps, SPEC.dim)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "--features {path}: no feature store there; run python -m raypipe.extract first, "
         "or name the folder it wrote"),
        ("{", "{path}/features.json: cannot be read: "),
        ('{"schema_version": 99}', "{path}/features.json: is not of schema_version 2, which this version "
         "of raypipe reads; extract the features again"),
        ('{"schema_version": 2}', "{path}/features.json: is not of schema_version 2, which"),
        ("[]", "{path}/features.json: is not of schema_version 2, which"),
    ],
    ids=["none", "broken", "another version", "half", "a list"],
)  # fmt: skip
def test_no_store_to_read(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "features.json").write_text(content)
    with pytest.raises(UserError) as caught:
        FeatureStore(tmp_path).spec()
    assert str(caught.value).startswith(said.replace("{path}", str(tmp_path)))


def test_a_shard_that_something_damaged_is_named(store: FeatureStore) -> None:
    shard = store.shards()[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        store.read(["label"])
    assert str(caught.value).startswith(f"{shard}: cannot be read: ")
    assert "delete it and run raypipe.extract again" in str(caught.value)


# --- one writer, one kind of features ---------------------------------------------------------------


def test_other_features_are_refused_by_name(store: FeatureStore) -> None:
    with pytest.raises(UserError) as caught, store.writing(replace(SPEC, view="both", dim=16)):
        pass
    assert str(caught.value) == (
        f"--output {store.path}: holds other features: view is rgb there and both here, "
        "dim is 8 there and 16 here; choose another --output"
    )
    assert store.spec() == SPEC


def hold(path: Path, held: Any, release: Any) -> None:
    with FeatureStore(path).writing(SPEC):
        held.set()
        release.wait()


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_second_writer_is_refused_until_the_first_is_gone(end: str, store: FeatureStore) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    first = context.Process(target=hold, args=(store.path, held, release), daemon=True)
    first.start()
    assert held.wait(120)
    with pytest.raises(UserError) as caught, store.writing(SPEC):
        pass
    assert str(caught.value) == f"--output {store.path}: another run is writing there; wait for it"
    assert stored(store) == list("abcde")  # reading goes on
    release.set() if end == "finished" else first.kill()
    first.join()
    with store.writing(SPEC):
        add(store, rows("f"))
    assert stored(store) == list("abcdef")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(UserError) as caught, FeatureStore(path).writing(SPEC):
            pass
        assert str(caught.value) == f"--output {path}: cannot be written: {reason}"


# --- writing ----------------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_not_seen_and_cleaned(store: FeatureStore) -> None:
    store.staging.mkdir()
    stage_shard(rows("z"), store.staging)
    half = (store.path / store.shards()[0]).read_bytes()[:100]
    (store.path / f".{store.shards()[0].name}.123").write_bytes(half)
    assert stored(store) == list("abcde")
    with store.writing(SPEC):
        assert list(store.staging.iterdir()) == []
        add(store, rows("z"))
    assert stored(store) == list("abcdez")
    assert not store.staging.exists()


def test_what_was_written_in_part_goes_and_what_only_looks_like_it_stays(store: FeatureStore) -> None:
    """--output may be a folder that holds other things, such as a home folder."""
    names = ["features.json", "summary.json", "failures.csv", "config.yaml"]
    before = set(store.path.iterdir())
    killed_while_writing(*(store.path / name for name in names))
    torn = set(store.path.iterdir()) - before
    assert len(torn) == len(names)
    owns = [".editor.json.backup", ".editor.json.123", ".summary.json.old", ".config.yaml.1~"]
    for own in owns:
        (store.path / own).write_text("mine")
    with store.writing(SPEC):
        pass
    assert set(store.path.iterdir()) - before == {store.path / own for own in owns}


def test_relabel(store: FeatureStore) -> None:
    untouched = store.shards()[0].stat().st_mtime_ns, store.shards()[1].stat().st_mtime_ns
    with store.writing(SPEC):
        store.relabel({})
        store.relabel({"b": Video("b", "/b", "new", "h", "test"), "nobody": Video("nobody", "/n")})
    now = store.shards()[0].stat().st_mtime_ns, store.shards()[1].stat().st_mtime_ns
    assert sum(a == b for a, b in zip(untouched, now, strict=True)) == 1
    table = store.read(["video_id", "label", "group", "split", "path", "features"])
    assert table.select(["label", "group", "split"]).to_pylist() == [
        {"label": "x", "group": None, "split": None},
        {"label": "new", "group": "h", "split": "test"},
        {"label": "x", "group": None, "split": None},
        {"label": "y", "group": "g", "split": None},
        {"label": "y", "group": "g", "split": None},
    ]
    assert set(table["path"].to_pylist()) == {"/v.mp4"}
    np.testing.assert_array_equal(features_array(table["features"], SPEC)[1], vector("b"))


def test_made_up_stores_are_real_ones(tmp_path: Path) -> None:
    """The other tests' stores obey the same schema."""
    store = make_store(tmp_path, clips=4, failed=1)
    assert pq.read_schema(store.shards()[0]).equals(SPEC.shard_schema)
    assert stored(store) == [f"clip{i:03}.mp4" for i in range(5)]


# --- any order of events, and a crash at any of them -------------------------------------------------


@dataclass(frozen=True)
class Footage:
    """What extracting a video gives at the moment."""

    take: int
    """Another one whenever it gives something else."""
    clips: int
    failed: bool

    @property
    def digest(self) -> str:
        return f"{self.take}/{self.clips}"


Group = list[tuple[str, int]]
"""The clips that a worker stages together, each as video and number."""


def whole_videos(folder: Path) -> dict[str, tuple[str, str]]:
    """Digest and label of each video to a reader that knows nothing but Parquet; asserts that each is whole:
    every clip there, once, and all of one take."""
    clips = defaultdict(list)
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            table = file.read(["video_id", "clip_index", "content_digest", "label"])
        for row in table.to_pylist():
            clips[row["video_id"]].append((row["clip_index"], row["content_digest"], row["label"]))
    videos = {}
    for video_id, rows_there in clips.items():
        ((digest, label),) = {row[1:] for row in rows_there}
        indices = sorted(index for index, _, _ in rows_there)
        assert indices == list(range(int(digest.split("/")[1]))), (video_id, rows_there)
        videos[video_id] = (digest, label)
    return videos


def staged_rows(group: Group, listed: dict[str, Video], footage: dict[str, Footage]) -> pa.Table:
    found = []
    for video_id, index in group:
        film, failed = footage[video_id], footage[video_id].failed and index == 0
        columns = asdict(listed[video_id]) | {"clip_index": index, "content_digest": film.digest}
        found.append(columns | {"outcome": "failed" if failed else "ok"})
    features = [None if row["outcome"] == "failed" else b"\0" * 2 * SPEC.steps * SPEC.dim for row in found]
    return shard_table(pa.Table.from_pylist(found, schema=ROW_SCHEMA), features, SPEC)


def grouped(clips: Group, rng: random.Random) -> list[Group]:
    """The clips in shards as workers may stage them: any order and size, some twice, some shards too."""
    groups: list[Group] = []
    for some in (clips, rng.sample(clips, rng.randint(0, len(clips)))):
        left = rng.sample(some, len(some))
        while left:
            size = rng.randint(1, 4)
            groups.append(left[:size])
            left = left[size:]
    groups += rng.sample(groups, rng.randint(0, min(2, len(groups))))
    return rng.sample(groups, len(groups))


def extract(
    store: FeatureStore,
    listed: dict[str, Video],
    footage: dict[str, Footage],
    rng: random.Random,
    *,
    retry_failed: bool,
    tell: Callable[[list[str]], object],
) -> None:
    """A run without Ray and decoding: up to three shards are staged ahead of the one that is committed."""
    with store.writing(SPEC):
        plan = plan_run(list(listed.values()), store.index(), retry_failed=retry_failed)
        store.relabel(plan.relabelled)
        replaced = [video.video_id for video in plan.replaced]
        commits = Commits(store, shard_rows=rng.choice([2, 4, 8]), replaced=replaced)
        ids = [video.video_id for video in plan.todo]
        waiting: list[tuple[str, dict[str, int]]] = []
        for group in grouped([(v, i) for v in ids for i in range(footage[v].clips)], rng):
            last = {v: i + 1 for v, i in group if i + 1 == footage[v].clips}
            waiting.append((stage_shard(staged_rows(group, listed, footage), store.staging), last))
            while len(waiting) > rng.randint(0, 3):
                tell(commits.add(*waiting.pop(0)))
        for staged, last in waiting:
            tell(commits.add(staged, last))
        assert commits.done == set(ids)


def forked(work: Callable[[], object]) -> int:
    """The id of a child process that does this work and exits with 0, or with 1 where it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(200)  # a child that hangs is killed, and seen to be
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


FILE_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir"})


def kill_at_change(number: int) -> None:
    """SIGKILL for this process when it is about to change a file system for the `number`th time.

    A name made, given or removed: between two of these nothing changes but what is in a file that nobody
    sees yet, see `kill_at_size`. Python raises the event just before the system call. Nothing runs after
    the signal: no `finally`, no flushing of buffers.
    """
    left = number

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in FILE_CHANGES or writes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def kill_at_size(size_bytes: int) -> None:
    """The kernel kills this process in the middle of writing a file that is longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


Change = tuple[str, int, int, bool]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["new", "new", "another file", "another label", "would do now"]),
        st.integers(0, 20),
        st.integers(1, 5),
        st.booleans(),
    ),
    max_size=6,
)
SEEDS = st.integers(0, 999)
Crash = tuple[Callable[[int], None], int]
CRASHES = st.one_of(
    st.builds(lambda number: (kill_at_change, number), st.integers(3, 60)),
    st.builds(lambda size: (kill_at_size, size), st.integers(6_200, 7_000)),
)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Runs over listings that change, some of them killed, and what a reader sees after and during each."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = FeatureStore(Path(self.folder.name) / "store")
        self.listed: dict[str, Video] = {}
        self.footage: dict[str, Footage] = {}
        self.visible: dict[str, str] = {}  # the digest of each video that the reader has seen
        self.takes = 0
        self.change("new", 0, clips=3, failed=True)

    def film(self, video_id: str, clips: int, failed: bool) -> None:
        self.takes += 1
        self.footage[video_id] = Footage(self.takes, clips, failed)

    def change(self, kind: str, which: int, clips: int, failed: bool) -> None:
        """One event since the last run: a new video, or something about one that is listed."""
        if kind == "new":
            video_id = f"v{len(self.listed)}"
            self.listed[video_id] = Video(video_id, "/v", label="x", size_bytes=0, modified_s=0.0)
            self.film(video_id, clips, failed)
            return
        video_id = list(self.listed)[which % len(self.listed)]
        old = self.listed[video_id]
        if kind == "another file":
            self.listed[video_id] = replace(old, size_bytes=old.size_bytes + 1)
            self.film(video_id, clips, failed)
        elif kind == "another label":
            self.listed[video_id] = replace(old, label="xyz"[clips % 3])
        elif self.footage[video_id].failed:  # "would do now"
            self.film(video_id, clips, False)

    @rule(changes=CHANGES, seed=SEEDS, retry_failed=st.booleans())
    def a_run(self, changes: list[Change], seed: int, retry_failed: bool) -> None:
        for change in changes:
            self.change(*change)
        plan, told = self.plan(retry_failed), []
        with around_renames(lambda: self.look(plan.todo)):
            extract(
                self.store, self.listed, self.footage, random.Random(seed),
                retry_failed=retry_failed, tell=told.extend,
            )  # fmt: skip
        self.finished(plan, told, retry_failed)

    @rule(changes=CHANGES, seed=SEEDS, retry_failed=st.booleans(), crash=CRASHES)
    def a_killed_run(self, changes: list[Change], seed: int, retry_failed: bool, crash: Crash) -> None:
        for change in changes:
            self.change(*change)
        plan = self.plan(retry_failed)
        reading, writing = os.pipe()
        arm, at = crash

        def work() -> None:
            arm(at)
            extract(
                self.store, self.listed, self.footage, random.Random(seed), retry_failed=retry_failed,
                tell=lambda ids: os.write(writing, "".join(f"{v}\n" for v in ids).encode()),
            )  # fmt: skip

        child = forked(work)
        os.close(writing)
        with open(reading) as pipe:
            told = pipe.read().split()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:  # it was done before it came to that
            self.finished(plan, told, retry_failed)
            return
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ)
        self.look(plan.todo)
        assert all(self.visible[v] == self.footage[v].digest for v in told)

    def plan(self, retry_failed: bool) -> Plan:
        return plan_run(list(self.listed.values()), self.store.index(), retry_failed=retry_failed)

    def look(self, todo: list[Video]) -> None:
        """What a reader sees while a run is doing `todo`."""
        now = whole_videos(self.store.path)
        assert now.keys() >= self.visible.keys()
        extracted = {video.video_id for video in todo}
        for video_id, (digest, _) in now.items():
            is_new = video_id in extracted and digest == self.footage[video_id].digest
            assert is_new or digest == self.visible.get(video_id)
        self.visible = {video_id: digest for video_id, (digest, _) in now.items()}

    def finished(self, plan: Plan, told: list[str], retry_failed: bool) -> None:
        self.look(plan.todo)
        assert sorted(told) == sorted(video.video_id for video in plan.todo)
        assert all(self.visible[v] == self.footage[v].digest for v in told)
        there = whole_videos(self.store.path)
        assert {v: label for v, (_, label) in there.items()} == {v: x.label for v, x in self.listed.items()}
        names = {path.name for path in self.store.path.iterdir() if not path.name.startswith("part-")}
        assert names - {f for f in names if f.startswith(".features.json.")} == {"features.json", ".lock"}
        again = self.plan(False)
        assert (again.todo, again.relabelled, again.done) == ([], {}, len(self.listed))
        if retry_failed:
            still = [v for v in self.plan(True).todo if not self.footage[v.video_id].failed]
            assert still == []

    def teardown(self) -> None:
        with self.folder:
            self.a_run([], seed=0, retry_failed=True)
            assert self.visible == {video_id: film.digest for video_id, film in self.footage.items()}


@forks
@pytest.mark.timeout(900)
def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        AnyOrderOfEvents,
        settings=settings(
            max_examples=15,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # making a failure smaller takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


@forks
@pytest.mark.parametrize("seed", range(2))
def test_a_writer_killed_at_random_moments_under_a_readers_eyes(seed: int, tmp_path: Path) -> None:
    """The writer extracts, changes and relabels videos without end; it is killed nine times."""
    store, rng = FeatureStore(tmp_path / "store"), random.Random(seed)

    def write() -> None:
        mine = random.Random(rng.random())
        take = time.time_ns()
        while True:
            listed, footage = {}, {}
            for number in range(12):
                take += 1
                video_id = f"v{number}"
                changed = mine.random() < 0.5
                listed[video_id] = Video(
                    video_id,
                    "/v",
                    label=mine.choice("xyz"),
                    size_bytes=take if changed else 0,
                    modified_s=0.0,
                )
                footage[video_id] = Footage(take, mine.randint(1, 5), mine.random() < 0.3)
            extract(store, listed, footage, mine, retry_failed=True, tell=len)

    def read() -> None:
        known: set[str] = set()
        changes, before = 0, None
        while not (tmp_path / "enough").exists():
            now = whole_videos(store.path)
            assert now.keys() >= known
            known, changes, before = set(now), changes + (now != before), now
        assert known and changes > 1

    reader = forked(read)
    for _ in range(9):
        writer = forked(write)
        time.sleep(rng.uniform(0.1, 0.6))
        os.kill(writer, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
        whole_videos(store.path)
    (tmp_path / "enough").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0
    with store.writing(SPEC):  # the lock went with the writer
        assert list(store.staging.iterdir()) == []


def test_other_policies_do_not_mix(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        pass
    with pytest.raises(UserError, match="policy is uniform there and middle here"):
        store.refuse_other(replace(SPEC, policy="middle"))
