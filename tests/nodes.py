"""Nodes that can be lost: raylets in network namespaces, each with an address and a small disk of its own for
Ray's session and temporary files.

Needs root and the right to make namespaces. The folder of a test is on a disk that all nodes see.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from autoscaling import end_family, send, short_folder, token_environment

from benchmarks.soak import command_line, family

ROOT = Path(__file__).parents[1]
BRIDGE = f"rp{os.getpid()}"  # at most 15 characters, with h or n and a number
NETWORK = f"10.{77 + os.getpid() % 100}.0"
DISK = "80m"

T = TypeVar("T")


def ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode


def left_behind() -> Iterator[str]:
    """Bridges of runs of these tests that were killed, each named by its process."""
    for link in Path("/sys/class/net").iterdir():
        if (match := re.fullmatch(r"rp(\d+)", link.name)) and not Path(f"/proc/{match[1]}").exists():
            yield link.name


def remove(bridge: str) -> None:
    """A bridge, its namespaces and every process in them."""
    for name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split():
        if re.fullmatch(rf"{bridge}n\d+", name):
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            send(signal.SIGKILL, map(int, inside.stdout.split()))
            ip("netns", "del", name)
    ip("link", "del", bridge)


def writes_in(pid: int, folder: Path) -> bool:
    """Whether a process has a file below the folder open."""
    with contextlib.suppress(OSError):  # it has ended
        return any(os.readlink(file).startswith(f"{folder}/") for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


@dataclass
class Node:
    number: int
    process: "subprocess.Popen[bytes]"
    temporary: Path
    """Its Ray's folder and temporary one, as it names them; on a disk of its own, but for the head."""
    lost: bool = False

    def raylet(self) -> int | None:
        found = (pid for pid in family(self.process.pid) if "/raylet/raylet " in command_line(pid))
        return next(found, None)

    def members(self) -> list[int]:
        """The raylet, its workers, and their children."""
        raylet = self.raylet()
        return family(raylet) if raylet else []

    def does(self, what: str) -> bool:
        """Whether one of its processes bears such a title."""
        return any(what in command_line(pid) for pid in self.members())

    def writes_in(self, folder: Path) -> bool:
        return any(writes_in(pid, folder) for pid in self.members())

    def kill(self) -> None:
        self.lost = True
        send(signal.SIGKILL, self.members())

    def pause(self) -> None:
        self.lost = True
        send(signal.SIGSTOP, self.members())

    def wake(self) -> None:
        """After `pause`: Ray has given it up by now, and it ends when it hears so."""
        send(signal.SIGCONT, self.members())

    def cut(self) -> None:
        self.lost = True
        assert not ip("link", "set", f"{BRIDGE}h{self.number}", "down")

    def fill(self) -> None:
        """Leaves no room on its own disk, nor the maps of features that it holds."""
        for file in self._disk().glob("raypipe-*/*.npy"):
            file.unlink()
        for piece in (100_000, 1):
            with contextlib.suppress(OSError), open(self._disk() / "ballast", "ab", buffering=0) as file:
                while True:
                    file.write(bytes(piece))

    def empty(self) -> None:
        """After `fill`."""
        (self._disk() / "ballast").unlink()

    def bury(self) -> None:
        """Ends what is left of it after `pause` or `cut`, so that its connections close. Until they do, Ray's
        head may wait some minutes for its answers before it places anything (decision 26)."""
        ip("link", "set", f"{BRIDGE}h{self.number}", "up")
        send(signal.SIGKILL, self.members())

    def _disk(self) -> Path:
        return Path(f"/proc/{self.raylet()}/root{self.temporary}")


