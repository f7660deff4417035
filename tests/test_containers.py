import ctypes
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from clips import write_video
from s3 import Bucket
from test_decode import REQUEST, decode, failure


def test_copies_have_one_digest_and_other_files_another(clip_path: Path, tmp_path: Path) -> None:
    copy = shutil.copy(clip_path, tmp_path / "copy.mp4")
    other = write_video(tmp_path / "other.mp4", frames=99)
    digests = [decode(path).content_digest for path in (clip_path, Path(copy), other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 16


# --- where files lie --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"a\xff\xfe.mp4", b"a\nb %41#?.mp4", b"no suffix"])
def test_odd_names(name: bytes, clip_path: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    shutil.copy(clip_path, path)
    expected = decode(clip_path).pictures
    np.testing.assert_array_equal(decode(path).pictures, expected)
    np.testing.assert_array_equal(decode(path.as_uri()).pictures, expected)


@pytest.mark.parametrize("name", ["a b.mp4", "raw.h264"])
def test_a_video_in_a_bucket(name: str, clip_path: Path, tmp_path: Path) -> None:
    path = clip_path if name.endswith("mp4") else write_video(tmp_path / name)
    bucket = Bucket().put({name: path.read_bytes()})
    clip = decode(bucket.uri(name.replace(" ", "%20")))
    np.testing.assert_array_equal(clip.pictures, decode(path).pictures)
    assert clip.content_digest == decode(path).content_digest
    assert failure(bucket.uri("none.mp4"))[0] == "missing"
    assert failure("s3://bucket/not a uri.mp4")[0] == "unreadable"


# --- files that are no videos -----------------------------------------------------------------------


def write_text(path: Path) -> None:
    path.write_text("This is not a video.\n" * 100)


def write_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(10_000))


def write_sound(path: Path, *, cover: bool = False) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "rgb24"
            picture.disposition = Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            container.mux([*picture.encode(image), *picture.encode(None)])
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 8000
        container.mux([*sound.encode(silence), *sound.encode(None)])


@pytest.mark.parametrize(
    ("make", "reason", "message"),
    [
        (lambda path: None, "missing", "no such file"),
        (lambda path: path.mkdir(), "unreadable", "not a regular file"),
        (lambda path: os.mkfifo(path), "unreadable", "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "unreadable", "not a regular file"),
        (lambda path: path.symlink_to(path), "unreadable", "Too many levels of symbolic links"),
        (lambda path: path.touch(), "not_video", "the file is empty"),
        (write_text, "not_video", "Invalid data found when processing input"),
        (write_noise, "not_video", "Invalid data found when processing input"),
        (write_sound, "not_video", "no video stream in this mov,mp4,m4a,3gp,3g2,mj2 file"),
        (lambda path: write_sound(path, cover=True), "not_video", "its only picture is cover art"),
    ],
    ids=["missing", "folder", "fifo", "device", "loop", "empty", "text", "noise", "sound", "cover"],
)
@pytest.mark.timeout(20)
def test_a_file_that_is_no_video(
    make: Callable[[Path], object], reason: str, message: str, tmp_path: Path
) -> None:
    make(tmp_path / "clip.mp4")
    for path in (tmp_path / "clip.mp4", (tmp_path / "clip.mp4").as_uri()):
        found, said = failure(path)
        assert found == reason and said.startswith(message)


def test_larger_than_allowed(clip_path: Path) -> None:
    pixels, packets = replace(REQUEST, max_pixels=128 * 96 - 1), replace(REQUEST, max_packets=99)
    duration = replace(REQUEST, max_duration_s=3.2)
    assert failure(clip_path, pixels) == ("too_large", "128x96 pixels are more than --max-pixels 12287")
    assert failure(clip_path, packets) == ("too_large", "more than --max-packets 99 frames")
    assert failure(clip_path, duration) == (
        "too_large",
        "its frames span 3.3 s, more than --max-duration-s 3.2",
    )
    decode(clip_path, replace(REQUEST, max_pixels=128 * 96, max_packets=100, max_duration_s=3.34))


SCRIPTS = {
    "ffconcat": "ffconcat version 1.0\nfile other.mp4\n",
    "ffconcat of an address": "ffconcat version 1.0\nfile {folder}/other.mp4\nfile http://{host}/other.mp4\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nother.mp4\n#EXT-X-ENDLIST\n",
    "HLS of an address": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nhttp://{host}/o.ts\n#EXT-X-ENDLIST\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>other.mp4</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".ffconcat", ".mpd"])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.timeout(20)
def test_a_script_reads_nothing(
    script: str, suffix: str, clip_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.mp4"
    shutil.copy(clip_path, other)
    with Watch(other) as watch, Listener() as listener:
        path = tmp_path / f"clip{suffix}"
        path.write_text(SCRIPTS[script].format(folder=tmp_path, host=listener.address))
        assert failure(path)[0] == "not_video"
        assert not watch.opened() and not listener.called()


def test_the_watch_and_the_listener_would_notice(tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    other.write_text("x")
    with Watch(other) as watch, Listener() as listener:
        assert not watch.opened() and not listener.called()
        other.read_text()
        socket.create_connection(listener.socket.getsockname()).close()
        assert watch.opened() and listener.called()


class Watch:
    """Tells whether a file was opened, by this process or its libraries (inotify)."""

    IN_OPEN = 0x20

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None)
        self._queue = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(self._queue, os.fsencode(path), self.IN_OPEN)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._queue)

    def opened(self) -> bool:
        try:
            return bool(os.read(self._queue, 4096))
        except BlockingIOError:
            return False


class Listener:
    """A server that tells whether anybody called."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.address = "{}:{}".format(*self.socket.getsockname())

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def called(self) -> bool:
        try:
            self.socket.accept()[0].close()
        except BlockingIOError:
            return False
        return True
