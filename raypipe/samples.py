"""The built-in sample clips: 64 small drawn videos, `scuffle` or `stroll`, for a first run without any data.

A clip is planned (`plan_samples`), drawn (`draw_clip`, by figures.py), encoded (`encode`) and written
(`make_samples`).
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np

from raypipe.figures import Frame, draw_frames
from raypipe.files import write_atomically

T = TypeVar("T")

COLUMNS = ("path", "label", "group")
SCUFFLES, STROLLS = 50, 14
GROUP_CLIPS = (2,) * 4 + (3,) * 8 + (4,) * 8
"""Clips in each of the 20 groups."""
CUT_CLIP, TEXT_CLIP = "broken_cut.mp4", "broken_text.mp4"
"""The two deliberately broken files, both scuffles: one lacks its index, one is not a video at all."""
SIZES = ((320, 240), (426, 240), (240, 320), (480, 270))
RATES = (15, 24, 25, 30)


class Encoding(NamedTuple):
    """What PyAV is told for one codec."""

    encoder: str
    container: str
    extension: str
    bit_rate: int
    """Bits per second; 0 where the encoder goes by quality."""
    options: dict[str, str]


_FAST_VPX = {"deadline": "realtime", "cpu-used": "8"}
_FAST_X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:bframes=0:rc-lookahead=1"}
ENCODINGS = {
    "h264": Encoding("libx264", "mp4", "mp4", 0, {"preset": "superfast"}),
    "mpeg4": Encoding("mpeg4", "avi", "avi", 900_000, {}),
    "vp8": Encoding("libvpx", "webm", "webm", 700_000, _FAST_VPX | {"cpu-used": "16"}),
    "vp9": Encoding("libvpx-vp9", "webm", "webm", 500_000, _FAST_VPX),
    "hevc": Encoding("libx265", "matroska", "mkv", 0, _FAST_X265),
    "mjpeg": Encoding("mjpeg", "mov", "mov", 1_200_000, {}),
}


@dataclass(frozen=True)
class ClipSpec:
    """One clip to be drawn: all that its pixels depend on."""

    name: str
    """File name in the folder of samples; with the seed in it, so that two seeds' clips never mix."""
    label: str
    """`scuffle` or `stroll`."""
    group: int
    """The scene it is filmed in: background and clothes."""
    size: tuple[int, int]
    """Width and height in pixels."""
    fps: int
    frames: int
    codec: str
    """A key of `ENCODINGS`."""
    seed: int
    number: int
    """The clip's place in the plan: with `seed` it fixes every random choice."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers for one purpose; no purpose uses up another's, and none depends on the label."""
        number = self.group if purpose == "scene" else self.number
        return np.random.default_rng((self.seed, number, *purpose.encode()))


def make_samples(folder: Path, specs: Sequence[ClipSpec] | None = None) -> Path:
    """Writes the clips (default: those of seed 0) and `labels.csv` into `folder`; the manifest's path.

    The manifest is written last: where it exists nothing is done, and where a run was broken off, the next
    one adds what is missing.
    """
    manifest = folder / "labels.csv"
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    specs = plan_samples(0) if specs is None else specs
    for spec in specs:
        if not (folder / spec.name).exists():
            write_atomically(folder / spec.name, _contents(spec))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((spec.name, spec.label, f"scene{spec.group:02d}") for spec in specs)
    write_atomically(manifest, table.getvalue().encode())
    return manifest


def plan_samples(seed: int) -> list[ClipSpec]:
    """The 64 clips of `seed`; both classes are dealt the same mix of sizes, rates, lengths and codecs."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(GROUP_CLIPS)), GROUP_CLIPS))
    mixed = rng.permutation(len(GROUP_CLIPS))[:STROLLS]  # the groups that hold a stroll, one each
    strolls = np.array([rng.choice(np.flatnonzero(groups == group)) for group in mixed])
    scuffles = rng.permutation(np.setdiff1d(np.arange(len(groups)), strolls))
    specs = []
    for label, numbers, broken in (("scuffle", scuffles, (CUT_CLIP, TEXT_CLIP)), ("stroll", strolls, ())):
        count = len(numbers)
        sizes, rates = _deal(SIZES, count, rng), _deal(RATES, count, rng)
        durations_s = rng.permutation(np.linspace(1.5, 3.0, count)).tolist()
        codecs = ["h264"] * len(broken) + _deal(tuple(ENCODINGS), count - len(broken), rng)
        for i, number in enumerate(numbers.tolist()):
            name = f"seed{seed}_clip{number:02d}.{ENCODINGS[codecs[i]].extension}"
            spec = ClipSpec(
                name=broken[i] if i < len(broken) else name,
                label=label,
                group=int(groups[number]),
                size=sizes[i],
                fps=rates[i],
                frames=round(durations_s[i] * rates[i]),
                codec=codecs[i],
                seed=seed,
                number=number,
            )
            specs.append(spec)
    return sorted(specs, key=lambda spec: spec.number)


def draw_clip(spec: ClipSpec) -> Iterator[Frame]:
    """The frames of a clip, each uint8 [H, W, 3] RGB, drawn one at a time."""
    scuffle = spec.label == "scuffle"
    return draw_frames(spec.size, frames=spec.frames, fps=spec.fps, scuffle=scuffle, rng=spec.rng)


def encode(spec: ClipSpec, frames: Iterable[Frame]) -> bytes:
    """The video file of `frames` (uint8 [H, W, 3] RGB) in the codec and at the rate of `spec`."""
    encoding, file = ENCODINGS[spec.codec], io.BytesIO()
    with av.open(file, "w", format=encoding.container, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(encoding.encoder, rate=spec.fps, options=encoding.options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = spec.size
        stream.pix_fmt = "yuvj420p" if spec.codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        if encoding.bit_rate:
            stream.bit_rate = encoding.bit_rate
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _contents(spec: ClipSpec) -> bytes:
    if spec.name == TEXT_CLIP:
        return b"This is not a video.\n"
    data = encode(spec, draw_clip(spec))
    return data[: len(data) // 2] if spec.name == CUT_CLIP else data  # an MP4's index is at its end


def _deal(kinds: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """`count` values in random order, each kind as often as any other (give or take one)."""
    order = rng.permutation(np.resize(rng.permutation(len(kinds)), count))
    return [kinds[i] for i in order]
