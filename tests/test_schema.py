"""What tells one kind of features from another."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from features import SPEC

from raypipe.store import FeatureStore


@pytest.mark.parametrize("field", ["frames", "view", "motion_gap_s", "weights_digest", "dim"])
def test_fingerprints_differ_where_a_field_does(field: str) -> None:
    other = replace(SPEC, **{field: "other" if isinstance(getattr(SPEC, field), str) else 9})
    assert other.fingerprint != SPEC.fingerprint == replace(SPEC).fingerprint


def test_a_store_from_before_the_policies_is_one_of_uniform_sampling(tmp_path: Path) -> None:
    content = asdict(SPEC)
    del content["policy"], content["sample_fps"]
    (tmp_path / "features.json").write_text(json.dumps(content))
    assert FeatureStore(tmp_path).spec() == SPEC
    assert SPEC.fingerprint != replace(SPEC, policy="middle").fingerprint
