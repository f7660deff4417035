import json

import numpy as np
import pytest
from features import make_store

from raypipe.config import SplitConfig
from raypipe.dataset import class_counts, leaks, load_dataset, split_dataset
from raypipe.errors import UserError
from raypipe.splits import TEST


def test_clips_without_features_take_no_part(tmp_path):
    dataset = load_dataset(make_store(tmp_path, clips=10, failed=3))
    assert dataset.clips.features.shape == (10, 4, 8)
    assert dataset.outcomes == {"ok": 10, "failed": 3}


def test_tune_before_extract_is_an_error(tmp_path):
    from raypipe.store import FeatureStore

    with pytest.raises(UserError, match=r"no feature store there; run python -m raypipe\.extract first"):
        load_dataset(FeatureStore(tmp_path))


def test_one_class_only_is_an_error(tmp_path):
    store = make_store(tmp_path, classes=("fight",))
    with pytest.raises(UserError, match="all clips have the label 'fight'; two are needed"):
        split_dataset(load_dataset(store), SplitConfig(), seed=0, store=store)


def test_fewer_clips_than_folds_is_an_error(tmp_path):
    store = make_store(tmp_path, clips=4)
    with pytest.raises(UserError, match="4 clips in 2 groups are too few for 5 folds"):
        split_dataset(load_dataset(store), SplitConfig(), seed=0, store=store)


def test_sides_are_kept_beside_the_features(tmp_path):
    store = make_store(tmp_path)
    dataset = load_dataset(store)
    first = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    (file,) = (tmp_path / "splits").iterdir()
    kept = json.loads(file.read_text())
    moved = {group: (0 if side != 0 else 1) for group, side in kept.items() if side != TEST}
    file.write_text(json.dumps(kept | moved))
    second = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    assert (first.sides != second.sides).any(), "what was decided once is read, not decided again"


def test_the_manifests_split_wins(tmp_path):
    store = make_store(tmp_path, splits=("train",) * 4 + ("val",) * 4 + ("test",))
    splits = split_dataset(load_dataset(store), SplitConfig(), seed=0, store=store)
    assert splits.folds == 1
    assert splits.test.tolist() == list(range(8, 60, 9))


def test_copies_on_two_sides_are_reported(tmp_path):
    from dataclasses import replace

    store = make_store(tmp_path)
    dataset = load_dataset(store)
    splits = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    assert leaks(dataset, splits) == []
    i, j = splits.test[0], splits.training[0]
    digests = list(dataset.content_digests)
    digests[j] = digests[i]
    pair = tuple(dataset.clips.video_ids[k] for k in sorted((i, j)))
    assert leaks(replace(dataset, content_digests=digests), splits) == [pair]


def test_class_counts_add_up(tmp_path):
    store = make_store(tmp_path)
    dataset = load_dataset(store)
    splits = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    counts = class_counts(dataset, splits)
    assert [row[0] for row in counts] == ["calm", "fight"]
    assert sum(row[1] for row in counts) == len(splits.training)
    assert sum(row[2] for row in counts) == len(splits.test)
    assert [row[3] for row in counts] == [15, 15]
    assert np.isfinite(dataset.clips.features).all()
