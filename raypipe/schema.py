"""What a row of the feature store is, and what all rows of one store were made with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 2

Outcome = Literal["ok", "partial", "failed"]

ROW_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("clip_index", pa.int32(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("modified_s", pa.float64()),
        pa.field("content_digest", pa.string()),
        pa.field("label", pa.string()),
        pa.field("group", pa.string()),
        pa.field("split", pa.string()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("rotation", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("frame_count", pa.int64()),
        pa.field("duration_s", pa.float64()),
        pa.field("codec", pa.string()),
        pa.field("container", pa.string()),
        pa.field("frame_pts_s", pa.list_(pa.float64())),
        pa.field("frame_ok", pa.list_(pa.bool_())),
    ]
)
"""Every column of a row but `features`, whose shape is the FeatureSpec's."""

INDEX_COLUMNS = ["video_id", "size_bytes", "modified_s", "label", "group", "split", "outcome"]


ADDED_LATER: Mapping[str, Any] = {"policy": "uniform", "sample_fps": None}
"""Fields of a FeatureSpec that older stores and models do not name, with what they were made with. With these
values a fingerprint is the old one."""


@dataclass(frozen=True)
class FeatureSpec:
    """What the features are: everything that must agree between two rows of one store."""

    frames: int
    frame_size: int
    view: str
    motion_gap_s: float
    window_s: float | None
    """Seconds a clip; None: the whole video is one."""
    stride_s: float | None
    min_frames: int
    backbone: str
    weights_digest: str
    steps: int
    """T, feature vectors per clip."""
    dim: int
    """D, length of a feature vector."""
    dtype: str = "float16"
    schema_version: int = SCHEMA_VERSION
    policy: str = "uniform"
    """Which frames are sampled."""
    sample_fps: float | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "FeatureSpec":
        """What a file says; one of before the fields in ADDED_LATER holds what was done then.

        Raises KeyError with the name of a field that is missing.
        """
        known = {**ADDED_LATER, **content}
        return cls(**{field.name: known[field.name] for field in fields(cls)})

    @property
    def fingerprint(self) -> str:
        """16 hex digits that a model keeps to recognise the features it was trained on."""
        said = {
            name: value for name, value in asdict(self).items() if (name, value) not in ADDED_LATER.items()
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def features_type(self) -> pa.DataType:
        return pa.fixed_shape_tensor(pa.float16(), (self.steps, self.dim))

    @property
    def shard_schema(self) -> pa.Schema:
        return ROW_SCHEMA.append(pa.field("features", self.features_type))
