"""A real Ray cluster that grows and shrinks on this machine: Ray's autoscaler over its fake nodes, which are
raylets of their own. `ray.cluster_utils.AutoscalingCluster` would do, but it begins with `ray stop --force`,
which ends every Ray on the machine, and the wheel lacks the file that it reads.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from s3 import free_port

from benchmarks.soak import family

HERE = Path(__file__).parent
TOKEN = "0123456789abcdef0123456789abcdef"
HEAD = "ray.head.default"

LEGACY = [
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
]
LEGACY += [
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]


def config(
    types: Mapping[str, tuple[Mapping[str, int], int]], port: int, idle_minutes: float
) -> dict[str, object]:
    declared = {
        name: {"resources": dict(resources), "node_config": {}, "min_workers": 0, "max_workers": most}
        for name, (resources, most) in types.items()
    }
    return {
        "cluster_name": "fake",
        "max_workers": sum(most for _, most in types.values()),
        "upscaling_speed": 100,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": "fake_nodes.FakeNodes",
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,  # or nodes with one address are one to it, and none is ever idle
            "disable_node_updaters": True,  # there is nothing to set up through SSH
            "disable_launch_config_check": True,
        },
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "head_node_type": HEAD,
        "available_node_types": declared
        | {HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}},
    } | {name: [] for name in LEGACY}


def token_environment(home: Path) -> dict[str, str]:
    """What a process needs to speak with the cluster: the token, and where `ray up` leaves its file."""
    return os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(home),
    }


@contextmanager
def short_folder(link: Path) -> Iterator[Path]:
    """A folder for Ray's sockets, whose names may have 107 characters, and a link to it."""
    with tempfile.TemporaryDirectory(prefix="rp", dir="/tmp", ignore_cleanup_errors=True) as folder:
        link.symlink_to(folder)
        yield Path(folder)


@contextmanager
def autoscaling_cluster(
    home: Path,
    types: Mapping[str, tuple[Mapping[str, int], int]],
    *,
    idle_s: float = 5.0,
    dashboard_port: int = 0,
) -> Iterator[str]:
    """A head without work, and nodes of these types by name, each with its resources and how many there may
    be; yields its address. Token authentication is on."""
    port = free_port()
    home.mkdir(parents=True, exist_ok=True)
    file = home / "ray_bootstrap_config.yaml"
    file.write_text(json.dumps(config(types, port, idle_s / 60)))
    scaler = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_metrics_report_interval_ms": "1000",
        "RAYPIPE_FAKE_GPUS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [HERE, HERE.parent])),  # there the autoscaler finds fake_nodes
    }
    with short_folder(home / "ray") as ray, open(home / "head.log", "wb") as log:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
            "--node-ip-address=127.0.0.1", "--num-cpus=0", "--num-gpus=0", f"--autoscaling-config={file}",
            "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0",
            f"--temp-dir={ray}", "--dashboard-agent-listen-port=0",
            f"--include-dashboard={'true' if dashboard_port else 'false'}",
        ]  # fmt: skip
        if dashboard_port:
            command += [f"--dashboard-port={dashboard_port}"]
        head = subprocess.Popen(
            command, env=token_environment(home) | scaler, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline_s = time.monotonic() + 120
            while "Ray runtime started" not in (home / "head.log").read_text():
                assert head.poll() is None and time.monotonic() < deadline_s, (home / "head.log").read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            end_family(head)


def end_family(head: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it began, by their numbers."""
    pids = family(head.pid)
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(timeout=30)
    except subprocess.TimeoutExpired:
        head.kill()
    send(signal.SIGKILL, [pid for pid in pids if pid != head.pid])
    head.wait()


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
