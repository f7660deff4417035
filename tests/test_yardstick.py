import numpy as np

from raypipe.splits import TEST, Splits
from raypipe.trial import ClipSet
from raypipe.yardstick import pooled, predict_folds, predict_test, yardstick_name


def clip_set(view: str = "both", *, clips: int = 60) -> ClipSet:
    """Clips of two classes that differ in the second half of their features, the motion, only."""
    rng = np.random.default_rng(0)
    labels = np.arange(clips) % 2
    features = rng.normal(size=(clips, 4, 6))
    features[..., 3:] += 2 * labels[:, None, None]
    return ClipSet([f"{i}.mp4" for i in range(clips)], features.astype(np.float16), labels, ["a", "b"], view)


def test_it_looks_at_the_motion_where_there_is_one():
    both, rgb = clip_set("both"), clip_set("rgb")
    assert pooled(both).shape == (60, 6) and pooled(rgb).shape == (60, 12)
    part = both.features[..., 3:].astype(np.float32)
    np.testing.assert_allclose(pooled(both)[:, :3], part.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(pooled(both)[:, 3:], part.std(axis=1), rtol=1e-5)
    assert "motion" in yardstick_name(both) and "rgb" in yardstick_name(rgb)


def test_every_clip_is_predicted_by_a_model_that_has_not_seen_it():
    clips = clip_set()
    splits = Splits(np.array([TEST, TEST, 0, 0, 1, 1, 2, 2] * 7 + [0] * 4), folds=3)
    out_of_fold, test = predict_folds(clips, splits, seed=0), predict_test(clips, splits, seed=0)
    on_test = splits.sides == TEST
    assert np.isnan(out_of_fold[on_test]).all() and np.isnan(test[~on_test]).all()
    assert (out_of_fold[~on_test].argmax(axis=1) == clips.labels[~on_test]).mean() > 0.9
    assert (test[on_test].argmax(axis=1) == clips.labels[on_test]).mean() > 0.9
    # Clips of a fold whose labels are turned round change what others are told, not what it is told.
    turned = np.where(splits.sides == 0, 1 - clips.labels, clips.labels)
    other = ClipSet(clips.video_ids, clips.features, turned, clips.class_names, clips.view)
    again = predict_folds(other, splits, seed=0)
    np.testing.assert_array_equal(again[splits.sides == 0], out_of_fold[splits.sides == 0])
