"""The Ray cluster a command runs on: the one at RAY_ADDRESS, else a private one on this machine."""

import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from raypipe.config import ResourcesConfig
from raypipe.console import without_lines
from raypipe.errors import RunFailed, UserError

LOG = logging.getLogger("raypipe")
T = TypeVar("T")

ASK_TIMEOUT_S = 5.0
"""How long an actor may take to answer what is only asked in passing."""

ANSWER_TIMEOUT_S = 5.0
"""How long the cluster at RAY_ADDRESS may take to accept a connection. Ray itself would try for minutes."""


@dataclass(frozen=True)
class NodeType:
    """A kind of node, and how many of it there may be: what its nodes offer."""

    cpus: int
    gpus: int
    count: int


@dataclass(frozen=True)
class Cluster:
    """What a cluster offers."""

    nodes: tuple[NodeType, ...]
    """Those that are there."""
    dashboard: str = ""
    """Address of the dashboard in a browser; empty where there is none."""
    may_start: tuple[NodeType, ...] = ()
    """Nodes that the autoscaler may start, those that are there already included; empty without one."""

    @property
    def cpus(self) -> int:
        return cpus_of(self.nodes)

    @property
    def gpus(self) -> int:
        return gpus_of(self.nodes)

    @property
    def most_cpus(self) -> int:
        """With every node that the autoscaler may start."""
        return max(self.cpus, cpus_of(self.may_start))

    @property
    def most_gpus(self) -> int:
        """With every node that the autoscaler may start."""
        return max(self.gpus, gpus_of(self.may_start))


def cpus_of(nodes: Iterable[NodeType]) -> int:
    return sum(node.cpus * node.count for node in nodes)


def gpus_of(nodes: Iterable[NodeType]) -> int:
    return sum(node.gpus * node.count for node in nodes)


@contextmanager
def connect() -> Iterator[Cluster]:
    """Joins or starts the cluster, says where its dashboard is, and leaves it (or ends it) afterwards.

    Raises RunFailed where RAY_ADDRESS names no cluster.
    """
    # Set before Ray is imported. Usage reports would be sent out; the other hides GPUs from workers that
    # claim none, where TensorFlow would otherwise take their memory.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # Ray Data makes Ray's core print an error about restarts for every actor; "error" is not one level up.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray repeats for ever what its memory monitor has killed.
    os.environ.setdefault("RAY_task_oom_retries", "4")
    # Of work that failed while a run stops, Ray would print a traceback below the run's own sentence.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    import ray

    # It warns that a token is needed; the line below tells where the token is.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    started = not ray.is_initialized()  # tests and notebooks may have their own
    if started:
        keep_servers_quiet()
        address = os.environ.get("RAY_ADDRESS", "")
        where = f"RAY_ADDRESS {address}" if address else "this machine"
        _refuse_unanswered(address)
        try:
            with without_lines(b"RAY_BACKEND_LOG_LEVEL"), _keeping_sigterm():
                ray.init(
                    address=address or "local",
                    include_dashboard=None if address else True,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise RunFailed(f"{where}: no Ray cluster: {' '.join(str(error).split())}") from None
    try:
        cluster = _describe()
        where = f"http://{cluster.dashboard}" if cluster.dashboard else "none"
        LOG.info("Ray dashboard: %s · its token: ray get-auth-token", where)
        yield cluster
    finally:
        if started:
            ray.shutdown()


def ask(reference: Any, otherwise: T) -> T:
    """What an actor answers, or `otherwise` where the cluster is too busy or has ended."""
    import ray

    try:
        answer: T = ray.get(reference, timeout=ASK_TIMEOUT_S)
    except ray.exceptions.RayError:
        return otherwise
    return answer


def gpus_are_fake() -> bool:
    """Whether Ray only believes in its GPUs, as in tests: CPUs do what they would do."""
    return "RAYPIPE_FAKE_GPUS" in os.environ


def name_process(name: str) -> None:
    """What this worker is called among the processes on Ray's dashboard, in `ps` and in `nvidia-smi`, until
    Ray gives it its next task: kept processes train many trials, and an actor's name never changes."""
    from ray._raylet import setproctitle  # type: ignore[attr-defined]

    setproctitle(f"ray::{name}")


def keep_servers_quiet() -> None:
    """Of each task that is tried again, or that ends with a run, Ray's servers print lines on the driver's
    standard output, also with log_to_driver off. Ray's logs have them; commands say what became of the work.
    """
    import ray

    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _refuse_unanswered(address: str) -> None:
    """Raises RunFailed where nothing listens at a `host:port`, UserError where the address is none, or is
    one of Ray Client, through which a driver cannot see what the cluster's nodes are and what may come."""
    if address in ("", "auto", "local"):
        return
    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS {address}: Ray Client is not supported; run on a machine of the cluster with "
            "RAY_ADDRESS=host:6379, or submit the command with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"RAY_ADDRESS {address}: must be host:port, or unset for a cluster on this machine")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise RunFailed(
            f"RAY_ADDRESS {address}: no Ray cluster answers there ({error}); "
            "start it, or unset RAY_ADDRESS for a cluster on this machine"
        ) from None


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Gives SIGTERM back to whom it belonged: Ray takes it, and would end the command without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's way, while it starts
        raise KeyboardInterrupt(signal.SIGTERM.name) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _describe() -> Cluster:
    import ray

    alive = {node["NodeID"]: (node["Resources"], 1) for node in ray.nodes() if node["Alive"]}
    dashboard = getattr(ray._private.worker.global_worker.node, "webui_url", None) or ""
    return Cluster(node_types(alive), dashboard.removeprefix("http://"), _may_start())


