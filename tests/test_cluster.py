import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.util.state import list_actors

from raypipe.cluster import (
    Cluster,
    NodeType,
    claim_for,
    connect,
    keep_credentials_home,
    name_process,
    outlive_memory_monitor,
    workers_for,
)
from raypipe.config import ResourcesConfig
from raypipe.errors import RunFailed, UserError


@ray.remote(num_cpus=0)
class Trainer:
    """Trains one trial after another, as kept processes do."""

    def __repr__(self) -> str:
        return "trials"

    def train(self) -> tuple[int, str]:
        name_process("trial-3")
        return os.getpid(), Path("/proc/self/cmdline").read_text().strip("\0")


# --- connect ----------------------------------------------------------------------------------------


def test_a_private_cluster_starts_says_where_its_dashboard_is_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    caplog.set_level(logging.INFO, "raypipe")
    with connect() as here:
        assert ray.is_initialized()
        assert here.cpus >= 1 and here.gpus >= 0
        host, port = here.dashboard.split(":")
        socket.create_connection((host, int(port)), timeout=10).close()
        assert f"http://{here.dashboard}" in caplog.text and "ray get-auth-token" in caplog.text
        actor = Trainer.remote()
        pid, title = ray.get(actor.train.remote())
        assert title == "ray::trial-3", "found among the processes"
        own = f"http://{here.dashboard}"  # there may be other clusters on the machine
        (told,) = list_actors(own, filters=[("pid", "=", pid)], detail=True)
        assert (told.repr_name, told.state) == ("trials", "ALIVE"), "the actor is called the same for good"
    assert not ray.is_initialized()
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=10).close()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def test_an_address_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunFailed, match=f"RAY_ADDRESS {address}: no Ray cluster answers there"), connect():
        pass


@pytest.mark.parametrize("address", ["somewhere", "host:", ":6379", "host:port"])
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS {address}: must be host:port"), connect():
        pass


def test_ray_client_is_refused_though_something_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        ways_out = "run on a machine of the cluster with RAY_ADDRESS=host:6379, or .* `ray job submit`$"
        with pytest.raises(UserError, match=f"^RAY_ADDRESS {address}: .*; {ways_out}"), connect():
            pass


# --- what a trial claims --------------------------------------------------------------------------


def cluster(*nodes: tuple[int, int]) -> Cluster:
    """Of nodes with so many CPU cores and GPUs."""
    return Cluster(tuple(NodeType(cpus, gpus, 1) for cpus, gpus in nodes))


@pytest.mark.parametrize(
    ("offered", "asked", "resources", "replicas"),
    [
        (cluster((8, 0)), ResourcesConfig(), {"cpu": 1}, 2),
        (cluster((8, 4)), ResourcesConfig(), {"cpu": 1, "gpu": 2}, 2),
        (cluster(*[(1, 1)] * 8), ResourcesConfig(gpus_per_trial=1), {"cpu": 1, "gpu": 1}, 1),
        (cluster((64, 0), (4, 2)), ResourcesConfig(cpus_per_trial=4), {"cpu": 4, "gpu": 2}, 2),
    ],
)
def test_a_trial_claims_two_gpus_or_as_many_cpu_devices(offered, asked, resources, replicas):
    claim = claim_for(offered, asked)
    assert (claim.resources, claim.replicas) == (resources, replicas)


@pytest.mark.parametrize(
    ("offered", "asked", "sentence"),
    [
        (cluster((8, 1), (8, 1)), ResourcesConfig(), "--gpus-per-trial 2: no node has so many GPUs"),
        (
            cluster((64, 0), (4, 2)),
            ResourcesConfig(cpus_per_trial=8),
            "--cpus-per-trial 8: no node with 2 GPUs has so many CPU cores, the most is 4",
        ),
        (
            cluster((2, 0)),
            ResourcesConfig(cpus_per_trial=3),
            "--cpus-per-trial 3: no node has so many CPU cores, the most is 2",
        ),
    ],
)
def test_a_claim_that_no_node_could_meet_is_refused(offered, asked, sentence):
    with pytest.raises(UserError, match=sentence):
        claim_for(offered, asked)


# --- a cluster that grows -------------------------------------------------------------------------

EMPTY = Cluster(
    (NodeType(cpus=0, gpus=0, count=1),),
    may_start=(NodeType(cpus=16, gpus=0, count=8), NodeType(cpus=48, gpus=4, count=4)),
)


def test_what_the_autoscaler_could_place_waits_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "raypipe")
    assert claim_for(EMPTY, ResourcesConfig()).resources == {"cpu": 1, "gpu": 2}
    assert "trials wait until the autoscaler has started one" in caplog.text
    assert workers_for(EMPTY, None, videos=1000) == 16 * 8
    assert (EMPTY.most_gpus, EMPTY.most_cpus) == (16, 320), "what trials at once are counted by"
    assert "0 of 128 CPU cores are there" in caplog.text
    assert workers_for(EMPTY, 5, videos=1000) == 5 and workers_for(EMPTY, None, videos=3) == 3


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (ResourcesConfig(gpus_per_trial=8), "no node has so many GPUs or could have, the most is 4"),
        (
            ResourcesConfig(cpus_per_trial=49),
            "no node with 2 GPUs has so many CPU cores or could have, the most is 48",
        ),
    ],
)
def test_what_no_node_type_could_place_is_refused_at_once(asked: ResourcesConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        claim_for(EMPTY, asked)


def test_a_cluster_without_work_for_cpus_is_said() -> None:
    with pytest.raises(UserError, match="no CPU for work"):
        workers_for(cluster((0, 0)), None, videos=3)


def test_trials_are_not_sent_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution.class_cache import _ActorClassCache

    class Trial:
        pass

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    keep_credentials_home()
    sent = _ActorClassCache().get(Trial)._default_options["runtime_env"]
    assert "secret" not in str(sent) and "PL_DISABLE_FORK" in str(sent)


def test_a_death_by_the_memory_monitor_is_a_death_to_tune():
    """The whole of it, with a real monitor, is in test_tune_faults.py."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    outlive_memory_monitor()
    outlive_memory_monitor()
    heard: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=lambda _, error: heard.append(error))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    RayActorManager._actor_task_failed(
        manager, tracked_actor_task=task, exception=OutOfMemoryError("the node runs low on memory")
    )
    (death,) = heard
    assert isinstance(death, RayActorError) and "low on memory" in str(death)
