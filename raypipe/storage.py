"""Where files are: on a disk, or on any file system that pyarrow or fsspec knows by URI (s3://, gs://, ...).

    place("results/features")        a pathlib.Path
    place("s3://bucket/features")    a RemotePath, which offers what raypipe needs of a Path

Nothing is half-written: on a disk a whole file is renamed, in a bucket a whole object is put in its place;
on other systems (hdfs://, most of fsspec's) a file is written under a hidden name beside it, and moved.
Credentials come from the environment, a profile or a role, never from an address: addresses are kept.
"""

import contextlib
import errno
import fnmatch
import functools
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote

from raypipe.errors import UserError

if TYPE_CHECKING:  # slow to import, and the child that decodes seldom needs it
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

LOG = logging.getLogger("raypipe")
T = TypeVar("T")

S3_ATTEMPTS = 8
"""Of one request, unless AWS_MAX_ATTEMPTS says; the pauses between them double, so that a bucket may be away
for some 20 s."""
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 20.0
"""How long an answer may not move at all."""


# --- addresses ------------------------------------------------------------------------------------


def is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def split_options(address: str) -> tuple[str, str]:
    """A URI without the options of its file system (?region=...), and these; a path as it is."""
    plain, mark, options = address.partition("?") if "://" in address else (address, "", "")
    return plain, mark + options


SECRET = re.compile(r"key|secret|token|passw|signature|credential|^sig$|^sas$", re.IGNORECASE)


def redacted(address: str) -> str:
    """An address as it may be shown.

    >>> redacted("s3://AKIA:xyz@bucket/a?secret_key=1&region=b"), redacted("s3://bucket/a?region=b")
    ('s3://***@bucket/a?secret_key=***&region=b', 's3://bucket/a?region=b')
    """
    if "://" not in address:
        return address
    plain, options = split_options(address)
    scheme, _, rest = plain.partition("://")
    host, slash, inner = rest.partition("/")
    if _is_secret_host(scheme, host):
        host = f"***@{host.rpartition('@')[2]}"
    pairs = [pair.partition("=") for pair in options[1:].split("&")] if options else []
    shown = "&".join(name + mark + ("***" if SECRET.search(name) else value) for name, mark, value in pairs)
    return f"{scheme}://{host}{slash}{inner}" + (f"?{shown}" if options else "")


def _is_secret_host(scheme: str, host: str) -> bool:
    """A password, or where there is no other user than a key, anything before the @."""
    user, at, _ = host.rpartition("@")
    return bool(at) and (":" in user or scheme == "s3")


def refuse_credentials(address: str, *, what: str) -> None:
    """Raises UserError for an address with a password or a key in it: addresses are kept in rows, reports."""
    if (shown := redacted(address)) != address:
        raise UserError(
            f"{what} {shown}: holds credentials, and addresses are kept beside the results; "
            "give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role instead"
        )


def open_file_system(address: str) -> "tuple[FileSystem, str]":
    """The file system of a URI, and the path in it. Raises ValueError or OSError where there is none."""
    from pyarrow import ArrowInvalid, fs

    refuse_credentials(address, what="address")
    plain, options = split_options(address)
    scheme, _, rest = plain.partition("://")
    if scheme == "s3" and " " not in rest:
        return _s3(rest.partition("/")[0], options), unquote(rest).rstrip("/")
    try:
        system, inner = fs.FileSystem.from_uri(address)
    except ArrowInvalid as error:
        if "Unrecognized filesystem" not in str(error):
            raise
        return _by_fsspec(address)
    return system, inner


@functools.lru_cache
def _s3(bucket: str, options: str) -> "FileSystem":
    """A client of its own for each bucket, patient enough for one that is busy."""
    from pyarrow import fs

    asked = _s3_options(options)
    system, _ = fs.FileSystem.from_uri(f"s3://{bucket}{options}")  # checks the values, finds the region
    return fs.S3FileSystem(
        **{
            "allow_delayed_open": True,  # a small file is one request instead of three
            **asked,
            "region": system.region,
        },
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_attempts()),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
    )


S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
S3_SWITCHES = ("allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open")
"""The options that pyarrow takes of an s3:// URI and its client's constructor takes as well."""


def _s3_options(options: str) -> dict[str, str | bool]:
    """What an s3:// URI asks of its client. Raises ValueError for what could not be passed on to it.

    >>> _s3_options("?region=eu-central-1&allow_bucket_creation=true")
    {'region': 'eu-central-1', 'allow_bucket_creation': True}
    """
    pairs = parse_qsl(options[1:], keep_blank_values=True)
    for name, _ in pairs:
        if name not in S3_TEXTS + S3_SWITCHES:
            known = ", ".join(S3_TEXTS + S3_SWITCHES)
            raise ValueError(f"{name} is not an option of s3:// here; these are: {known}")
    return {
        name: value.lower() in ("true", "1") if name in S3_SWITCHES else value
        for name, value in pairs
        if value
    }


