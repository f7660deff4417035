"""Ways from videos to features, each doing the same work: a network's vectors of 16 frames of each video.

python benchmarks/ways.py bare job.json

The job says which videos, how many frames of which size, and on how many cores. A way prints a line of JSON:
how many videos gave features, the seconds until the first was begun, those after, and CPU seconds by stage.
`benchmarks/extract.py` runs them and measures them from outside.
"""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BACKBONE = "efficientnet_lite0"
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """What a way is given."""

    videos: list[str]
    duration_s: float
    """Of a video, roughly: two of the peers sample by time."""
    frames: int
    size: int
    view: str
    cores: int
    folder: str
    """Where it may write."""
    peers: str | None
    """Folder with packages that raypipe does not need."""


@dataclass(frozen=True)
class Done:
    """What a way says of itself."""

    videos: int
    start_s: float
    """Until the first video was begun: processes, imports, the network."""
    work_s: float
    decode_cpu_s: float | None = None
    embed_cpu_s: float | None = None


# --- raypipe ------------------------------------------------------------------------------------------


def raypipe(job: Job) -> Done:
    """The command, as a user runs it."""
    summary = _command(job, "--frames", str(job.frames), "--frame-size", str(job.size), "--view", job.view)
    return Done(
        videos=summary["outcomes"].get("ok", 0) + summary["outcomes"].get("partial", 0),
        start_s=summary["start_s"] or 0.0,
        work_s=summary["wall_s"] - (summary["start_s"] or 0.0),
        decode_cpu_s=summary["cpu_s"].get("decode"),
        embed_cpu_s=summary["cpu_s"].get("embed"),
    )


def _command(job: Job, *flags: str) -> dict[str, Any]:
    manifest, output = Path(job.folder, "videos.csv"), Path(job.folder, "features")
    manifest.write_text("\n".join(["path", *job.videos]))
    arguments = ["--input", str(manifest), "--output", str(output), "--cpus", str(job.cores), *flags]
    subprocess.run([sys.executable, "-m", "raypipe.extract", *arguments], check=True)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


# --- processes without Ray ----------------------------------------------------------------------------


def bare(job: Job) -> Done:
    """What the hardware allows: raypipe's decoder and network in a process per core, nothing around them."""
    return _in_processes(_smart_decoder, job)


def torchcodec(job: Job) -> Done:
    """torchcodec in a process per core."""
    return _in_processes(_torchcodec_decoder, job)


def decord(job: Job) -> Done:
    """decord in a process per core."""
    return _in_processes(_decord_decoder, job)


Decoder = Callable[[str], Pictures]


def _smart_decoder(job: Job) -> Decoder:
    from raypipe.decode import ClipRequest, DecodedClip, decode_clips

    request = ClipRequest(
        frames=job.frames,
        size=job.size,
        view=job.view,  # type: ignore[arg-type]
        motion_gap_s=0.0667,
        min_frames=1,
        max_pixels=1 << 26,
        max_packets=1 << 21,
        max_duration_s=1e6,
    )

    def decode(path: str) -> Pictures:
        (clip,) = decode_clips(path, request)
        if not isinstance(clip, DecodedClip):
            raise ValueError(clip.message)
        return clip.pictures

    return decode


def _torchcodec_decoder(job: Job) -> Decoder:
    import cv2
    from torchcodec.decoders import VideoDecoder

    def decode(path: str) -> Pictures:
        video = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="exact")
        frames = video.get_frames_at(_spread(len(video), job.frames).tolist()).data.numpy()
        return _resized(frames, job.size, cv2.resize, cv2.INTER_AREA)

    cv2.setNumThreads(1)
    return decode


def _decord_decoder(job: Job) -> Decoder:
    import cv2
    from decord import VideoReader

    def decode(path: str) -> Pictures:
        video = VideoReader(path, num_threads=1)
        frames = video.get_batch(_spread(len(video), job.frames).tolist()).asnumpy()
        return _resized(frames, job.size, cv2.resize, cv2.INTER_AREA)

    cv2.setNumThreads(1)
    return decode


