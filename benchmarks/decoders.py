"""Decoding alone, file by file: raypipe's decoder against torchcodec's, in CPU seconds.

python benchmarks/decoders.py --videos ../shared/wild ../shared/fights --clips 20 --peers peers

Each file is read by both in turn, `--rounds` times, in one process and one thread; the table has the medians,
the files on which raypipe does worst first. How to install torchcodec: `benchmarks/extract.py --help`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ways import DECODERS, Decoder, Job

from raypipe.console import text_table


def cpu_s(decode: Decoder, path: str) -> float | None:
    """None where the file gives nothing."""
    started_s = time.process_time()
    try:
        decode(path)
    except Exception:  # each library has its own
        return None
    return time.process_time() - started_s


def compare(files: list[Path], decoders: dict[str, Decoder], rounds: int) -> list[list[Any]]:
    """For each file its name, and the median CPU seconds of each decoder."""
    rows = []
    for file in files:
        costs = [{name: cpu_s(decode, str(file)) for name, decode in decoders.items()} for _ in range(rounds)]
        rows.append([file.name, *(middle([cost[name] for cost in costs]) for name in decoders)])
    return rows


def middle(values: list[float | None]) -> float | None:
    return None if None in values else statistics.median(value for value in values if value is not None)


def shown(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, nargs="+", default=[Path("../shared/wild")])
    parser.add_argument("--clips", type=int, default=20, help="of each folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=None)
    arguments = parser.parse_args()
    sys.path.extend([str(arguments.peers)] if arguments.peers else [])
    job = Job([], 2.0, frames=16, size=224, view="rgb", cores=1, folder="", peers=None)
    try:
        decoders = {name: DECODERS[name](job) for name in ("bare", "torchcodec")}
    except (ImportError, OSError, RuntimeError) as error:
        raise SystemExit(f"torchcodec does not load: {str(error).splitlines()[0]}") from None
    files = []
    for folder in arguments.videos:
        found = sorted(path for path in folder.rglob("*") if path.suffix not in (".csv", ".md", "", ".txt"))
        files += found[:: max(1, len(found) // arguments.clips)]
    rows = compare(files, decoders, arguments.rounds)
    both = [row for row in rows if None not in row]
    both.sort(key=lambda row: row[2] / row[1])
    lines = [["file", "raypipe, ms", "torchcodec, ms", "torchcodec takes"]]
    lines += [[name, f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", f"{b / a:.2f} x"] for name, a, b in both]
    lines += [
        [row[0], *(shown(v, lambda s: f"{s * 1e3:.1f}") for v in row[1:]), ""] for row in rows if None in row
    ]
    print(text_table(lines))
    ratios = [b / a for _, a, b in both]
    print(
        f"{len(both)} files that both read: torchcodec takes {statistics.median(ratios):.2f} times as long "
        f"(median), {min(ratios):.2f} at least; raypipe was slower on {sum(ratio < 1 for ratio in ratios)}"
    )


if __name__ == "__main__":
    main()