def _attempts() -> int:
    return int(os.environ.get("AWS_MAX_ATTEMPTS", S3_ATTEMPTS))


REFUSAL_LONGER_THAN_READ = "Failed to flush response stream"
"""What pyarrow's S3 client says where it was to read fewer bytes than the text of a refusal has ("busy", some
300 bytes): it takes that for a fault of its own and, unlike after other refusals, does not ask again."""


def asked_again(read: Callable[[], T]) -> T:
    """What `read` gives, tried as often as the client tries other requests."""
    for attempt in range(_attempts() - 1):
        try:
            return read()
        except OSError as error:
            if REFUSAL_LONGER_THAN_READ not in str(error):
                raise
        time.sleep(0.1 * 2**attempt)
    return read()


def _by_fsspec(address: str) -> "tuple[FileSystem, str]":
    import fsspec.core
    from pyarrow import fs

    try:
        # Of these only the addresses of the web are quoted.
        system, inner = fsspec.core.url_to_fs(address if address.startswith("http") else unquote(address))
    except ValueError:
        raise ValueError(f"Unrecognized filesystem type in URI: {address}") from None
    except ImportError as error:  # a package for it is not installed
        raise ValueError(str(error)) from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), str(inner)


class StorageError(OSError):
    """A storage behind a URI did not do what it was asked; what it said, on one line."""


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Turns what a file system raises, but that there is no such file, into a StorageError."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except OSError as error:
        raise StorageError(" ".join(str(error).split())) from error


# --- whole files ----------------------------------------------------------------------------------

BUCKETS = ("s3", "gcs", "abfs")
"""pyarrow's systems in which a file is there once its writer has closed it, and no folder has to be made."""

LEFTOVER = re.compile(r"\.[^/]+\.[0-9a-f]{32}\.part")
"""The name of a file that is being written, or whose writer was killed."""


@contextlib.contextmanager
def _whole(system: "FileSystem", inner: str) -> Iterator[str]:
    """Where to write what is to be in `inner` when the block has ended: there it is whole, or not at all."""
    if system.type_name in BUCKETS:
        yield inner
        return
    folder, slash, name = inner.rpartition("/")
    part = f"{folder}{slash}.{name}.{uuid.uuid4().hex}.part"
    try:
        yield part
        _move_over(system, part, inner)
    except BaseException:
        with contextlib.suppress(OSError):
            system.delete_file(part)
        raise


def _move_over(system: "FileSystem", source: str, target: str) -> None:
    """Moves a file to where another may be. Some systems (SMB, and HDFS inside pyarrow) replace nothing:
    there the old file goes just before, so that for a moment there is none, but never half of one."""
    try:
        system.move(source, target)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
        system.delete_file(target)
        system.move(source, target)


