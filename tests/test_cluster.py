import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raypipe.cluster import ANSWER_TIMEOUT_S, Cluster, claim_for, connect
from raypipe.config import ResourcesConfig
from raypipe.errors import RunFailed, UserError

ROOT = Path(__file__).parents[1]

# --- connect ----------------------------------------------------------------------------------------


def test_a_private_cluster_starts_says_where_its_dashboard_is_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    caplog.set_level(logging.INFO, "raypipe")
    with connect() as here:
        assert ray.is_initialized()
        assert here.cpus >= 1 and here.gpus >= here.most_gpus_on_a_node >= 0
        host, port = here.dashboard.split(":")
        socket.create_connection((host, int(port)), timeout=10).close()
        assert f"http://{here.dashboard}" in caplog.text and "ray get-auth-token" in caplog.text
    assert not ray.is_initialized()
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=10).close()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nothing_answers(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = form.format(free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    started_s = time.monotonic()
    with pytest.raises(RunFailed, match=f"RAY_ADDRESS {address}: no Ray cluster answers there"), connect():
        pass
    assert time.monotonic() - started_s < ANSWER_TIMEOUT_S + 5


@pytest.mark.parametrize("address", ["somewhere", "host:", ":6379", "host:port"])
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunFailed, match=f"RAY_ADDRESS {address}: must be host:port"), connect():
        pass


# --- cluster.yaml -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """cluster.yaml over Ray's defaults for its provider, as `ray up` reads it. Contacts nobody."""
    prepared: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    return prepared


def node_types(config: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head's type, and the workers'."""
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    return head, list(types.values())


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(config)


def test_the_head_does_no_work(config: dict[str, Any]) -> None:
    head, _ = node_types(config)
    assert head["resources"] == {"CPU": 0, "GPU": 0} and head["max_workers"] == 0
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in start and "--dashboard-host=127.0.0.1" in start


def test_workers_come_only_when_there_is_work(config: dict[str, Any]) -> None:
    _, workers = node_types(config)
    assert all(worker["min_workers"] == 0 < worker["max_workers"] for worker in workers)
    assert config["max_workers"] >= sum(worker["max_workers"] for worker in workers)


def test_there_are_nodes_for_extraction_and_nodes_for_trials(config: dict[str, Any]) -> None:
    _, workers = node_types(config)
    (cpu,) = [worker for worker in workers if not worker["resources"].get("GPU")]
    (gpu,) = [worker for worker in workers if worker["resources"].get("GPU")]
    assert cpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["resources"]["GPU"] >= 2


def test_what_is_copied_to_the_nodes_exists(config: dict[str, Any]) -> None:
    for source in config["file_mounts"].values():
        assert source.startswith("~") or (ROOT / source).exists(), source


# --- what a trial claims --------------------------------------------------------------------------


def cluster(cpus: int = 8, gpus: int = 0, most: int = 0) -> Cluster:
    return Cluster(cpus=cpus, gpus=gpus, most_gpus_on_a_node=most, dashboard="")


@pytest.mark.parametrize(
    ("offered", "asked", "resources", "replicas"),
    [
        (cluster(), ResourcesConfig(), {"cpu": 1}, 2),
        (cluster(gpus=4, most=4), ResourcesConfig(), {"cpu": 1, "gpu": 2}, 2),
        (cluster(gpus=8, most=1), ResourcesConfig(gpus_per_trial=1), {"cpu": 1, "gpu": 1}, 1),
    ],
)
def test_a_trial_claims_two_gpus_or_as_many_cpu_devices(offered, asked, resources, replicas):
    claim = claim_for(offered, asked)
    assert (claim.resources, claim.replicas) == (resources, replicas)


@pytest.mark.parametrize(
    ("offered", "asked", "sentence"),
    [
        (cluster(gpus=2, most=1), ResourcesConfig(), "--gpus-per-trial 2: no node has so many GPUs"),
        (cluster(cpus=2), ResourcesConfig(cpus_per_trial=3), "--cpus-per-trial 3: the cluster has 2"),
    ],
)
def test_a_claim_that_no_node_could_meet_is_refused(offered, asked, sentence):
    with pytest.raises(UserError, match=sentence):
        claim_for(offered, asked)