@dataclass
class Command:
    """A raypipe command on the head."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def wait_until(self, happened: Callable[[], T], *, within_s: float = 240) -> T:
        """What has happened, as soon as that is true."""
        deadline_s = time.monotonic() + within_s
        while not (found := happened()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline_s, self.said()
            time.sleep(0.05)
        return found

    def finish(self) -> tuple[int, str]:
        """Its exit status, and what it said."""
        try:
            return self.process.wait(timeout=600), self.said()
        finally:
            self.process.kill()


@dataclass
class Nodes:
    """A head without work and nodes of one CPU each, which are added one by one."""

    folder: Path
    ray: Path
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment = token_environment(self.folder) | {
            "RAY_ADDRESS": f"{NETWORK}.1:6379", "PYTHONPATH": str(ROOT), "RAYPIPE_FAKE_GPUS": "1",
            "TMPDIR": str(self.ray),
        }  # fmt: skip

    def alive(self) -> list[Node]:
        """Those that work, but for lost ones."""
        return [node for node in self.nodes[1:] if not node.lost]

    def workers(self, count: int) -> list[Node]:
        """As many as these that are not lost, started where they are missing; lost ones are buried."""
        for node in self.nodes:
            if node.lost:
                node.bury()
        while len(self.alive()) < count:
            self.add()
        return self.alive()

    def add(self, *, cpus: int = 1) -> Node:
        number = len(self.nodes) + 1
        name, address = f"{BRIDGE}n{number}", f"{NETWORK}.{number}"
        assert not ip("netns", "add", name)
        assert not ip(
            "link", "add", f"{BRIDGE}h{number}", "type", "veth", "peer", "name", "eth0", "netns", name
        )
        assert not ip("link", "set", f"{BRIDGE}h{number}", "master", BRIDGE, "up")
        for command in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                        ["link", "set", "lo", "up"]):  # fmt: skip
            assert not ip("-n", name, *command)
        where = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={self.ray}"]
        own_disk = ""  # each `ip netns exec` has mounts of its own
        if number > 1:
            where = [f"--address={NETWORK}.1:6379"]
            own_disk = f"mount -t tmpfs -o size={DISK} tmpfs {self.ray} && "
        log = self.folder / f"node{number}.log"
        command = [
            "sh", "-c", f'{own_disk}exec "$@"', "sh",
            str(Path(sys.executable).with_name("ray")), "start", "--block", *where, f"--num-cpus={cpus}",
            "--num-gpus=0", f"--node-ip-address={address}", "--object-store-memory=78643200",
        ]  # fmt: skip
        for _ in range(3):  # on a busy machine Ray may lose patience with itself
            with open(log, "wb") as file:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", name, *command], env=self.environment, stdout=file, stderr=file,
                    start_new_session=True,
                )  # fmt: skip
            while process.poll() is None and "Ray runtime started" not in log.read_text():
                time.sleep(0.1)
            if process.poll() is None:
                break
        assert process.poll() is None, log.read_text()
        self.nodes.append(Node(number, process, self.ray))
        return self.nodes[-1]

    def start(self, module: str, *flags: str, env: Mapping[str, str] | None = None) -> Command:
        """A command on the head, in the folder that all nodes see."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{BRIDGE}n1", sys.executable, "-m", module, *flags],
                cwd=self.folder, env=self.environment | (env or {}), stdout=file, stderr=file,
            )  # fmt: skip
        return Command(process, log)

    def close(self) -> None:
        for node in reversed(self.nodes):
            send(signal.SIGCONT, family(node.process.pid))
            end_family(node.process)
        remove(BRIDGE)


@contextmanager
def started_nodes(folder: Path) -> Iterator[Nodes]:
    """A head without work, to which nodes can be added. Skips where that cannot be."""
    if not shutil.which("ip"):
        pytest.skip("needs Debian's package iproute2")
    for bridge in left_behind():
        remove(bridge)
    if os.geteuid() or ip("link", "add", BRIDGE, "type", "bridge"):
        pytest.skip("needs root and the right to make network namespaces")
    assert not ip("link", "set", BRIDGE, "up")
    with short_folder(folder / "ray") as ray:
        made = Nodes(folder, ray)
        try:
            made.add(cpus=0)
            yield made
        finally:
            made.close()