# --- paths ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileStatus:
    """The two of os.stat's fields that raypipe looks at."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder behind a URI, with the methods of pathlib.Path that raypipe needs.

    There are no folders in a bucket: they exist when something is in them.
    """

    address: str
    """The URI, options included."""

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "RemotePath":
        plain, options = split_options(self.address)
        return RemotePath(f"{plain.rstrip('/')}/{quote(name)}{options}")

    @property
    def name(self) -> str:
        return unquote(split_options(self.address)[0].rpartition("/")[2])

    @property
    def parent(self) -> "RemotePath":
        plain, options = split_options(self.address)
        return RemotePath(plain.rpartition("/")[0] + options)

    @property
    def system(self) -> "FileSystem":
        return open_file_system(self.address)[0]

    @property
    def inner(self) -> str:
        """The path in its file system."""
        return open_file_system(self.address)[1]

    @_asking()
    def _info(self) -> "FileInfo":
        system, inner = open_file_system(self.address)
        return system.get_file_info(inner)

    def exists(self) -> bool:
        kind: str = self._info().type.name
        return kind != "NotFound"

    def is_file(self) -> bool:
        is_file: bool = self._info().is_file
        return is_file

    def stat(self) -> FileStatus:
        """Raises FileNotFoundError."""
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(f"{self}: no such file")
        return FileStatus(info.size, info.mtime_ns or 0)

    def glob(self, pattern: str) -> "Iterator[RemotePath]":
        """The files whose path in this folder the pattern fits, part by part."""
        parts = pattern.split("/")
        for name in self.names(recursive=len(parts) > 1):
            found = name.split("/")
            if len(found) == len(parts) and all(map(fnmatch.fnmatchcase, found, parts)):
                yield self / name

    def names(self, *, recursive: bool = True) -> Sequence[str]:
        """The paths, in this folder, of the files in it that are whole."""
        skip = len(self.inner) + 1
        infos = self.list(recursive=recursive)
        return [info.path[skip:] for info in infos if not LEFTOVER.fullmatch(info.base_name)]

    @_asking()
    def list(self, *, recursive: bool = False) -> "list[FileInfo]":
        """The files in this folder, also those that a killed writer left."""
        from pyarrow import fs

        system, inner = open_file_system(self.address)
        selector = fs.FileSelector(inner, recursive=recursive, allow_not_found=True)
        return [info for info in system.get_file_info(selector) if info.is_file]

    @_asking()
    def open(self) -> "NativeFile":
        """For reading. Raises FileNotFoundError."""
        system, inner = open_file_system(self.address)
        return system.open_input_file(inner)

    def read(self, reader: "Callable[[NativeFile], T]") -> T:
        """What `reader` makes of the file. Raises FileNotFoundError, and what `reader` raises."""

        def once() -> T:
            with self.open() as file:
                return reader(file)

        return asked_again(once)

    @_asking()
    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError."""
        content: bytes = self.read(lambda file: file.read())
        return content

    def read_text(self) -> str:
        return self.read_bytes().decode()

    @_asking()
    def write_bytes(self, content: Any) -> None:
        """Puts the whole content in its place, or nothing."""
        system, inner = open_file_system(self.address)
        with _whole(system, inner) as path, system.open_output_stream(path) as file:
            file.write(content)

    @_asking()
    def write_in_place(self, content: bytes) -> None:
        """Puts content where a reader may find half of it, but never, not even for a moment, nothing."""
        system, inner = open_file_system(self.address)
        with system.open_output_stream(inner) as file:
            file.write(content)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    @_asking()
    def unlink(self, missing_ok: bool = False) -> None:
        system, inner = open_file_system(self.address)
        try:
            system.delete_file(inner)
        except FileNotFoundError:
            if not missing_ok:
                raise

    @_asking()
    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do in a bucket; elsewhere the folder is made."""
        system, inner = open_file_system(self.address)
        if system.type_name not in BUCKETS:
            system.create_dir(inner, recursive=True)

    @_asking()
    def remove_tree(self) -> None:
        """Removes whatever is below."""
        system, _ = open_file_system(self.address)
        for info in self.list(recursive=True):
            system.delete_file(info.path)

    @_asking()
    def copy_to(self, target: "RemotePath") -> None:
        """Puts a copy in the target's place, inside the file system: nothing passes through here."""
        with _whole(target.system, target.inner) as path:
            self.system.copy_file(self.inner, path)

    @_asking()
    def put_file(self, file: Path) -> None:
        """Puts a local file's whole content in this place."""
        import pyarrow as pa

        system, inner = open_file_system(self.address)
        with (
            pa.memory_map(str(file)) as content,
            _whole(system, inner) as path,
            system.open_output_stream(path) as target,
        ):
            target.write(content.read_buffer())


Place = Path | RemotePath


def place(address: str | Path | RemotePath, *, flag: str = "address") -> Place:
    """A path for an address. Raises UserError for one that holds credentials or that nothing can open."""
    if isinstance(address, RemotePath):
        return address
    if isinstance(address, Path) or not is_remote(address):
        return Path(str(address).removeprefix("file://")).absolute()
    refuse_credentials(address, what=flag)
    try:
        open_file_system(address)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {address}: no such storage: {' '.join(str(error).split())}") from None
    plain, options = split_options(address)
    return RemotePath(plain.rstrip("/") + options)


# --- many files -----------------------------------------------------------------------------------

ASKED_AT_ONCE = 32
LISTED_FROM = 100
"""So many files of one folder are found by listing it, a thousand to a request, whatever else is in it."""


def statuses(addresses: Iterable[str]) -> dict[str, FileStatus]:
    """Size and time, in whole seconds, of those files behind URIs that are there and may be looked at.

    Raises StorageError where a storage does not answer.
    """
    folders: dict[str, list[str]] = {}
    for address in addresses:
        folders.setdefault(str(RemotePath(address).parent), []).append(address)
    parts = [
        part
        for folder in folders.values()
        for part in ([folder] if len(folder) >= LISTED_FROM else [[address] for address in folder])
    ]
    pool = ThreadPoolExecutor(ASKED_AT_ONCE)
    try:
        found = list(pool.map(_statuses_in_a_folder, parts))
    finally:
        pool.shutdown(cancel_futures=True)
    return {address: status for part in found for address, status in part.items()}


@_asking()
def _statuses_in_a_folder(addresses: Sequence[str]) -> dict[str, FileStatus]:
    from pyarrow import fs

    try:
        system = open_file_system(addresses[0])[0]
        inner = {open_file_system(address)[1]: address for address in addresses}
        if len(inner) == 1:
            infos = system.get_file_info(list(inner))
        else:
            parent = next(iter(inner)).rpartition("/")[0]
            infos = system.get_file_info(fs.FileSelector(parent, allow_not_found=True))
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or REFUSED.search(str(error)):
            return {}  # whoever reads it will be told
        raise
    return {
        inner[info.path]: FileStatus(info.size, (info.mtime_ns or 0) // 10**9 * 10**9)
        for info in infos
        if info.is_file and info.path in inner
    }


REFUSED = re.compile(r"ACCESS_DENIED|not.found|NO_SUCH|Permission denied", re.IGNORECASE)
"""Said of one file or one bucket; other words are of a storage that does not answer."""
