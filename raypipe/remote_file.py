"""One file behind a URI as a decoder reads it: ranged reads, as few and as large as they serve.

An MP4's payload can be left out while its packets are listed. How much that spares: decision 19.
"""

import contextlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from raypipe.storage import asked_again, open_file_system

if TYPE_CHECKING:  # slow to import, and the child that decodes seldom needs it
    from pyarrow import NativeFile

SMALLEST_READ_BYTES = 1 << 18
LARGEST_READ_BYTES = 1 << 23
"""A request costs as much time as some hundred kilobytes do; reading on doubles its size up to this."""
KEPT_BYTES = 1 << 25
"""What was read last is kept: a container's index is read more than once."""
SKIM_ABOVE_BYTES = 1 << 22


class RemoteFile(io.RawIOBase):
    """A file behind a URI, read in pieces: small ones where a reader jumps, ever larger ones where it
    reads on."""

    def __init__(self, file: "NativeFile") -> None:
        self._file = file
        self._size = int(file.size())
        self._position = 0
        self._pieces: OrderedDict[int, bytes] = OrderedDict()
        self._read_on_from, self._next_bytes = 0, SMALLEST_READ_BYTES
        self._hollow: list[tuple[int, int]] = []
        self.requests = 0
        self.fetched_bytes = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        wanted = min(len(view), self._size - self._position)
        filled = 0
        while filled < wanted:
            some = self._some(wanted - filled)
            view[filled : filled + len(some)] = some
            filled += len(some)
            self._position += len(some)
        return filled

    def _some(self, wanted: int) -> memoryview:
        """Up to `wanted` bytes from the position on, at least one."""
        at = self._position
        for start, end in self._hollow:
            if start <= at < end:
                return memoryview(bytes(min(wanted, end - at)))
            if at < start:
                wanted = min(wanted, start - at)
                break
        for start, content in self._pieces.items():
            if start <= at < start + len(content):
                self._pieces.move_to_end(start)
                return memoryview(content)[at - start : at - start + wanted]
        return memoryview(self._fetch(at, wanted))[:wanted]

    def _fetch(self, at: int, wanted: int) -> bytes:
        reads_on = at == self._read_on_from
        self._next_bytes = min(2 * self._next_bytes, LARGEST_READ_BYTES) if reads_on else SMALLEST_READ_BYTES
        content: bytes = asked_again(lambda: self._file.read_at(max(self._next_bytes, wanted), at))
        if not content:
            raise OSError("the file became shorter while it was read")
        self.requests, self.fetched_bytes = self.requests + 1, self.fetched_bytes + len(content)
        self._read_on_from = at + len(content)
        self._pieces[at] = content
        while sum(map(len, self._pieces.values())) > KEPT_BYTES and len(self._pieces) > 1:
            self._pieces.popitem(last=False)
        return content

    @contextlib.contextmanager
    def skimming(self) -> Iterator[bool]:
        """While it lasts, an MP4's pictures and sound are read as zeros and not fetched: its index alone
        says where packets are. Yields whether there is anything to skip."""
        spans = self._payload() if self._size > SKIM_ABOVE_BYTES else []
        self._hollow = spans
        try:
            yield bool(spans)
        finally:
            self._hollow = []

    def _payload(self) -> list[tuple[int, int]]:
        before = self._position
        try:
            return payload_spans(self, self._size)
        finally:
            self._position = before

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


MP4_BOXES = frozenset(b"ftyp styp moov moof mfra mdat free skip wide sidx uuid pnot".split())
MOST_BOXES = 1000


def payload_spans(file: io.RawIOBase, size: int) -> list[tuple[int, int]]:
    """Where an MP4 holds what is shown and heard, its `mdat` boxes (ISO/IEC 14496-12, 4.2); none for other
    files, or where the boxes do not fit."""
    spans: list[tuple[int, int]] = []
    at, has_index = 0, False
    for _ in range(MOST_BOXES):
        if at == size:
            return spans if has_index else []
        file.seek(at)
        head = file.read(16) or b""
        length, kind, start = int.from_bytes(head[:4]), head[4:8], 8
        if length == 1:
            length, start = int.from_bytes(head[8:16]), 16
        if kind not in MP4_BOXES or length < start or at + length > size:
            return []
        has_index |= kind == b"moov"
        if kind == b"mdat":
            spans.append((at + start, at + length))
        at += length
    return []


@contextlib.contextmanager
def skimming(file: BinaryIO) -> Iterator[bool]:
    """`RemoteFile.skimming` where the file is one; a file on a disk is read as it is."""
    if isinstance(file, RemoteFile):
        with file.skimming() as skipped:
            yield skipped
    else:
        yield False


def open_remote(address: str) -> RemoteFile:
    """Raises FileNotFoundError, OSError, ValueError."""
    system, inner = open_file_system(address)
    return RemoteFile(system.open_input_file(inner))
