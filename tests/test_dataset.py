import json
from dataclasses import replace

import numpy as np
import pytest
from features import SPEC, make_store

from raypipe.cluster import Claim
from raypipe.config import SplitConfig, TrialConfig
from raypipe.dataset import (
    check_trial,
    class_counts,
    data_digest,
    deal_at_random,
    leaks,
    load_dataset,
    split_dataset,
    torn_groups,
)
from raypipe.errors import UserError
from raypipe.evidence import notes
from raypipe.trial import ClipSet


def test_clips_without_features_take_no_part(tmp_path):
    dataset = load_dataset(make_store(tmp_path, clips=10, failed=3))
    assert dataset.clips.features.shape == (10, 4, 8)
    assert dataset.outcomes == {"ok": 10, "failed": 3}


def test_failed_clips_take_part_as_zeros_where_that_is_wanted(tmp_path):
    store = make_store(tmp_path, clips=10, failed=3)
    dataset, without = load_dataset(store, zero_fill=True), load_dataset(store)
    assert (dataset.zero_filled, without.zero_filled) == (3, 0)
    assert not dataset.clips.features[10:].any() and len(dataset.clips.labels) == 13
    np.testing.assert_array_equal(dataset.clips.features[:10], without.clips.features)


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
    moved = {group: 1 - side for group, side in kept.items() if side in (0, 1)}
    file.write_text(json.dumps(kept | moved))
    second = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    assert (first.sides != second.sides).any(), "what was decided once is read, not decided again"


@pytest.mark.parametrize("content", ['{"g1": ', '["g1"]', '{"g1": "test"}', "\x00\xff"])
def test_a_damaged_file_of_sides_is_refused_by_name(tmp_path, content):
    store = make_store(tmp_path)
    dataset = load_dataset(store)
    split_dataset(dataset, SplitConfig(), seed=0, store=store)
    (file,) = (tmp_path / "splits").iterdir()
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{file}: is damaged; .* remove it, and the groups are dealt anew"):
        split_dataset(dataset, SplitConfig(), seed=0, store=store)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=rf"{file}: cannot be read: Is a directory"):
        split_dataset(dataset, SplitConfig(), seed=0, store=store)


def test_sides_that_cannot_be_kept_are_a_sentence(tmp_path):
    store = make_store(tmp_path)
    (tmp_path / "splits").touch()  # as little to be written in as a folder on a read-only disk
    with pytest.raises(UserError, match=r"the sides of the groups cannot be kept: .*make that folder"):
        split_dataset(load_dataset(store), SplitConfig(), seed=0, store=store)


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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"view": "motion"}, "--view motion: the features are of view rgb"),
        ({"loss": "focal", "focal_alpha": [1.0, 2.0, 3.0]}, "--focal-alpha has 3 numbers for 2 classes"),
    ],
)
def test_a_trial_that_the_clips_cannot_serve_is_refused(tmp_path, fields, said):
    clips = load_dataset(make_store(tmp_path)).clips
    with pytest.raises(UserError, match=said):
        check_trial(clips, TrialConfig(**fields))


def test_differences_need_two_steps(tmp_path):
    clips = load_dataset(make_store(tmp_path)).clips
    check_trial(clips, TrialConfig(inputs="both"))
    still = ClipSet(clips.video_ids, clips.features[:, :1], clips.labels, clips.class_names)
    with pytest.raises(UserError, match="--inputs both: the features have one step"):
        check_trial(still, TrialConfig(inputs="both"))


# --- protocols ----------------------------------------------------------------------------------------


def crossing(groups: list[str], sides: np.ndarray) -> int:
    """Groups that have clips on more than one side."""
    return sum(len({s for g, s in zip(groups, sides, strict=True) if g == name}) > 1 for name in set(groups))


def test_random_folds_let_groups_leak_and_grouped_ones_do_not(tmp_path):
    store = make_store(tmp_path, clips=80, clips_per_group=4)
    dataset = load_dataset(store)
    grouped = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    dealt = split_dataset(dataset, SplitConfig(protocol="random"), seed=0, store=store)
    assert crossing(dataset.groups, grouped.sides) == 0 < crossing(dataset.groups, dealt.sides)
    again = split_dataset(dataset, SplitConfig(protocol="both"), seed=0, store=store)
    np.testing.assert_array_equal(again.sides, grouped.sides)


def test_a_given_split_is_not_dealt_anew_and_groups_that_it_tears_are_named(tmp_path):
    store = make_store(tmp_path, clips=60, clips_per_group=4, splits=("train", "train", "val", "test"))
    dataset = load_dataset(store)
    with pytest.raises(UserError, match="--protocol random: the manifest has a split column"):
        split_dataset(dataset, SplitConfig(protocol="random"), seed=0, store=store)
    splits = split_dataset(dataset, SplitConfig(protocol="both"), seed=0, store=store)
    torn = torn_groups(dataset, splits)
    assert torn == sorted(set(dataset.groups))
    said = notes(dataset, splits, Claim(cpus=1, gpus=0, replicas=1))
    assert any("15 groups on several sides, for example g0" in note for note in said)
    store = make_store(tmp_path / "grouped")
    dataset = load_dataset(store)
    assert torn_groups(dataset, split_dataset(dataset, SplitConfig(), seed=0, store=store)) == []


def test_dealing_the_training_side_at_random_leaves_the_test_side_alone(tmp_path):
    store = make_store(tmp_path, clips=80, clips_per_group=4)
    dataset = load_dataset(store)
    grouped = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    dealt = deal_at_random(dataset, grouped, seed=0)
    np.testing.assert_array_equal(dealt.test, grouped.test)
    assert crossing(dataset.groups, dealt.sides) > 0
    for fold in range(5):
        _, validation = dealt.fold(fold)
        assert 0.4 <= dataset.clips.labels[validation].mean() <= 0.6, "classes stay balanced"


def test_a_change_of_the_clips_shows_in_their_digest(tmp_path):
    store = make_store(tmp_path / "one")
    dataset = load_dataset(store)
    splits = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    other = make_store(tmp_path / "other", clips=62)
    more = load_dataset(other)
    assert data_digest(dataset, splits) == data_digest(load_dataset(store), splits)
    assert data_digest(dataset, splits) != data_digest(
        more, split_dataset(more, SplitConfig(), seed=0, store=other)
    )
    otherwise = replace(dataset, clips=replace(dataset.clips, fingerprint="of another backbone"))
    assert dataset.clips.fingerprint == SPEC.fingerprint
    assert data_digest(dataset, splits) != data_digest(otherwise, splits)
