"""A search that is disturbed ends as one that is not: the same trials, scores and best.

Real Ray, real TensorFlow, real signals. GPUs are those that Ray only believes in, as in test_tune.py.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from disks import mount, small_disk
from features import make_store
from ray._common.utils import get_system_memory
from s3 import ACCESS_KEY, SECRET_KEY, Bucket, proxy

from raypipe.config import TrialConfig, TuneConfig
from raypipe.dataset import load_dataset, split_dataset
from raypipe.space import Range
from raypipe.storage import Place, RemotePath

T = TypeVar("T")

# Several searches, on machines that may be busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEARCH = """
import sys, ray
from raypipe.config import TuneConfig
from raypipe.console import run_command
from raypipe.tune import main
ray.init(num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False, address="local")
run_command(lambda: main(TuneConfig.model_validate_json(sys.argv[1])))
"""
CONFIG = TuneConfig(
    features="features",
    num_samples=8,
    scheduler="median",
    grace_epochs=3,
    trial=TrialConfig(model="mean_pool", width=8, epochs=9, patience=9),
    space={"dropout": Range(low=0, high=0.5), "learning_rate": Range(low=1e-3, high=1e-1, log=True)},
)
RESUME = TuneConfig(resume="results/tune")


@contextlib.contextmanager
def searching(
    folder: Path, config: TuneConfig = CONFIG, *, code: str = SEARCH, **env: str
) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", code, config.model_dump_json()],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAYPIPE_FAKE_GPUS": "1"} | env,
    ) as run:
        yield run


def finish(folder: Path, config: TuneConfig = CONFIG, **how: str) -> str:
    with searching(folder, config, **how) as run:
        _, said = run.communicate()
    assert run.returncode == 0, said[-3000:]
    return said


TIMES = {"wall_s", "startup_s"}


def test_the_test_side_decides_nothing(tmp_path: Path) -> None:
    """Two searches whose data differ on the test side alone, in labels and in features."""
    config = CONFIG.model_copy(update={"num_samples": 3})
    before, after = tmp_path / "before", tmp_path / "after"
    store = make_store(before / "features", signal=0.25)
    dataset = load_dataset(store)
    splits = split_dataset(dataset, config.splits, seed=config.seed, store=store)
    others = {dataset.clips.video_ids[row] for row in splits.test}
    make_store(after / "features", signal=0.25, turned=others)
    shutil.copytree(before / "features" / "splits", after / "features" / "splits")
    for folder in (before, after):
        finish(folder, config)
    assert board_of(after) == board_of(before)
    (one, other), best = (metrics_of(folder) for folder in (before, after)), "results/tune/best"
    assert one.pop("test") != other.pop("test"), "it was read, at the end"
    assert one["yardstick"].pop("test") != other["yardstick"].pop("test")
    assert one == other
    choices = [json.loads((folder / best / "model.json").read_text()) for folder in (before, after)]
    assert all(choices[0][name] == choices[1][name] for name in ("trial", "temperature", "threshold"))


def board_of(folder: Place) -> list[dict[str, str]]:
    text = (folder / "results" / "tune" / "leaderboard.csv").read_text()
    return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(text.splitlines())]


def metrics_of(folder: Place) -> object:
    return json.loads((folder / "results" / "tune" / "best" / "metrics.json").read_text())


def wait_for(run: "subprocess.Popen[str]", there: Callable[[], T]) -> T:
    """What is there, as soon as that is true."""
    while not (found := there()):
        assert run.poll() is None, run.communicate()[1][-3000:]
        time.sleep(0.01)
    return found


def states(folder: Path, trial: str) -> list[Path]:
    return list(folder.glob(f"results/tune/trials/trial-{trial}/state/epoch-*.npz"))


def trainers(folder: Path) -> set[int]:
    """The processes that write a trial's curves, in this folder."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            writes = any(os.readlink(file).startswith(f"{folder}/") for file in process.glob("fd/*"))
            if writes and "ray::" in (process / "cmdline").read_text(errors="replace"):
                found.add(int(process.name))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    make_store(folder / "features", signal=0.25)
    finish(folder)
    rows = board_of(folder)
    assert len(rows) == 8 and {row["status"] for row in rows} == {"done", "pruned"}
    return folder


def copy_store(folder: Path) -> Path:
    make_store(folder / "features", signal=0.25)
    return folder


