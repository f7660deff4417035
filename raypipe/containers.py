"""A video file, opened so that it can do no harm: a regular file's bytes as a container, and its stream.

Other files and connections are never opened, whatever a playlist inside the file says, and a file that
could hang or flood the reader is refused before a frame of it is decoded.

DecodeError     a file that gives no clip, with a reason from `Reason`
"""

import hashlib
import os
import stat
from typing import BinaryIO, Literal, NoReturn, cast

import av
import av.error
from av.container import InputContainer
from av.video.stream import VideoStream

from raypipe.remote_file import open_remote
from raypipe.videos import local_path

Reason = Literal[
    "missing",
    "unreadable",
    "not_video",
    "no_frames",
    "damaged",
    "timeout",
    "crash",
    "out_of_memory",
    "too_large",
]


class DecodeError(Exception):
    """This file gives no clip: `reason` is from the closed list, the text is the decoder's own."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def open_regular(path: str) -> BinaryIO:
    """The file's bytes. Only a regular file is opened: a FIFO or a device would hang the reader."""
    try:
        local = local_path(path)
        if local is None:
            remote = open_remote(path)
            if remote.seek(0, os.SEEK_END) == 0:
                raise DecodeError("not_video", "the file is empty")
            return cast(BinaryIO, remote)
        # O_NONBLOCK: opening a FIFO that nobody writes to returns at once instead of never.
        descriptor = os.open(local, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DecodeError("missing", "no such file") from None
    except (OSError, ValueError) as error:
        raise DecodeError("unreadable", words(error)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        os.close(descriptor)
        if stat.S_ISREG(status.st_mode):
            raise DecodeError("not_video", "the file is empty")
        raise DecodeError("unreadable", "not a regular file")
    return os.fdopen(descriptor, "rb")


DIGEST_BYTES = 1 << 16


def content_digest(file: BinaryIO) -> str:
    """16 hex digits from the size and both ends of a file; costs two small reads, however large it is."""
    size = file.seek(0, os.SEEK_END)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    for start in (0, max(0, size - DIGEST_BYTES)):
        file.seek(start)
        digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()[:16]


class _NamedFile:
    """Gives PyAV a plain name: raw streams are recognised by their suffix, odd bytes break it."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        suffix = os.path.splitext(path.partition("?")[0] if "://" in path else path)[1]
        self.name = f"video{suffix}" if suffix.isascii() and suffix[1:].isalnum() else "video"
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _refuse_other_files(url: str, *_: object) -> NoReturn:
    raise DecodeError("not_video", "the file names other files or addresses instead of holding a video")


# Scripts and playlists name other files; what is left of libav's formats holds its video itself.
SCRIPT_FORMATS = {"concat", "hls", "dash", "imf", "sdp", "rtsp", "image2", "lavfi", "webm_dash_manifest"}
VIDEO_FORMATS = sorted(av.formats_available - SCRIPT_FORMATS)
READ_BUFFER_BYTES = 1 << 18


def open_container(file: BinaryIO, path: str) -> InputContainer:
    """The container in `file`. Nothing else is opened, whatever the content asks for."""
    try:
        container: InputContainer = av.open(  # type: ignore[assignment]  # mode "r"
            _NamedFile(file, path),
            options={"protocol_whitelist": "none", "format_whitelist": ",".join(VIDEO_FORMATS)},
            metadata_errors="replace",
            buffer_size=READ_BUFFER_BYTES,
            io_open=_refuse_other_files,
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError("not_video", words(error)) from None
    return container


MARGIN_PIXELS = 1 << 16
"""More than a decoder adds around a small picture."""


def video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    """The container's main video stream; cover art is not one."""
    stream = container.streams.best("video")
    if stream is None or not isinstance(stream, VideoStream):
        raise DecodeError("not_video", f"no video stream in this {container.format.name} file")
    if av.stream.Disposition.attached_pic in stream.disposition:
        raise DecodeError("not_video", "its only picture is cover art")
    if stream.codec_context is None:
        raise DecodeError("not_video", "no decoder for its codec")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_pixels:
        raise DecodeError("too_large", f"{width}x{height} pixels are more than --max-pixels {max_pixels}")
    # The size may change midway, and then nothing huge is to be allocated. Decoders count their margins
    # too, so exactly this limit is for frames, as they come out.
    stream.codec_context.options = {"max_pixels": str(2 * max_pixels + MARGIN_PIXELS)}
    # One process per core: codec threads gain nothing. dav1d starts its own unless their number is 1; they
    # log through Python, whose lock is held by who waits for them.
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def words(error: BaseException) -> str:
    """What the library says. That memory ran out says nothing about the file, so that error goes on."""
    if isinstance(error, MemoryError):
        raise error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
