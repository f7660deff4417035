"""Several nodes, of which some are lost in the midst of an extraction or a search: see nodes.py."""

import csv
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from features import make_store
from nodes import Command, Node, Nodes, started_nodes
from runs import FLAGS, ids, write_videos

from raypipe.config import TrialConfig, TuneConfig
from raypipe.reading import write_yaml
from raypipe.space import Range
from raypipe.store import FeatureStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with started_nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


# --- extraction ---------------------------------------------------------------------------------------

VIDEOS = 120
FAULTS = {"killed": Node.kill, "paused": Node.pause, "cut off": Node.cut, "full": Node.fill}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("videos"), VIDEOS)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_lost_node_costs_no_video(fault: str, nodes: Nodes, videos: Path) -> None:
    """Of two nodes that work one is lost, or its disk fills up, after the first videos are stored."""
    workers = nodes.workers(2)
    store = FeatureStore(nodes.folder / fault.replace(" ", "-"))
    flags = ["--input", str(videos), "--output", str(store.path), "--shard-rows", "2", *FLAGS]
    started_s = time.monotonic()
    run = nodes.start("raypipe.extract", *flags)
    run.wait_until(store.shards)
    lost = run.wait_until(lambda: at_work(workers))[0]
    lost_s = time.monotonic()
    FAULTS[fault](lost)
    before = store.read(["video_id"]).num_rows
    status, said = run.finish()
    took_s = time.monotonic() - lost_s
    print(said)
    assert before < VIDEOS
    print(f"{fault}: {before} of {VIDEOS} done in {lost_s - started_s:.0f} s, the rest in {took_s:.0f} s")
    assert status == 0, said
    rows = store.read(["video_id", "outcome"])
    assert Counter(rows["video_id"].to_pylist()) == Counter(ids(VIDEOS))
    assert set(rows["outcome"].to_pylist()) == {"ok"}
    if not lost.lost:
        lost.empty()


def at_work(workers: list[Node]) -> list[Node]:
    return [node for node in workers if node.does("ExtractClips)).submit")]


# --- a search -----------------------------------------------------------------------------------------

SEARCH = TuneConfig(
    features="features",
    num_samples=6,
    max_concurrent=2,  # a search's decisions depend on it, and tests before may leave a node more
    scheduler="median",
    grace_epochs=3,
    trial=TrialConfig(model="mean_pool", width=8, epochs=9, patience=9),
    space={"dropout": Range(low=0, high=0.5), "learning_rate": Range(low=1e-3, high=1e-1, log=True)},
)


def begin_search(nodes: Nodes, name: str) -> Command:
    write_yaml(SEARCH, nodes.folder / "search.yaml")
    return nodes.start("raypipe.tune", "--config", "search.yaml", "--name", name)


def outcome(run: Path) -> tuple[list[dict[str, str]], object]:
    """The trials without their times, and the best one's scores."""
    with open(run / "leaderboard.csv") as file:
        rows = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in csv.DictReader(file)]
    return rows, json.loads((run / "best" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes) -> tuple[list[dict[str, str]], object]:
    make_store(nodes.folder / "features", signal=0.25)
    nodes.workers(2)
    started_s = time.monotonic()
    status, said = begin_search(nodes, "undisturbed").finish()
    print(said)
    print(f"undisturbed: {time.monotonic() - started_s:.0f} s")
    assert status == 0, said
    found = outcome(nodes.folder / "results" / "undisturbed")
    assert len(found[0]) == SEARCH.num_samples and {row["status"] for row in found[0]} <= {"done", "pruned"}
    return found


def epochs(run: Path, trial: int) -> int:
    return len(list(run.glob(f"trials/trial-{trial}/state/epoch-*.npz")))


def disturb(nodes: Nodes, name: str, fault: Callable[[Node], None]) -> tuple[Command, Node, float]:
    """A search whose first trial has ended, and one of its nodes, which this has just happened to."""
    workers = nodes.workers(2)
    run = nodes.folder / "results" / name
    command = begin_search(nodes, name)
    command.wait_until(lambda: epochs(run, 3) > 1 or epochs(run, 4) > 1)
    # Between two trials a node has no file of the run open.
    lost = command.wait_until(lambda: [node for node in workers if node.writes_in(run)])[0]
    fault(lost)
    return command, lost, time.monotonic()


def check_same(nodes: Nodes, name: str, command: Command, undisturbed: object, since_s: float) -> str:
    status, said = command.finish()
    print(said)
    print(f"{name}: ended {time.monotonic() - since_s:.0f} s after the fault")
    assert status == 0, said
    assert outcome(nodes.folder / "results" / name) == undisturbed
    return said


GOES_ON = "goes on from its last epoch: its process or node was killed"


def test_a_search_whose_node_is_paused_and_wakes_up(nodes: Nodes, undisturbed: object) -> None:
    """When it wakes up another has its trial: what it still does changes nothing."""
    command, lost, lost_s = disturb(nodes, "paused", Node.pause)
    command.wait_until(lambda: GOES_ON in command.said())
    print(f"given up after {time.monotonic() - lost_s:.0f} s")
    lost.wake()
    check_same(nodes, "paused", command, undisturbed, lost_s)


def test_a_search_whose_node_is_cut_off(nodes: Nodes, undisturbed: object) -> None:
    """And one that trains the best trial once more, which is paused."""
    command, _, lost_s = disturb(nodes, "cut-off", Node.cut)
    nodes.add()
    workers = nodes.alive()
    command.wait_until(lambda: GOES_ON in command.said())
    print(f"given up after {time.monotonic() - lost_s:.0f} s")
    command.wait_until(lambda: "training it on all" in command.said())
    command.wait_until(lambda: [node for node in workers if node.does("BestTrainer")])[0].pause()
    paused_s = time.monotonic()
    check_same(nodes, "cut-off", command, undisturbed, lost_s)
    print(f"after the pause {time.monotonic() - paused_s:.0f} s")


def test_a_search_whose_nodes_disk_fills_up(nodes: Nodes, undisturbed: object) -> None:
    """The disk with Ray's session and temporary files: whichever process meets it first says so, and the
    search goes on when there is room."""
    command, full, full_s = disturb(nodes, "fills", Node.fill)
    status, said = command.finish()
    print(said)
    print(f"stopped, or ended, {time.monotonic() - full_s:.0f} s after the disk was full")
    assert "Traceback" not in said
    if status == 1:
        words = (
            r"error: trial \d+ on node \S+: .*No space left on device.*; when there is room on that node, .*"
        )
        assert re.fullmatch(words, said.strip().splitlines()[-1]), said
    full.empty()
    if status == 1:
        command = nodes.start("raypipe.tune", "--resume", "results/fills")
    check_same(nodes, "fills", command, undisturbed, time.monotonic())
