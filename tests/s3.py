"""A real S3 server on loopback (moto's, a process of its own), and a proxy before it that counts and breaks.

moto keeps objects in memory, but speaks the whole protocol: listing by pages, ranges, multipart uploads,
copies inside a bucket.
"""

import contextlib
import functools
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pyarrow import fs

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTEST", "s3cr3tS3CR3Ts3cr3tS3CR3T"


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


@functools.cache
def server_port() -> int:
    """The port of one server for all tests of this process; it ends with it."""
    import atexit

    os.environ |= {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}  # tests/test_cluster_configs.py
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    atexit.register(server.kill)
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return port
        assert server.poll() is None, "moto's server ended"
        time.sleep(0.05)


@dataclass(frozen=True)
class Bucket:
    """A new, empty bucket: s3://NAME/KEY plus `options`."""

    name: str = field(default_factory=lambda: f"b-{uuid.uuid4().hex[:12]}")
    port: int = field(default_factory=server_port)

    def __post_init__(self) -> None:
        self.system.create_dir(self.name)

    @property
    def options(self) -> str:
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    @property
    def system(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{server_port()}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}{self.options}"

    def put(self, files: Mapping[str, bytes]) -> "Bucket":
        for key, content in files.items():
            with self.system.open_output_stream(f"{self.name}/{key}") as file:
                file.write(content)
        return self

    def names(self) -> list[str]:
        found = self.system.get_file_info(fs.FileSelector(self.name, recursive=True))
        return sorted(info.path.partition("/")[2] for info in found if info.is_file)

    def get(self, key: str) -> bytes:
        content: bytes = self.system.open_input_file(f"{self.name}/{key}").read()
        return content


Fault = Callable[[str, str], str | None]
"""What to do to a request (method, path): nothing, "500", "slow" or "cut"; decided anew for each."""


@dataclass
class Traffic:
    """What has passed the proxy."""

    port: int = 0
    fault: Fault = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: int = 0
    sent_bytes: int = 0
    said: list[bytes] = field(default_factory=list)

    def bucket(self, bucket: Bucket) -> Bucket:
        """The same bucket as seen through the proxy."""
        through = object.__new__(Bucket)
        through.__dict__.update(name=bucket.name, port=self.port)
        return through


SLOW_S = 4.0
"""Longer than the AWS SDK waits by default for an answer to move."""


REFUSAL = b"".join(
    [
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InternalError</Code>',
        b"<Message>We encountered an internal error. Please try again.</Message>",
        b"<RequestId>%s</RequestId><HostId>%s</HostId></Error>" % (b"R" * 16, b"H" * 76),
    ]
)
"""As long as those of Amazon S3 are: longer than a small object."""


@contextlib.contextmanager
def proxy() -> Iterator[Traffic]:
    """A proxy before the server, which counts what it answers and breaks what `fault` tells it to."""
    traffic, lock = Traffic(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.body()
            fault = traffic.fault(self.command, self.path)
            with lock:
                traffic.requests.append((self.command, self.path))
                traffic.faults += fault is not None
            if fault == "500":
                return self.reply(500, {}, REFUSAL)
            if fault == "slow":
                time.sleep(SLOW_S)
            server = http.client.HTTPConnection("127.0.0.1", server_port(), timeout=60)
            mine = {"connection", "transfer-encoding", "content-length", "expect"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in mine}
            server.request(self.command, self.path, body=body, headers=headers)
            reply = server.getresponse()
            content = reply.read()
            kept = {
                k: v
                for k, v in reply.getheaders()
                if not re.match("connection|transfer|date|server", k, re.I)
            }
            self.reply(reply.status, kept, content, cut=fault == "cut")
            server.close()

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def reply(self, status: int, headers: Mapping[str, str], body: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if not any(name.lower() == "content-length" for name in headers):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                sent = body[: len(body) // 2] if cut else body
                with contextlib.suppress(OSError):
                    self.wfile.write(sent)
                with lock:
                    traffic.sent_bytes += len(sent)
            self.close_connection = cut or self.close_connection

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        traffic.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield traffic
        server.shutdown()