DECODERS = {"bare": _smart_decoder, "torchcodec": _torchcodec_decoder, "decord": _decord_decoder}


def _spread(total: int, count: int) -> NDArray[np.int64]:
    from raypipe.sampling import uniform_positions

    return uniform_positions(total, count)


def _resized(frames: Iterable[Pictures], size: int, resize: Callable[..., Pictures], how: int) -> Pictures:
    return np.stack([resize(frame, (size, size), interpolation=how) for frame in frames])


def _in_processes(decoder: Callable[[Job], Decoder], job: Job) -> Done:
    started_s = time.monotonic()
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(job.cores + 1)
    with context.Pool(job.cores, _load, (decoder, job, ready)) as pool:
        ready.wait()
        begun_s = time.monotonic()
        costs = [cost for cost in pool.imap_unordered(_one, job.videos) if cost]
        work_s = time.monotonic() - begun_s
    decode, embed = np.sum(costs, axis=0).tolist() if costs else (0.0, 0.0)
    return Done(len(costs), begun_s - started_s, work_s, decode, embed)


_loaded: dict[str, Any] = {}
"""Of a process of the pool: its decoder and its network."""


def _load(decoder: Callable[[Job], Decoder], job: Job, ready: Any) -> None:
    sys.path.extend([job.peers] if job.peers else [])
    from raypipe.backbones import load_backbone

    _loaded.update(decode=decoder(job), embed=load_backbone(BACKBONE).network().session())
    _loaded["embed"](np.zeros((job.frames, job.size, job.size, 3), np.uint8))
    ready.wait()


def _one(path: str) -> tuple[float, float] | None:
    """CPU seconds that decoding and embedding a video took."""
    started_s = time.process_time()
    try:
        pictures = _loaded["decode"](path)
    except Exception as error:
        print(f"{path}: {error}", file=sys.stderr)
        return None
    decoded_s = time.process_time()
    np.asarray(_loaded["embed"](pictures), np.float16)
    return decoded_s - started_s, time.process_time() - decoded_s


# --- the classic loop ---------------------------------------------------------------------------------


def classic(job: Job) -> Done:
    """OpenCV reads all frames of one video after another, Keras predicts on those chosen."""
    started_s = time.monotonic()
    import cv2

    network = _keras_lite0(job.size)
    network.predict(np.zeros((job.frames, job.size, job.size, 3), np.float32), verbose=0)
    begun_s = time.monotonic()
    decode_cpu_s = embed_cpu_s = 0.0
    done = 0
    for path in job.videos:
        spent_s = time.process_time()
        video, frames = cv2.VideoCapture(path), []
        while True:
            there, frame = video.read()
            if not there:
                break
            frames.append(cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), (job.size, job.size)))
        video.release()
        decoded_s = time.process_time()
        if frames:
            chosen = np.stack([frames[i] for i in _spread(len(frames), job.frames)]).astype(np.float32)
            network.predict(chosen, verbose=0)
            done += 1
        decode_cpu_s += decoded_s - spent_s
        embed_cpu_s += time.process_time() - decoded_s
    return Done(done, begun_s - started_s, time.monotonic() - begun_s, decode_cpu_s, embed_cpu_s)


