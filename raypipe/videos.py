"""Which videos there are: a folder, a manifest, a glob or a URI -> a list of `Video`, each listed once.

Nothing is opened here but the manifest; a file that is not there is still listed, and becomes a row
with the outcome `failed`.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from raypipe.errors import UserError
from raypipe.storage import (
    StorageError,
    asked_again,
    open_file_system,
    refuse_credentials,
    split_options,
    statuses,
)

_SUFFIXES = """
264 265 3g2 3gp apng asf av1 avi divx dv f4v flv gif h264 h265 hevc ivf m2ts m2v m4v mjpeg mjpg mkv mov mp4
mpeg mpg mts mxf nut obu ogm ogv qt rm rmvb ts vob webm wmv y4m
"""
VIDEO_SUFFIXES = frozenset(_SUFFIXES.split())
"""File names that count as videos in a folder or a glob. A manifest may name any file."""

MANIFEST_SUFFIXES = frozenset({".csv", ".parquet", ".jsonl"})
MANIFEST_COLUMNS = ("path", "label", "group", "split", "video_id")


@dataclass(frozen=True, slots=True)
class Video:
    """One listed video. `size_bytes` and `modified_s` are None where there is no such file, or where that is
    not to be known."""

    video_id: str
    """The manifest's id, else the path relative to what was listed: stable when a folder moves."""
    path: str
    """Absolute local path, or a URI: of a remote file, or of a local one whose name is not valid text."""
    label: str | None = None
    group: str | None = None
    split: str | None = None
    size_bytes: int | None = None
    modified_s: float | None = None


@dataclass(frozen=True)
class Listing:
    """The videos of one input, and how many other files lay beside them."""

    videos: list[Video]
    ignored: int = 0


def local_path(address: str) -> str | None:
    """The path of a local file given as a path or as a file:// URI; None for a file elsewhere.

    >>> local_path("file:///clips/a%20b.mp4"), local_path("s3://bucket/a.mp4")
    ('/clips/a b.mp4', None)
    """
    if address.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(address.removeprefix("file://")))
    return None if "://" in address else address


def list_videos(source: str) -> Listing:
    """Every video of `source`, sorted by id. Raises UserError for an input that cannot be listed."""
    source = local_path(source) or source
    refuse_credentials(source, what="--input")
    if _suffix(source) in MANIFEST_SUFFIXES:
        listing = Listing(_read_manifest(source))
    elif "://" in source:
        listing = _list_uri(source)
    elif os.path.isdir(source):
        listing = _list_folder(Path(source))
    elif _is_glob(source):
        listing = _list_glob(source)
    else:
        what = "is a file, not a folder or manifest" if os.path.exists(source) else "does not exist"
        raise UserError(f"--input {source}: {what}; give a folder, a .csv/.parquet/.jsonl, a glob or a URI")
    if not listing.videos:
        raise UserError(f"--input {source}: no videos found; {_advice(listing.ignored)}")
    _refuse_duplicates(source, listing.videos)
    if all("://" not in video.path and video.size_bytes is None for video in listing.videos):
        raise UserError(
            f"--input {source}: none of its {len(listing.videos)} videos exists, for example "
            f"{listing.videos[0].path}; paths are relative to the manifest's folder"
        )
    return Listing(sorted(listing.videos, key=lambda video: video.video_id), listing.ignored)


def _suffix(source: str) -> str:
    return os.path.splitext(split_options(source)[0])[1].lower()


def _advice(ignored: int) -> str:
    if ignored:
        return f"the {ignored} files there have no video's suffix, name them in a manifest"
    return "name a folder, manifest, glob or URI that has some"


def _refuse_duplicates(source: str, videos: list[Video]) -> None:
    for field in ("video_id", "path"):
        values = sorted(getattr(video, field) for video in videos)
        if any(one == other for one, other in pairwise(values)):
            value, times = Counter(values).most_common(1)[0]
            name = "video_id" if field == "video_id" else "video"
            raise UserError(f"--input {source}: the {name} {value} is listed {times} times; list it once")


def _is_glob(source: str) -> bool:
    return any(character in source for character in "*?[")


def _is_video_name(path: str) -> bool:
    return os.path.splitext(path)[1].lstrip(".").lower() in VIDEO_SUFFIXES


def _local_video(path: str, video: Video) -> Video:
    """`video` as the local file at `path`, with its size and time where there is such a file."""
    path = os.path.abspath(path)
    named = path if path == _as_text(path) else Path(path).as_uri()
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return replace(video, path=named)
    return replace(video, path=named, size_bytes=status.st_size, modified_s=status.st_mtime)


# --- folders and globs ------------------------------------------------------------------------------


def _list_folder(root: Path) -> Listing:
    """Every video below `root`, also in folders elsewhere that links lead to; the first folder on the way to
    a file is its label."""

    def refuse(error: OSError) -> None:
        raise UserError(f"--input {root}: {error.filename} cannot be listed: {error.strerror}")

    home, followed = os.path.realpath(root), set()

    def is_elsewhere(link: str) -> bool:
        """Whether a link leads to what no other way does: not in `root`, around it, nor followed before."""
        target = os.path.realpath(link)
        if os.path.commonpath([home, target]) in (home, target) or target in followed:
            return False
        followed.add(target)
        return True

    videos, ignored = [], 0
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and (not os.path.islink(path := os.path.join(folder, name)) or is_elsewhere(path))
        )
        prefix = "" if folder == str(root) else f"{os.path.relpath(folder, root)}/"
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.startswith(".") or not _is_video_name(name):
                ignored += 1
                continue
            videos.append(_named_video(prefix + name, path))
    return Listing(videos, ignored)


