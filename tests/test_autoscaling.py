"""The commands on a cluster that begins with a head alone. Scaling is real, GPUs are only believed in.

One cluster for all: token authentication is on, its dashboard runs, a real Prometheus scrapes it.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import pytest
import yaml
from autoscaling import TOKEN, autoscaling_cluster, token_environment
from features import make_store
from runs import FLAGS, ids, write_videos
from s3 import ACCESS_KEY, SECRET_KEY, Bucket, free_port

from raypipe.storage import RemotePath
from raypipe.store import FeatureStore

ROOT = Path(__file__).parents[1]
TYPES = {"extraction": ({"CPU": 1}, 2), "trials": ({"CPU": 1, "GPU": 2}, 1)}
TUNE = ["--num-samples", "2", "--epochs", "3", "--width", "8", "--model", "mean_pool"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Nodes with CPUs, and of these those with two GPUs, twice a second.
WATCH = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while True:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counts = [sum("CPU" in node for node in nodes), sum(node.get("GPU") == 2 for node in nodes)]
    print(json.dumps(counts), flush=True)
    time.sleep(0.5)
"""


@dataclass
class Grown:
    """The cluster, as a person on its head has it before them."""

    folder: Path
    address: str
    dashboard: str
    environment: dict[str, str]
    seen: list[tuple[int, int]] = field(default_factory=list)
    """Nodes with CPUs, and of these those with two GPUs, as time goes on."""

    def run(self, *command: str) -> tuple[int, str]:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    folder = tmp_path_factory.mktemp("grown")
    port = free_port()
    bucket = Bucket()  # sets the credentials that the nodes inherit
    assert bucket
    # Long enough that Prometheus, which hears of nodes every few seconds, sees each before it goes.
    with autoscaling_cluster(folder / "home", TYPES, idle_s=15.0, dashboard_port=port) as address:
        environment = token_environment(folder / "home") | {
            "RAY_ADDRESS": address, "RAYPIPE_FAKE_GPUS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        here = Grown(folder, address, f"http://127.0.0.1:{port}", environment)
        watch = subprocess.Popen(
            [sys.executable, "-c", WATCH, address], env=environment, stdout=subprocess.PIPE, text=True
        )

        def read() -> None:
            assert watch.stdout
            here.seen.extend(tuple(json.loads(line)) for line in watch.stdout)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        while not here.seen:
            time.sleep(0.1)
        yield here
        watch.kill()
        reader.join()
        assert watch.stdout
        watch.stdout.close()
        watch.wait()


def wait_until_none_is_left(grown: Grown) -> float:
    """Seconds until all nodes but the head have gone, while the cluster runs."""
    started_s = time.monotonic()
    while grown.seen[-1] != (0, 0):
        assert time.monotonic() < started_s + 180, grown.seen[-20:]
        time.sleep(0.2)
    return time.monotonic() - started_s


def test_nodes_come_for_the_work_and_go(grown: Grown) -> None:
    """Those with CPUs alone for an extraction on CPUs, those with GPUs alone for trials."""
    videos = write_videos(grown.folder / "videos", 60)
    make_store(grown.folder / "features")
    python = [sys.executable, "-m"]
    assert grown.seen[-1] == (0, 0)
    status, said = grown.run(*python, "raypipe.tune", "--features", "features", "--gpus-per-trial", "4")
    assert status == 2 and "no node has so many GPUs or could have, the most is 2" in said, said
    assert set(grown.seen) == {(0, 0)}, "what no node could place is refused before any comes"

    extract = ["--input", str(videos), "--output", "made", "--device", "cpu", "--shard-rows", "2", *FLAGS]
    started_s = time.monotonic()
    status, said = grown.run(*python, "raypipe.extract", *extract)
    print(f"extraction from nothing: {time.monotonic() - started_s:.0f} s\n{said}")
    assert status == 0, said
    assert "0 of 2 CPU cores are there; the others come when the autoscaler starts them" in said
    rows = FeatureStore(grown.folder / "made").read(["video_id"])["video_id"].to_pylist()
    assert Counter(rows) == Counter(ids(60))
    print(f"all nodes had gone {wait_until_none_is_left(grown):.0f} s after the extraction")
    came = set(grown.seen)
    assert max(nodes for nodes, _ in came) == 2 and max(with_gpus for _, with_gpus in came) == 0

    before = len(grown.seen)
    status, said = grown.run(*python, "raypipe.tune", "--features", "features", *TUNE)
    print(said)
    assert status == 0 and "2 GPUs a trial" in said, said
    print(f"all nodes had gone {wait_until_none_is_left(grown):.0f} s after the search")
    assert set(grown.seen[before:]) == {(0, 0), (1, 1)}


def test_commands_are_submitted_as_jobs_and_leave_no_secret(grown: Grown) -> None:
    """From a bucket to a bucket; the project travels as the job's working directory."""
    videos = write_videos(grown.folder / "more", 6)
    bucket = Bucket().put({f"videos/{name}": (videos / name).read_bytes() for name in ids(6)})
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", "--address", grown.dashboard]
    unsigned = grown.environment | {"RAY_AUTH_TOKEN": "0" * 32}
    refused = subprocess.run(
        [*submit, "--", "true"], env=unsigned, cwd=grown.folder, capture_output=True, text=True
    )
    assert refused.returncode != 0, "another token is refused"

    extract = ["--input", bucket.uri("videos"), "--output", bucket.uri("features"), *FLAGS]
    status, said = grown.run(
        *submit, "--working-dir", str(ROOT), "--runtime-env-json", '{"excludes": ["results", ".git"]}',
        "--", sys.executable, "-m", "raypipe.extract", *extract,
    )  # fmt: skip
    assert status == 0, said
    assert "6 videos: 6 ok, 0 partial, 0 failed" in said
    assert FeatureStore(bucket.uri("features")).read(["video_id"]).num_rows == 6

    make_store(RemotePath(bucket.uri("labelled")))
    status, tuned = grown.run(
        *submit, "--working-dir", str(ROOT), "--runtime-env-json", '{"excludes": ["results", ".git"]}', "--",
        sys.executable, "-m", "raypipe.tune", "--name", "job", "--features", bucket.uri("labelled"),
        "--results", bucket.uri("results"), *TUNE,
    )  # fmt: skip
    assert status == 0, tuned
    page = bucket.get("results/job/report.html").decode()
    assert "results/job/best/model.keras" in bucket.names()
    logs = [
        file for file in (grown.folder / "home" / "ray").rglob("*") if file.suffix in (".log", ".out", ".err")
    ]
    kept = said + tuned + page + "".join(file.read_text(errors="replace") for file in logs if file.is_file())
    for secret in (SECRET_KEY, ACCESS_KEY, TOKEN):
        assert secret not in kept
    print(said, tuned)


def ask(url: str, **query: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{url}?{urlencode(query)}") as answer:
        found: dict[str, object] = json.load(answer)["data"]
    return found


def expressions() -> list[str]:
    """Every query of the Grafana dashboard."""
    board = json.loads((ROOT / "configs/monitoring/grafana-dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")
def test_prometheus_sees_a_run(grown: Grown) -> None:
    config = yaml.safe_load((ROOT / "configs/monitoring/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    nodes = grown.folder / "home" / "ray" / "prom_metrics_service_discovery.json"
    job["file_sd_configs"][0]["files"] = [str(nodes)]
    job["file_sd_configs"][0]["refresh_interval"] = config["global"]["scrape_interval"] = "1s"
    file = grown.folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    prometheus = subprocess.Popen(
        ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={grown.folder}/tsdb",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    api = f"http://127.0.0.1:{port}/api/v1"
    try:
        videos = write_videos(grown.folder / "watched", 30)
        (videos / "a" / "broken.mp4").write_text("no video")
        python = [sys.executable, "-m"]
        status, said = grown.run(
            *python, "raypipe.extract", "--input", str(videos), "--output", "seen", *FLAGS
        )
        assert status == 0, said
        status, said = grown.run(*python, "raypipe.tune", "--features", "features", "--name", "seen", *TUNE)
        assert status == 0, said
        names = [name for name in ask(f"{api}/label/__name__/values") if "raypipe" in str(name)]  # type: ignore[union-attr]
        print(names)
        figures = {}
        for expression in expressions():
            wide = expression.replace("[1m]", "[10m]").replace("rate(", "increase(")
            found = ask(f"{api}/query", query=f"max_over_time(({wide})[10m:1s])")["result"]
            figures[expression] = [(r["metric"], r["value"][1]) for r in found]  # type: ignore[index,union-attr]
            print(expression, figures[expression])
        silent = [e for e, found in figures.items() if not found and "gpu" not in e and "SPILLED" not in e]
        assert not silent, "every query of the dashboard has an answer, but for what this machine lacks"
    finally:
        prometheus.kill()
        prometheus.wait()