def _may_start() -> tuple[NodeType, ...]:
    """What the cluster's autoscaler may start, as it has told the cluster or as its file on this machine,
    the head, says; empty where there is none, or where that is not to be known."""
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS

    told = ray._private.state.state.get_cluster_config()
    if told and told.node_group_configs:
        groups = told.node_group_configs
        return node_types({group.name: (dict(group.resources), group.max_count) for group in groups})
    client = ray._private.worker.global_worker.gcs_client
    if not client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None):
        return ()
    try:
        config = yaml.safe_load(Path("~/ray_bootstrap_config.yaml").expanduser().read_text())
        types = config["available_node_types"].items()
        most = config.get("max_workers", 2)
        return node_types({n: (t["resources"], min(t.get("max_workers", most), most)) for n, t in types})
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return ()


MANY_NODES = 1000
"""Stands for a node type without a limit."""


def node_types(declared: Mapping[str, tuple[Mapping[str, float], int]]) -> tuple[NodeType, ...]:
    """Node types from their resources and the most nodes of each; -1 is no limit.

    >>> node_types({"head": ({"CPU": 0}, 0), "trials": ({"CPU": 8, "GPU": 2}, 3)})
    (NodeType(cpus=8, gpus=2, count=3),)
    """
    return tuple(
        NodeType(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), MANY_NODES if most < 0 else most)
        for resources, most in declared.values()
        if most
    )


def workers_for(cluster: Cluster, asked: int | None, *, videos: int) -> int:
    """CPU cores that an extraction uses: those that were asked for, as far as they are there or can come.

    No node with GPUs is started for it where there are others. Raises UserError where there is none.
    """
    without_gpus = [node for node in cluster.may_start if not node.gpus]
    present = cluster.cpus
    most = max(present, cpus_of(without_gpus or cluster.may_start))
    if most == 0:
        raise UserError("the cluster has no CPU for work, and its autoscaler is not known to start any")
    cpus = max(1, min(asked or most, most, videos))
    if cpus > present:
        LOG.info(
            "%d of %d CPU cores are there; the others come when the autoscaler starts them", present, cpus
        )
    return cpus


@dataclass(frozen=True)
class Claim:
    """What each trial claims from the cluster, and what it trains on."""

    cpus: int
    gpus: int
    replicas: int

    @property
    def resources(self) -> dict[str, float]:
        return {"cpu": self.cpus, "gpu": self.gpus} if self.gpus else {"cpu": self.cpus}

    @property
    def devices(self) -> str:
        plural = "s" if self.replicas > 1 else ""
        if self.gpus:
            return f"{self.gpus} GPU{plural} a trial"
        return f"{self.replicas} logical CPU device{plural} a trial; the cluster has no GPU"


def claim_for(cluster: Cluster, config: ResourcesConfig) -> Claim:
    """What a trial claims on this cluster, or on what it can grow to; says where it has to wait for that.

    Raises UserError where no node could ever place one.
    """
    kinds = [*cluster.nodes, *cluster.may_start]
    or_could = " or could have" if cluster.may_start else ""
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial if cluster.most_gpus else 0
    most_gpus = max((node.gpus for node in kinds), default=0)
    if gpus > most_gpus:
        raise UserError(
            f"--gpus-per-trial {gpus}: no node has so many GPUs{or_could}, the most is {most_gpus}; "
            "lower the flag"
        )
    most_cpus = max((node.cpus for node in kinds if node.gpus >= gpus), default=0)
    if cpus > most_cpus:
        with_gpus = f" with {gpus} GPUs" if gpus else ""
        raise UserError(
            f"--cpus-per-trial {cpus}: no node{with_gpus} has so many CPU cores{or_could}, "
            f"the most is {most_cpus}; lower the flag"
        )
    if not any(node.cpus >= cpus and node.gpus >= gpus for node in cluster.nodes):
        LOG.info("no node is there yet for a trial; trials wait until the autoscaler has started one")
    return Claim(cpus, gpus, replicas=config.gpus_per_trial)


def keep_credentials_home() -> None:
    """Tune would give each trial this process's AWS credentials as its runtime environment, which Ray writes
    to its logs and shows on its dashboard. Nodes have their own."""
    from ray.tune.execution import class_cache

    names = [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(names)


@functools.cache  # once per process
def outlive_memory_monitor() -> None:
    """Where Ray's memory monitor ends a trial's process, Tune takes that for an unexpected error and ends the
    whole search (Ray 2.60, `RayActorManager._actor_task_failed`): here it is a death like any other."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    handle = RayActorManager._actor_task_failed

    def handle_death(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        handle(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = handle_death
