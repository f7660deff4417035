"""What extracting so many videos takes, and what is in its way first: a model of the measured costs.

python benchmarks/cost.py --videos 1e6 1e9 --cores 1000

Every default was measured on the machine that README.md names, for two-second clips, both views. What was not
measured has no default: a GPU's pictures a second, a bucket's bandwidth.
"""

import argparse
from dataclasses import dataclass

from raypipe.console import text_table


@dataclass(frozen=True)
class Costs:
    """Of one video."""

    decode_s: float
    """CPU seconds."""
    pictures: int
    embed_s: float
    """CPU seconds a picture."""
    overhead_s: float
    """CPU seconds of Ray's and raypipe's own on the cores that work."""
    video_mb: float
    """Read from disk or bucket."""
    picture_mb: float
    row_mb: float
    """Written to the store."""
    driver_s: float
    """CPU seconds of the driver, which is one process: listing, planning, committing."""
    tally_s: float
    """CPU seconds of the tally, which is one process too."""
    driver_kb: float
    """Memory that the driver keeps of it."""


@dataclass(frozen=True)
class Means:
    """What there is; what is None is not limited, or not there."""

    cores: int
    gpus: int = 0
    pictures_per_gpu_s: float | None = None
    bucket_mb_s: float | None = None
    store_mb_s: float | None = None
    """What Ray's object store takes in on all nodes together; only pictures for GPUs pass through it."""


def rates(costs: Costs, means: Means) -> dict[str, float]:
    """Videos a second that each part could do if nothing else were in the way.

    >>> costs = Costs(0.1, 10, 0.01, 0.0, 1.0, 0.15, 0.1, 1e-4, 1e-3, 3.0)
    >>> rates(costs, Means(cores=100))
    {'cores': 500.0, 'driver': 10000.0, 'tally': 1000.0}
    >>> rates(costs, Means(cores=100, gpus=1, pictures_per_gpu_s=4000, bucket_mb_s=900))["bucket"]
    900.0
    """
    on_cores_s = costs.decode_s + costs.overhead_s + (0 if means.gpus else costs.pictures * costs.embed_s)
    found = {"cores": means.cores / on_cores_s}
    if means.gpus and means.pictures_per_gpu_s:
        found["GPUs"] = means.gpus * means.pictures_per_gpu_s / costs.pictures
    if means.gpus and means.store_mb_s:
        found["object store"] = means.store_mb_s / (costs.pictures * costs.picture_mb)
    if means.bucket_mb_s:
        found["bucket"] = means.bucket_mb_s / costs.video_mb
    return found | {"driver": 1 / costs.driver_s, "tally": 1 / costs.tally_s}


def plan(videos: float, costs: Costs, means: Means) -> list[str]:
    """A line of the table: so many videos with these means."""
    possible = rates(costs, means)
    first = min(possible, key=lambda name: possible[name])
    hours = videos / possible[first] / 3600
    return [
        f"{videos:,.0f}",
        f"{means.cores:,}",
        f"{means.gpus:,}",
        first,
        f"{possible[first]:,.0f}",
        f"{hours:,.1f} h" if hours < 72 else f"{hours / 24:,.0f} days",
        f"{videos * costs.video_mb / 1e6:,.2f}",
        f"{possible[first] * costs.video_mb:,.0f}",
        f"{videos * costs.row_mb / 1e6:,.3f}",
        f"{videos * costs.driver_kb / 1e6:,.1f}",
    ]


HEADER = [
    "videos",
    "cores",
    "GPUs",
    "first in the way",
    "videos/s",
    "takes",
    "TB read",
    "MB/s read",
    "TB stored",
    "driver, GB",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=float, nargs="+", default=[1e6, 1e9])
    parser.add_argument("--cores", type=int, nargs="+", default=[2, 64, 1000, 10000])
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--pictures-per-gpu-s", type=float, default=None)
    parser.add_argument("--bucket-mb-s", type=float, default=None)
    parser.add_argument("--store-mb-s", type=float, default=None)
    for name, value in MEASURED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    costs = Costs(**{name: given[name] for name in MEASURED})
    lines = [HEADER]
    for videos in given["videos"]:
        for cores in given["cores"]:
            means = Means(
                cores=cores,
                gpus=given["gpus"],
                pictures_per_gpu_s=given["pictures_per_gpu_s"],
                bucket_mb_s=given["bucket_mb_s"],
                store_mb_s=given["store_mb_s"],
            )
            lines.append(plan(videos, costs, means))
    print(text_table(lines))


MEASURED = {
    "decode_s": 0.0706,
    "pictures": 32,
    "embed_s": 0.0086,
    "overhead_s": 0.036,
    "video_mb": 0.323,
    "picture_mb": 0.1505,
    "row_mb": 0.066,
    "driver_s": 0.00003,
    "tally_s": 0.0023,
    "driver_kb": 0.5,
}

if __name__ == "__main__":
    main()
