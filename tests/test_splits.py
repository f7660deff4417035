import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import UserError
from raypipe.splits import (
    ALWAYS_TRAIN,
    TEST,
    Splits,
    assign_groups,
    check_sides,
    given_splits,
    group_of,
    have_groups,
)


def clips_of(sizes: dict[str, tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Groups and labels of clips, given the number of `a` and `b` clips in each group."""
    groups, labels = [], []
    for group, (a, b) in sizes.items():
        groups += [group] * (a + b)
        labels += ["a"] * a + ["b"] * b
    return groups, labels


group_sizes = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4),
    st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(sum),
    min_size=8,
    max_size=40,
)


@given(group_sizes, st.integers(0, 5))
@settings(max_examples=60)
def test_every_group_has_one_side_and_it_depends_on_seed_and_data_only(sizes, seed):
    groups, labels = clips_of(sizes)
    sides = assign_groups(groups, labels, folds=3, test_share=0.2, seed=seed)
    assert set(sides) == set(sizes)
    assert set(sides.values()) <= {TEST, 0, 1, 2}
    shuffled = list(zip(groups, labels, strict=True))[::-1]
    assert sides == assign_groups(*zip(*shuffled, strict=True), folds=3, test_share=0.2, seed=seed)


@given(group_sizes, group_sizes)
@settings(max_examples=60)
def test_no_group_moves_when_others_are_added(sizes, more):
    before = assign_groups(*clips_of(sizes), folds=3, test_share=0.2, seed=0)
    grown = more | sizes
    after = assign_groups(*clips_of(grown), folds=3, test_share=0.2, seed=0, kept=before)
    assert {group: after[group] for group in sizes} == before


@given(group_sizes, group_sizes, st.integers(0, 5))
@settings(max_examples=60)
def test_no_side_is_empty_where_there_are_enough_groups(sizes, more, seed):
    few = dict(list(sizes.items())[:6])
    sides = assign_groups(*clips_of(few), folds=5, test_share=0.2, seed=seed)
    assert set(sides.values()) == {TEST, 0, 1, 2, 3, 4}, "six groups, six sides"
    grown = assign_groups(*clips_of(more | sizes), folds=5, test_share=0.2, seed=seed, kept=sides)
    assert {group: grown[group] for group in few} == sides, "and none moves later"


@pytest.mark.parametrize("count", [6, 7, 10])
def test_a_few_groups_of_one_class_each_leave_no_side_empty(count):
    groups, labels = clips_of({f"g{i}": (2, 0) if i % 2 else (0, 2) for i in range(count)})
    for seed in range(10):
        sides = assign_groups(groups, labels, folds=5, test_share=0.2, seed=seed)
        assert set(sides.values()) == {TEST, 0, 1, 2, 3, 4}


def test_sides_whose_groups_have_gone_are_refused():
    labels = np.array([0, 1, 0, 1])
    with pytest.raises(UserError, match=r"fold 2 has no clips to validate on: .*give fewer --folds"):
        check_sides(labels, ["a", "b"], Splits(np.array([0, 0, 2, 2]), folds=3))
    whole = Splits(np.array([0, 0, 1, 1]), folds=2)
    check_sides(labels, ["a", "b"], whole)
    with pytest.raises(UserError, match=r"no clip is left on the test side: .*--test-share 0"):
        check_sides(labels, ["a", "b"], whole, tested=True)


def test_small_groups_give_balanced_classes_on_every_side():
    sizes = {f"g{i}": (2, 0) if i % 5 else (0, 2) for i in range(100)}
    groups, labels = clips_of(sizes)
    sides = assign_groups(groups, labels, folds=4, test_share=0.2, seed=0)
    for side in (TEST, 0, 1, 2, 3):
        ours = [label for group, label in zip(groups, labels, strict=True) if sides[group] == side]
        assert (ours.count("a"), ours.count("b")) == (32, 8)


def test_another_seed_gives_another_split():
    groups, labels = clips_of({f"g{i}": (1, 1) for i in range(30)})
    splits = [assign_groups(groups, labels, folds=3, test_share=0.2, seed=seed) for seed in (0, 1)]
    assert splits[0] != splits[1]


def test_real_fights_have_both_classes_on_every_side(fights):
    rows = [line.split(",") for line in (fights / "labels.csv").read_text().splitlines()[1:]]
    groups, labels = [row[2] for row in rows], [row[1] for row in rows]
    sides = assign_groups(groups, labels, folds=5, test_share=0.2, seed=0)
    for side in (TEST, 0, 1, 2, 3, 4):
        ours = [label for group, label in zip(groups, labels, strict=True) if sides[group] == side]
        assert 35 <= len(ours) <= 55
        assert min(ours.count("fight"), ours.count("noFight")) >= 0.25 * len(ours)


def test_fewer_groups_than_folds_is_an_error():
    with pytest.raises(UserError, match=r"3 clips in 3 groups are too few for 5 folds and a test side"):
        assign_groups(["x", "y", "z"], ["a", "b", "a"], folds=5, test_share=0.2, seed=0)


def test_a_fold_that_would_train_without_a_class_is_an_error():
    splits = Splits(np.array([0, 0, 1, 1]), folds=2)
    with pytest.raises(UserError, match=r"class 'b' has too few groups: fold 2"):
        check_sides(np.array([0, 0, 0, 1]), ["a", "b"], splits)


def test_one_class_only_is_an_error():
    with pytest.raises(UserError, match=r"all clips have the label 'a'"):
        check_sides(np.array([0, 0]), ["a"], Splits(np.array([0, 1]), folds=2))


def test_a_video_without_a_group_is_its_own():
    assert [group_of("g", "a.mp4"), group_of(None, "a.mp4"), group_of("", "b.mp4")] == [
        "g",
        "video:a.mp4",
        "video:b.mp4",
    ]
    assert have_groups(["g", "video:a.mp4"]) and not have_groups(["video:a.mp4", "video:b.mp4"])


def test_a_given_split_wins():
    splits = given_splits(["train", "val", "test", "validation"])
    assert splits.sides.tolist() == [ALWAYS_TRAIN, 0, TEST, 0]
    train, validation = splits.fold(0)
    assert (train.tolist(), validation.tolist()) == ([0], [1, 3])


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (["train", "holdout"], "split 'holdout' in the manifest is unknown"),
        (["train", None], "split None in the manifest is unknown"),
        (["train", "test"], "has no val clips"),
    ],
)
def test_a_split_column_that_cannot_serve_is_an_error(column, sentence):
    with pytest.raises(UserError, match=sentence):
        given_splits(column)


def test_a_class_that_nothing_validates_is_an_error():
    splits = given_splits(["train", "train", "val", "val"])
    with pytest.raises(UserError, match=r"class 'b' has no clip to validate on"):
        check_sides(np.array([0, 1, 0, 0]), ["a", "b"], splits)


@pytest.mark.parametrize("seed", range(12))
def test_a_source_larger_than_the_test_side_stays_off_it(seed):
    sizes = {"large": (60, 60)} | {f"g{i}": (2, 1) if i % 2 else (1, 2) for i in range(60)}
    groups, labels = clips_of(sizes)
    sides = assign_groups(groups, labels, folds=5, test_share=0.1, seed=seed)
    assert sides["large"] != TEST
    assert sum(sides[group] == TEST for group in groups) == pytest.approx(30, abs=6)
