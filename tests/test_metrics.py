import math

import numpy as np
import pytest

from raypipe.metrics import (
    bootstrap,
    cross_entropies,
    evaluate,
    group_weights,
    paired_differences,
    score_intervals,
    weighted_scores,
    wilson_interval,
)


def test_a_table_by_hand():
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    result = evaluate(labels, probabilities, ["calm", "fight"])
    assert result.accuracy == 0.75
    assert result.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert result.confusion == ((2, 1), (0, 1))
    assert result.auc == 1.0
    assert result.loss == pytest.approx(-np.mean(np.log([0.9, 0.6, 0.3, 0.8])))
    fight = result.classes[1]
    assert (fight.name, fight.clips, fight.precision, fight.recall) == ("fight", 1, 0.5, 1.0)


def test_a_class_without_clips_leaves_the_auc_unmeasured():
    result = evaluate(np.array([0, 0]), np.array([[0.9, 0.1], [0.4, 0.6]]), ["a", "b"])
    assert math.isnan(result.auc)
    assert result.balanced_accuracy == 0.5


def test_three_classes_use_one_against_rest():
    labels = np.array([0, 1, 2, 0, 1, 2])
    result = evaluate(labels, np.eye(3)[labels] * 0.8 + 0.1, ["a", "b", "c"])
    assert (result.accuracy, result.auc, result.macro_f1) == (1.0, 1.0, 1.0)


def test_probability_zero_gives_a_finite_loss():
    assert math.isfinite(evaluate(np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]]), ["a", "b"]).loss)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Values of the formula in Wilson 1927, as statsmodels' proportion_confint(method="wilson") gives them.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (78, 100, 0.6893, 0.8500)],
)
def test_wilson_interval(hits, total, low, high):
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=1e-4)


# --- resampled clips --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_weighted_scores_are_those_of_repeated_clips(classes):
    rng = np.random.default_rng(classes)
    labels = np.arange(40) % classes
    probabilities = rng.dirichlet(np.ones(classes), 40).round(1)  # with ties
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(axis=1)
    weights = np.concatenate([np.ones((1, 40), int), rng.integers(0, 4, (3, 40))])
    scores = weighted_scores(labels, probabilities, weights)
    for row, counts in enumerate(weights):
        repeated = np.repeat(np.arange(40), counts)
        right = evaluate(labels[repeated], probabilities[repeated], [f"c{i}" for i in range(classes)])
        assert scores["accuracy"][row] == pytest.approx(right.accuracy)
        assert scores["recall"][row] == pytest.approx(right.balanced_accuracy)
        assert scores["precision"][row] == pytest.approx(np.mean([c.precision for c in right.classes]))
        assert scores["auc"][row] == pytest.approx(right.auc)
        for number, result in enumerate(right.classes):
            assert scores[f"recall_of_{number}"][row] == pytest.approx(result.recall)


def test_a_resample_without_a_class_has_no_auc():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    scores = weighted_scores(np.array([0, 1]), probabilities, np.array([[2, 0], [1, 1]]))
    assert np.isnan(scores["auc"]).tolist() == [True, False]
    assert scores["accuracy"].tolist() == [1.0, 1.0]


def test_groups_are_drawn_whole_and_by_seed():
    weights = group_weights(["a", "b", "a", "c", "b", "a"], 500, seed=1)
    assert weights.shape == (500, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all(), "as many groups as there are"
    np.testing.assert_array_equal(weights, group_weights(["a", "b", "a", "c", "b", "a"], 500, seed=1))
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.15)


# --- intervals --------------------------------------------------------------------------------------


