import os
from pathlib import Path

import pytest
from clips import write_video
from hypothesis import settings

# The same cases each time, and a busy machine is no fault of theirs.
settings.register_profile("raypipe", deadline=None, derandomize=True)
settings.load_profile("raypipe")

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

SHARED = Path(__file__).parents[2] / "shared"


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the real videos in ../shared/{name}, which a clone of raypipe does not have")
    return SHARED / name


@pytest.fixture(scope="session")
def fights() -> Path:
    """242 real two-second clips of the Surveillance Camera Fight Dataset, with labels.csv."""
    return shared("fights")


@pytest.fixture(scope="session")
def wild() -> Path:
    """41 small real files in many containers and codecs, with index.csv."""
    return shared("wild")


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 frames of H.264 with a keyframe every 12."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=100, options={"g": "12"})