def test_processes_that_stall_and_one_that_is_killed(undisturbed: Path, tmp_path: Path) -> None:
    with searching(copy_store(tmp_path)) as run:
        wait_for(run, lambda: len(states(tmp_path, "2")) >= 2)
        for pid in wait_for(run, lambda: trainers(tmp_path / "results")):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1)  # the other goes ahead
            os.kill(pid, signal.SIGCONT)
        wait_for(run, lambda: len(states(tmp_path, "3")) >= 2)
        for pid in wait_for(run, lambda: trainers(tmp_path / "results")):
            os.kill(pid, signal.SIGKILL)
        _, said = run.communicate()
    assert run.returncode == 0, said[-3000:]
    assert "goes on from its last epoch: its process or node was killed" in said
    assert board_of(tmp_path) == board_of(undisturbed)
    assert metrics_of(tmp_path) == metrics_of(undisturbed)


def test_a_killed_driver_is_resumed_to_the_same_end(undisturbed: Path, tmp_path: Path) -> None:
    with searching(copy_store(tmp_path)) as run:
        wait_for(run, lambda: len(states(tmp_path, "3")) >= 2)
        run.kill()
        run.communicate()
    ended = {file.parent.name for file in tmp_path.glob("results/tune/trials/*/trial.json")}
    assert 1 <= len(ended) < 8
    time.sleep(3)  # what was left of its cluster ends, too
    finish(tmp_path, RESUME)
    assert board_of(tmp_path) == board_of(undisturbed)
    assert metrics_of(tmp_path) == metrics_of(undisturbed)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk where the results go."""
    with small_disk(tmp_path / "results", "400k") as path:
        yield path


def test_a_full_disk_is_a_clear_stop(undisturbed: Path, tmp_path: Path, disk: Path) -> None:
    with searching(copy_store(tmp_path)) as run:
        _, said = run.communicate()
    assert run.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last == (
        f"error: {disk}/tune: No space left on device; make room there, then go on: "
        "python -m raypipe.tune --resume results/tune"
    )
    assert "Traceback" not in said
    assert not mount("-o", "remount,size=50m", str(disk))
    finish(tmp_path, RESUME)
    assert board_of(tmp_path) == board_of(undisturbed)


def test_a_trial_that_needs_too_much_memory_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    make_store(tmp_path / "features")
    space = {"batch_size": [8, 1 << 46]}
    said = finish(tmp_path, CONFIG.model_copy(update={"search": "grid", "space": space, "num_samples": 2}))
    done, failed = board_of(tmp_path)
    assert (done["status"], failed["status"], failed["reason"]) == ("done", "failed", "out_of_memory")
    assert "trial 2 failed (out_of_memory): MemoryError" in said
    assert (tmp_path / "results/tune/trials/trial-2/error.txt").read_text().startswith("Traceback")


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    make_store(tmp_path / "features")
    # Deep, in float16: with steps of 1 the activations overflow within a few epochs.
    trial = TrialConfig(model="mean_pool", width=64, depth=6, epochs=6, precision="mixed_float16")
    space = {"learning_rate": [1e-3, 1.0]}
    said = finish(
        tmp_path,
        CONFIG.model_copy(update={"search": "grid", "space": space, "num_samples": 2, "trial": trial}),
    )
    done, failed = board_of(tmp_path)
    assert (done["status"], done["trial"]) == ("done", "1")
    assert (failed["status"], failed["reason"]) == ("failed", "diverged")
    assert "trial 2 failed (diverged): fold " in said and "a lower learning_rate" in said
    assert "Traceback" not in said


def test_trials_that_failed_are_trained_once_more_where_asked(tmp_path: Path) -> None:
    make_store(tmp_path / "features")
    config = CONFIG.model_copy(update={"num_samples": 3, "max_concurrent": 1})
    trials = tmp_path / "results" / "tune" / "trials"
    with searching(tmp_path, config) as run:
        wait_for(run, lambda: states(tmp_path, "1"))
        trials.joinpath("trial-2").mkdir()
        trials.joinpath("trial-2", "checkpoints").touch()  # where models should go
        _, said = run.communicate()
    assert run.returncode == 0 and "trial 2 failed (error): FileExistsError" in said, said[-3000:]
    before = {row["trial"]: row for row in board_of(tmp_path)}
    assert [before[number]["status"] == "failed" for number in "123"] == [False, True, False]

    trials.joinpath("trial-2", "checkpoints").unlink()
    said = finish(tmp_path, RESUME.model_copy(update={"retry_failed": True}))
    assert "trained once more, as they failed: trials 2" in said
    after = {row["trial"]: row for row in board_of(tmp_path)}
    assert after["2"]["status"] in ("done", "pruned") and after["2"]["score"]
    assert after["2"]["learning_rate"] == before["2"]["learning_rate"], "with the settings it had"
    assert (after["1"], after["3"]) == (before["1"], before["3"])
    page = (tmp_path / "results" / "tune" / "report.html").read_text()
    assert "failed at first and were trained once more (--retry-failed): 2." in page


ON_CLUSTER = SEARCH.replace("ray.init", "dict")  # `tune` itself joins the cluster at RAY_ADDRESS


def test_a_node_that_is_killed(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAYPIPE_FAKE_GPUS", "1")  # the nodes' workers have their environment
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1, num_gpus=2) for _ in range(2)]
        address = {"RAY_ADDRESS": cluster.address}
        with searching(copy_store(tmp_path), code=ON_CLUSTER, **address) as run:
            wait_for(run, lambda: len(states(tmp_path, "2")) >= 2)
            os.kill(nodes[1].all_processes["raylet"][0].process.pid, signal.SIGKILL)
            _, said = run.communicate()
        assert run.returncode == 0, said[-3000:]
    finally:
        cluster.shutdown()
    assert board_of(tmp_path) == board_of(undisturbed)


def test_a_run_in_a_bucket_goes_on_from_another_machine(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes and two drivers that share no folder, and a bucket that fails every seventh request. A trial
    is killed, then the driver; under the next one the bucket goes away. The third finishes as if nothing had
    happened."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAYPIPE_FAKE_GPUS", "1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")  # that it is away is known sooner
    bucket = Bucket()
    make_store(RemotePath(bucket.uri("features")), signal=0.25)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / f"{name}-tmp").mkdir()
            cluster.add_node(num_cpus=1, num_gpus=2, env_vars={"TMPDIR": str(tmp_path / f"{name}-tmp")})
        how = {"code": ON_CLUSTER, "RAY_ADDRESS": cluster.address}
        with proxy() as traffic:
            numbers = iter(range(1_000_000))
            traffic.fault = seldom = lambda method, path: "500" if next(numbers) % 7 == 3 else None
            through = traffic.bucket(bucket)
            config = CONFIG.model_copy(
                update={"features": through.uri("features"), "results": through.uri("results")}
            )

            def epochs(trial: str) -> int:
                return sum(f"/trial-{trial}/state/epoch-" in name for name in bucket.names())

            with searching(tmp_path / "one", config, **how) as run:
                wait_for(run, lambda: epochs("2") >= 2)
                assert trainers(tmp_path / "one-tmp") and trainers(tmp_path / "two-tmp")
                for pid in trainers(tmp_path / "two-tmp"):
                    os.kill(pid, signal.SIGKILL)
                wait_for(run, lambda: epochs("4") >= 2)
                run.kill()
                run.communicate()
            ended = [name for name in bucket.names() if name.endswith("/trial.json")]
            assert 1 <= len(ended) < 8
            resume = TuneConfig(resume=through.uri("results/tune"))
            with searching(tmp_path / "two", resume, **how) as run:
                wait_for(run, lambda: epochs("6") >= 2)
                traffic.fault = lambda method, path: "500"
                _, said = run.communicate()
            assert run.returncode == 1 and "Traceback" not in said
            last = said.strip().splitlines()[-1]
            assert last.startswith(f"error: {through.uri('results/tune')}: the storage fails: ")
            assert last.endswith(f"go on: python -m raypipe.tune --resume '{through.uri('results/tune')}'")
            traffic.fault = seldom
            said += finish(tmp_path / "two", resume, **how)
            assert traffic.faults > 20
    finally:
        cluster.shutdown()
    place = RemotePath(bucket.uri("results")).parent
    assert board_of(place) == board_of(undisturbed)
    assert metrics_of(place) == metrics_of(undisturbed)
    names = {name.removeprefix("results/tune/") for name in bucket.names()}
    assert {"report.html", "best/model.keras", "best/model.json", "trials/trial-1/history.csv"} <= names
    assert not [file for name in ("one", "two") for file in (tmp_path / name).iterdir()], (
        "nothing is left here"
    )
    kept = said.encode() + b"".join(bucket.get(name) for name in bucket.names())
    assert SECRET_KEY.encode() not in kept and ACCESS_KEY.encode() not in kept


# --- a population (scheduler pbt) -----------------------------------------------------------------------

POPULATION = CONFIG.model_copy(
    update={
        "scheduler": "pbt",
        "num_samples": 5,
        "grace_epochs": 3,
        "perturb_epochs": 3,
        "trial": TrialConfig(model="mean_pool", width=8, epochs=9),
    }
)
CHAIN = """
import json, sys
from pathlib import Path
import numpy as np
from raypipe.config import SplitConfig
from raypipe.dataset import load_dataset, split_dataset
from raypipe.leaderboard import read_trial
from raypipe.store import FeatureStore
from raypipe.training import Part, train_trial
from raypipe.trial import out_of_fold
store = FeatureStore(Path("features"))
dataset = load_dataset(store)
splits = split_dataset(dataset, SplitConfig(), seed=0, store=store)
course = read_trial(Path(sys.argv[1]) / "trial.json").course
epochs = train_trial(dataset.clips, splits, course.config, gpus=0, replicas=2, seed=0, folder=Path("chain"),
    on_epoch=lambda _: None, part=Part(until=course.config.epochs, earlier=course.earlier))