def _list_glob(pattern: str) -> Listing:
    import glob

    paths = [p for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
    chosen = [p for p in paths if _is_video_name(p)]
    # Ids are relative to the part of the pattern that is no pattern.
    parts = Path(pattern).parts
    plain = next((i for i, part in enumerate(parts) if _is_glob(part)), len(parts))
    root = Path(*parts[:plain]) if plain else Path()
    videos = [_named_video(os.path.relpath(path, root), path) for path in chosen]
    return Listing(videos, len(paths) - len(chosen))


def _named_video(relative: str, path: str) -> Video:
    return _local_video(path, Video(_as_text(relative), path, label=_label_of(relative)))


def _label_of(relative: str) -> str | None:
    first, separator, _ = relative.partition("/")
    return sys.intern(_as_text(first)) if separator else None


def _as_text(name: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_uri(source: str) -> Listing:
    from pyarrow import fs

    try:
        system, root = open_file_system(source)
        entries = system.get_file_info(fs.FileSelector(root, recursive=True))
    except (OSError, ValueError) as error:
        raise UserError(f"--input {source}: cannot be listed: {' '.join(str(error).split())}") from None
    scheme, options = source.split("://")[0], split_options(source)[1]
    files = [entry for entry in entries if entry.is_file]
    videos = [
        Video(
            video_id=(relative := entry.path[len(root) :].lstrip("/")),
            path=f"{scheme}://{quote(entry.path)}{options}",
            label=_label_of(relative),
            size_bytes=entry.size,
            modified_s=entry.mtime_ns / 1e9 if entry.mtime_ns else None,
        )
        for entry in files
        if _is_video_name(entry.path)
    ]
    return Listing(videos, len(files) - len(videos))


# --- manifests ----------------------------------------------------------------------------------


def _read_manifest(source: str) -> list[Video]:
    rows = _manifest_rows(source)
    address, options = split_options(source)
    base, remote = os.path.dirname(address), "://" in source
    videos = []
    for number, row in enumerate(rows, start=1):
        name = row.get("path")
        if not name:
            raise UserError(f"--input {source}: row {number} has no path")
        video_id = row.get("video_id") or name
        label, group, split = (
            sys.intern(row[column]) if row.get(column) else None for column in ("label", "group", "split")
        )
        local = local_path(name)
        if local is None or (remote and not local.startswith("/")):
            path = name if local is None else f"{base}/{quote(name)}{options}"
            refuse_credentials(path, what=f"--input {source}: row {number}:")
            videos.append(Video(video_id, path, label, group, split))
        else:
            path = os.path.join(base, local)
            videos.append(_local_video(path, Video(video_id, path, label, group, split)))
    return _looked_up(source, videos)


def _looked_up(source: str, videos: list[Video]) -> list[Video]:
    """The videos, those in buckets with their size and time, so that changed ones are noticed. Pages of the
    web are not asked: many servers do not say."""
    remote = [video.path for video in videos if not video.path.startswith(("/", "file://", "http"))]
    try:
        known = statuses(remote)
    except StorageError as error:
        raise UserError(f"--input {source}: what it lists cannot be looked up: {error}") from None
    return [
        replace(video, size_bytes=status.st_size, modified_s=status.st_mtime_ns / 1e9)
        if (status := known.get(video.path))
        else video
        for video in videos
    ]


def _manifest_rows(source: str) -> Iterator[dict[str, str]]:
    from pyarrow import ArrowException, csv, fs, parquet

    try:
        if "://" in source:
            system, inner = open_file_system(source)
        else:
            system, inner = fs.LocalFileSystem(), source
        readers: dict[str, Callable[[Any], Any]] = {
            # Every column as text: a label 01 must not become the number 1.
            ".csv": lambda file: csv.read_csv(file, convert_options=_all_text(_csv_columns(system, inner))),
            ".parquet": parquet.read_table,
            ".jsonl": _read_jsonl,
        }

        def read() -> Any:
            with system.open_input_file(inner) as file:
                return readers[_suffix(source)](file)

        table = asked_again(read)
    except FileNotFoundError:
        raise UserError(f"--input {source}: no such file") from None
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"--input {source}: cannot be read: {' '.join(str(error).split())}") from None
    if "path" not in table.column_names:
        found = ", ".join(table.column_names)
        raise UserError(f"--input {source}: has no column path; its columns are: {found}")
    columns = [column for column in MANIFEST_COLUMNS if column in table.column_names]
    for column in columns:
        if table.column_names.count(column) > 1:
            raise UserError(f"--input {source}: has more than one column {column}")
    return (
        {k: str(v).strip() for k, v in row.items() if v is not None}
        for batch in table.select(columns).to_batches(max_chunksize=1024)
        for row in batch.to_pylist()
    )


def _csv_columns(system: Any, inner: str) -> list[str]:
    from pyarrow import csv

    with system.open_input_file(inner) as file:
        return list(csv.open_csv(file).schema.names)


def _all_text(columns: list[str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    return csv.ConvertOptions(column_types={name: pa.string() for name in columns})


def _read_jsonl(file: Any) -> Any:
    """Every field as text. Arrow's own reader would turn a label that looks like a date into one."""
    import pyarrow as pa

    rows = []
    for number, line in enumerate(file.read().split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append({name: v if v is None else str(v) for name, v in json.loads(line).items()})
            except (ValueError, AttributeError):
                raise ValueError(f"line {number} is not a JSON object") from None
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})
