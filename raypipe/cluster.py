"""The Ray cluster a command runs on: the one at RAY_ADDRESS, else a private one on this machine."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raypipe.config import ResourcesConfig
from raypipe.errors import RunFailed, UserError

LOG = logging.getLogger("raypipe")

ANSWER_TIMEOUT_S = 5.0
"""How long the cluster at RAY_ADDRESS may take to accept a connection. Ray itself would try for minutes."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster offers."""

    cpus: int
    gpus: int
    most_gpus_on_a_node: int
    dashboard: str
    """Address of the dashboard in a browser; empty where there is none."""


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
    import ray

    # It warns that a token is needed; the line below tells where the token is.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    started = not ray.is_initialized()  # tests and notebooks may have their own
    if started:
        address = os.environ.get("RAY_ADDRESS", "")
        where = f"RAY_ADDRESS {address}" if address else "this machine"
        _refuse_unanswered(address)
        try:
            with _without_log_level_notice(), _keeping_sigterm():
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


def _refuse_unanswered(address: str) -> None:
    """Raises RunFailed where nothing listens at a `host:port` or `ray://host:port`."""
    if address in ("", "auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise RunFailed(f"RAY_ADDRESS {address}: must be host:port, or unset for a cluster on this machine")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise RunFailed(
            f"RAY_ADDRESS {address}: no Ray cluster answers there ({error}); "
            "start it, or unset RAY_ADDRESS for a cluster on this machine"
        ) from None


@contextmanager
def _without_log_level_notice() -> Iterator[None]:
    """Holds standard error back and lets all of it through but Ray's notice that its log level is set."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), "wb") as screen:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen.fileno(), 2)
            held.seek(0)
            screen.writelines(line for line in held if b"RAY_BACKEND_LOG_LEVEL" not in line)


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Gives SIGTERM back to whom it belonged: Ray takes it, and would end the command without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _describe() -> Cluster:
    import ray

    total = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    dashboard = getattr(ray._private.worker.global_worker.node, "webui_url", None) or ""
    return Cluster(
        cpus=int(total.get("CPU", 0)),
        gpus=int(total.get("GPU", 0)),
        most_gpus_on_a_node=max((int(node["Resources"].get("GPU", 0)) for node in alive), default=0),
        dashboard=dashboard.removeprefix("http://"),
    )


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
        if self.gpus:
            return f"{self.gpus} GPUs a trial"
        return f"{self.replicas} logical CPU devices a trial; the cluster has no GPU"


def claim_for(cluster: Cluster, config: ResourcesConfig) -> Claim:
    """What a trial claims on this cluster. Raises UserError where no node could ever place one."""
    if config.cpus_per_trial > cluster.cpus:
        raise UserError(f"--cpus-per-trial {config.cpus_per_trial}: the cluster has {cluster.cpus} CPU cores")
    if cluster.gpus == 0:
        return Claim(cpus=config.cpus_per_trial, gpus=0, replicas=config.gpus_per_trial)
    if cluster.most_gpus_on_a_node < config.gpus_per_trial:
        raise UserError(
            f"--gpus-per-trial {config.gpus_per_trial}: no node has so many GPUs, "
            f"the most is {cluster.most_gpus_on_a_node}; lower the flag"
        )
    return Claim(cpus=config.cpus_per_trial, gpus=config.gpus_per_trial, replicas=config.gpus_per_trial)