np.save("chain.npy", out_of_fold(epochs, splits))
"""


def test_a_population_that_is_disturbed_comes_to_the_same_end(tmp_path: Path) -> None:
    """The disturbed one is kept in a bucket."""
    calm, wild = copy_store(tmp_path / "calm"), copy_store(tmp_path / "wild")
    finish(calm, POPULATION)
    rows = board_of(calm)
    assert len(rows) == 5 and {row["status"] for row in rows} == {"done"}
    assert {row["epochs_run"] for row in rows} == {"9"}
    heirs = [row for row in rows if row["lineage"]]
    assert heirs and all(" until epoch " in row["lineage"] for row in heirs)

    # A trial's weights are what its chain of settings gives, whoever trained the parts of it.
    last = max(heirs, key=lambda row: row["lineage"].count("; then"))
    trial = calm / "results" / "tune" / "trials" / f"trial-{last['trial']}"
    subprocess.run([sys.executable, "-c", CHAIN, trial], cwd=calm, check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(calm / "chain.npy"), np.load(trial / "out_of_fold.npy"))

    bucket = Bucket()
    place = RemotePath(bucket.uri("results"))
    population = POPULATION.model_copy(update={"results": str(place)})
    (wild / "tmp").mkdir()
    own = {"TMPDIR": str(wild / "tmp"), "RAY_TMPDIR": "/tmp"}

    def begun(trial: str, number: int, epoch: int) -> bool:
        part = f"results/tune/trials/trial-{trial}/round-{number:02}"
        return f"{part}/state/epoch-{epoch:04}.npz" in bucket.names()

    with searching(wild, population, **own) as run:
        wait_for(run, lambda: begun("2", 1, 2))
        for pid in wait_for(run, lambda: trainers(wild / "tmp")):
            os.kill(pid, signal.SIGKILL)
        wait_for(run, lambda: begun("3", 2, 4))
        run.kill()
        run.communicate()
    time.sleep(3)  # what was left of its cluster ends, too
    finish(wild, TuneConfig(resume=str(place / "tune")), **own)
    assert board_of(place.parent) == rows
    assert metrics_of(place.parent) == metrics_of(calm)
    page = (place / "tune" / "report.html").read_text()
    assert "Who took over from whom" in page and "flatters more" in page


def test_a_trial_that_fills_the_nodes_memory_is_ended_by_ray_and_the_others_go_on(tmp_path: Path) -> None:
    """The weights of the second trial, with the optimizer's state, in each replica and for each fold, are
    some 20 GB; Ray's memory monitor gives away 4 GB."""
    make_store(tmp_path / "features")
    config = CONFIG.model_copy(
        update={
            "search": "grid",
            "num_samples": 3,
            "max_concurrent": 1,
            "scheduler": "none",
            "space": {"width": [8, 4096, 16]},
            "trial": TrialConfig(model="mean_pool", depth=16, epochs=2, batch_size=8),
        }
    )
    lines = Path("/proc/meminfo").read_text().splitlines()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    if kb["MemAvailable"] < 7 << 20:
        pytest.skip(f"needs 7 GB of free memory, {kb['MemAvailable'] >> 20} GB are")
    if get_system_memory() < kb["MemTotal"] << 10:
        pytest.skip("needs a machine without a control group that limits memory, by which Ray would go")
    threshold = 1 - (kb["MemAvailable"] - (4 << 20)) / kb["MemTotal"]
    once = f"from raypipe import steering\nsteering.RETRIES = 1\n{SEARCH}"  # each takes a minute
    with searching(tmp_path, config, code=once, RAY_memory_usage_threshold=f"{threshold:.4f}") as run:
        _, said = run.communicate()
    assert run.returncode == 0, said[-3000:]
    rows = {row["trial"]: row for row in board_of(tmp_path)}
    assert [rows[number]["status"] for number in "123"] == ["done", "failed", "done"]
    assert rows["2"]["reason"] == "out_of_memory" and "memory monitor" in rows["2"]["message"]
    assert said.count("trial 2 goes on from its last epoch: its process was ended by Ray's memory mon") == 1