def _keras_lite0(size: int) -> Any:
    """The same network as a Keras model, with the same weights."""
    import io

    import keras
    from keras import layers

    from raypipe.backbones import (
        BATCH_NORM_EPSILON,
        efficientnet_lite,
        lite_blocks,
        read_legacy_pth,
    )

    weights = read_legacy_pth(io.BytesIO(efficientnet_lite(BACKBONE).weights_path.read_bytes()))

    def convolution(x: Any, conv: str, norm: str, *, stride: int = 1, relu: bool = True) -> Any:
        kernel = weights[f"{conv}.weight"].transpose(2, 3, 1, 0)  # [k, k, I, O]
        if kernel.shape[2] == 1 and kernel.shape[0] > 1:
            layer = layers.DepthwiseConv2D(kernel.shape[0], stride, "same", use_bias=False)
            kernel = kernel.transpose(0, 1, 3, 2)
        else:
            layer = layers.Conv2D(kernel.shape[3], kernel.shape[0], stride, "same", use_bias=False)
        normalize = layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON)
        x = normalize(layer(x))
        layer.set_weights([kernel])
        parts = ("weight", "bias", "running_mean", "running_var")
        normalize.set_weights([weights[f"{norm}.{part}"] for part in parts])
        return layers.ReLU(6.0)(x) if relu else x

    inputs = keras.Input((size, size, 3))
    x = convolution(layers.Rescaling(1 / 128, -127 / 128)(inputs), "_conv_stem", "_bn0", stride=2)
    for block in lite_blocks(weights):
        prefix, start = block.prefix, x
        if block.expands:
            x = convolution(x, f"{prefix}._expand_conv", f"{prefix}._bn0")
        x = convolution(x, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=block.stride)
        x = convolution(x, f"{prefix}._project_conv", f"{prefix}._bn2", relu=False)
        x = layers.Add()([x, start]) if block.adds_input else x
    x = convolution(x, "_conv_head", "_bn1")
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


# --- other libraries' pipelines -----------------------------------------------------------------------


class Embed:
    """For pipelines that call a class with batches."""

    def __init__(self, column: str) -> None:
        from raypipe.backbones import load_backbone

        self._embedder, self._column = load_backbone(BACKBONE).network().session(), column

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        features = self._embedder(np.stack(list(batch.pop(self._column))))
        return batch | {"features": features.astype(np.float16)}


def read_videos(job: Job) -> Done:
    """Ray Data's own reader, frames resized and thinned out by it, and a pool of actors with the network."""
    import os

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent), job.peers or ""]
    )
    started_s = time.monotonic()
    import logging

    import ray
    import ray.data

    ray.init(address="local", num_cpus=job.cores, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    begun_s = time.monotonic()
    rate = max(1, round(job.frames / job.duration_s))
    rows = (
        ray.data.read_videos(job.videos, include_paths=True, fps=rate, resize=(job.size, job.size))
        .map_batches(
            Embed,
            fn_constructor_args=("frame",),
            batch_size=job.frames,
            num_cpus=0.5,
            compute=ray.data.ActorPoolStrategy(size=job.cores),
        )
        .select_columns(["path"])
        .iter_rows()
    )
    done = len({row["path"] for row in rows})
    return Done(done, begun_s - started_s, time.monotonic() - begun_s)


def daft(job: Job) -> Done:
    """Daft's reader of video frames, sampled and resized by it, and the network as a function of batches."""
    started_s = time.monotonic()
    import daft as engine
    from daft import DataType, col

    @engine.cls(max_concurrency=job.cores, use_process=True)
    class Network:
        def __init__(self) -> None:
            self._embed = Embed("frame")

        @engine.method.batch(return_dtype=DataType.binary(), batch_size=job.frames)
        def features(self, frames: Any) -> Any:
            vectors = self._embed({"frame": frames.to_pylist()})["features"]
            return [vector.tobytes() for vector in vectors]

    begun_s = time.monotonic()
    frames = engine.read_video_frames(
        job.videos,
        image_height=job.size,
        image_width=job.size,
        sample_interval_seconds=job.duration_s / job.frames,
    )
    rows = frames.select(col("path"), Network().features(col("data")).alias("features")).to_pydict()
    return Done(len(set(rows["path"])), begun_s - started_s, time.monotonic() - begun_s)


WAYS: dict[str, Callable[[Job], Done]] = {
    way.__name__: way for way in (raypipe, bare, classic, torchcodec, decord, read_videos, daft)
}
PEERS = {"torchcodec": "torchcodec", "decord": "decord", "read_videos": "decord", "daft": "daft"}
"""The package that a way needs and raypipe does not."""


def main(way: str, job_file: str) -> None:
    job = Job(**json.loads(Path(job_file).read_text()))
    sys.path.extend([job.peers] if job.peers else [])
    print(json.dumps(asdict(WAYS[way](job))))


if __name__ == "__main__":
    main(*sys.argv[1:])