def made_up(clips: int, *, signal: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % 2
    scores = 1 / (1 + np.exp(-(rng.normal(size=clips) + signal * (labels - 0.5))))
    return labels, np.stack([1 - scores, scores], axis=1)


def test_clips_of_one_source_count_for_less_than_strangers():
    labels, probabilities = made_up(40, signal=1.0)
    alike = np.repeat(labels, 5), np.repeat(probabilities, 5, axis=0)
    strangers = score_intervals(*alike, [str(i) for i in range(200)])
    grouped = score_intervals(*alike, [str(i // 5) for i in range(200)])
    for name in ("accuracy", "auc", "recall"):
        low, high = grouped[name]
        assert high - low > 1.5 * (strangers[name][1] - strangers[name][0])


@pytest.mark.parametrize("hits", [0, 1])
def test_all_right_and_all_wrong_leave_room_for_doubt(hits):
    labels = np.array([0, 1] * 10)
    probabilities = np.eye(2)[labels if hits else 1 - labels]
    found = score_intervals(labels, probabilities, [str(i // 2) for i in range(20)])
    assert found["accuracy"] == wilson_interval(10 * hits, 10), "of ten groups, not of twenty clips"


def test_evaluate_has_intervals_where_it_knows_the_groups():
    labels, probabilities = made_up(60, signal=2.0)
    assert math.isnan(evaluate(labels, probabilities, ["a", "b"]).accuracy_interval[0])
    groups = [str(i // 3) for i in range(60)]
    result = evaluate(labels, probabilities, ["a", "b"], groups=groups)
    assert result.groups == 20
    for value, (low, high) in [
        (result.accuracy, result.accuracy_interval),
        (result.balanced_accuracy, result.balanced_accuracy_interval),
        (result.macro_f1, result.macro_f1_interval),
        (result.auc, result.auc_interval),
        (result.loss, result.loss_interval),
        *((one.recall, one.recall_interval) for one in result.classes),
    ]:
        assert low < value < high
    assert result == evaluate(labels, probabilities, ["a", "b"], groups=groups), "the same every time"


def test_answers_may_differ_from_the_most_probable_class():
    labels, probabilities = np.array([0, 1]), np.array([[0.6, 0.4], [0.6, 0.4]])
    assert evaluate(labels, probabilities, ["a", "b"], predicted=np.array([0, 1])).accuracy == 1


def test_a_paired_difference_is_narrower_than_what_it_is_the_difference_of():
    labels, better = made_up(200, signal=2.0)
    worse = better.copy()
    worse[:6] = worse[:6, ::-1]
    groups = [str(i // 2) for i in range(200)]
    answers = better.argmax(axis=1), worse.argmax(axis=1)
    gain = paired_differences(labels, (better, answers[0]), (worse, answers[1]), groups)["accuracy"]
    assert gain.value == pytest.approx((answers[0] == labels).mean() - (answers[1] == labels).mean())
    low, high = score_intervals(labels, better, groups)["accuracy"]
    assert gain.low < gain.value < gain.high and gain.high - gain.low < high - low
    same = paired_differences(labels, (better, answers[0]), (better, answers[0]), groups)["auc"]
    assert (same.value, same.low, same.high, same.is_gain) == (0, 0, 0, False)


def test_many_clips_are_resampled_in_parts(monkeypatch):
    labels, probabilities = made_up(50, signal=1.0)
    groups = [str(i) for i in range(50)]
    monkeypatch.setattr("raypipe.metrics.WEIGHTS_AT_ONCE", 50 * 100)
    assert len(bootstrap(labels, probabilities, groups)["auc"]) == 1000


def test_cross_entropy_by_hand():
    probabilities = np.array([[0.5, 0.5], [0.0, 1.0]], np.float32)
    assert cross_entropies(np.array([0, 1]), probabilities).tolist() == pytest.approx([np.log(2), 0])
    assert cross_entropies(np.array([0, 0]), probabilities)[1] == pytest.approx(-np.log(1e-7))


def test_of_one_source_nothing_is_known():
    labels, probabilities = made_up(10, signal=1.0)
    worse = 1 - probabilities
    found = score_intervals(labels, probabilities, ["one"] * 10)
    assert all(np.isnan(interval).all() for interval in found.values())
    gains = paired_differences(
        labels,
        (probabilities, probabilities.argmax(axis=1)),
        (worse, worse.argmax(axis=1)),
        ["one"] * 10,
    )
    assert gains["accuracy"].value > 0 and not gains["accuracy"].is_gain


def test_means_over_the_classes_leave_room_for_doubt_where_all_are_right():
    labels = np.array([0] * 20 + [1] * 4)
    probabilities = np.eye(2)[labels]
    found = score_intervals(labels, probabilities, [f"g{i}" for i in range(24)])
    for name in ("recall", "f1", "precision", "auc", "recall_of_1", "f1_of_1"):
        assert found[name] == wilson_interval(4, 4)
    assert found["accuracy"] == wilson_interval(24, 24)
