"""A bucket of files behind as much of S3's protocol as listing and reading need."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

DATE = ("2024-01-01T00:00:00.000Z", "Mon, 01 Jan 2024 00:00:00 GMT")


@contextmanager
def serve_bucket(files: Mapping[str, bytes], patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves `files` as s3://bucket/KEY; yields the options that a URI needs to get there."""
    for name, value in {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(f"AWS_{name}", value)

    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            key, query = unquote(url.path).removeprefix("/bucket/"), parse_qs(url.query)
            if "list-type" in query:
                self.answer(200, listing(files, query.get("prefix", [""])[0]))
            elif key not in files:
                self.answer(404, b"")
            elif asked := self.headers["Range"]:
                first, last = asked.removeprefix("bytes=").split("-")
                self.answer(206, files[key][int(first) : int(last) + 1])
            else:
                self.answer(200, files[key])

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", DATE[1])
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=here"
        server.shutdown()


def listing(files: Mapping[str, bytes], prefix: str) -> bytes:
    entries = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size>"
        f"<LastModified>{DATE[0]}</LastModified></Contents>"
        for key, content in files.items()
        if key.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
