"""Which clips train, validate and test: groups to sides, a group never on two.

A side is a number: TEST, or the validation fold 0..K-1; ALWAYS_TRAIN where a manifest's `split` column
says so. Groups are placed one after the other where their classes are missed most, larger ones first;
the seed decides between equal choices. The last groups go where there is none yet. What was decided once
is kept (`splits/` beside the features), so a group never moves when others are added.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import UserError

TEST = -1
ALWAYS_TRAIN = -2
OWN = "video:"

SPLIT_NAMES: Mapping[str, int] = {"train": ALWAYS_TRAIN, "val": 0, "validation": 0, "test": TEST}


@dataclass(frozen=True)
class Splits:
    """The side of each clip [N], and how many validation folds there are."""

    sides: NDArray[np.int64]
    folds: int

    @property
    def training(self) -> NDArray[np.int64]:
        """Positions of all clips that are not on the test side."""
        return np.flatnonzero(self.sides != TEST)

    @property
    def test(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.sides == TEST)

    @property
    def validation_how(self) -> str:
        """What a reader should know of scores on the validation side."""
        return "out of fold" if self.folds > 1 else "also used to choose"

    def fold(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions of the clips that train and of those that validate in one fold."""
        train = np.flatnonzero((self.sides != TEST) & (self.sides != number))
        return train, np.flatnonzero(self.sides == number)


def group_of(group: str | None, video_id: str) -> str:
    """A video without a group is its own group."""
    return group or f"{OWN}{video_id}"


def have_groups(groups: Sequence[str]) -> bool:
    """Whether any of the groups that `group_of` gave is more than a single video."""
    return not all(group.startswith(OWN) for group in groups)


def assign_groups(
    groups: Sequence[str],
    labels: Sequence[str],
    *,
    folds: int,
    test_share: float,
    seed: int,
    kept: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The side of every group, given the group and label of each clip.

    Groups in `kept` stay where they were. Raises UserError where there are too few groups.
    """
    names = sorted(set(groups))
    sides = ([TEST] if test_share > 0 else []) + list(range(folds))
    if len(names) < len(sides):
        test = " and a test side" if test_share > 0 else ""
        raise UserError(
            f"{len(groups)} clips in {len(names)} groups are too few for {folds} folds{test}; "
            f"lower --folds or --test-share, or add videos"
        )
    classes = sorted(set(labels))
    counts = {name: np.zeros(len(classes)) for name in names}
    for group, label in zip(groups, labels, strict=True):
        counts[group][classes.index(label)] += 1
    shares = np.array([test_share if side == TEST else (1 - test_share) / folds for side in sides])
    target = shares[:, None] * np.sum(list(counts.values()), axis=0)  # [sides, classes]
    placed, room = np.zeros_like(target), target.sum(axis=1)

    assigned = {name: side for name, side in (kept or {}).items() if name in counts and side in sides}
    for name, side in assigned.items():
        placed[sides.index(side)] += counts[name]
    rest = [name for name in names if name not in assigned]
    for name in sorted(rest, key=lambda name: (-counts[name].sum(), _draw(seed, name))):
        # How much of what each side still misses, class by class, this group would bring.
        gain = ((target - placed) / target * counts[name]).sum(axis=1)
        empty = placed.sum(axis=1) == 0
        if empty.sum() >= len(names) - len(assigned):  # as many as there are groups left
            gain = np.where(empty, gain, -np.inf)
        else:  # a source larger than a side's whole share goes where the share is as large, or the largest
            gain = np.where(room >= min(counts[name].sum(), room.max()), gain, -np.inf)
        best = np.flatnonzero(np.isclose(gain, gain.max()))
        choice = min(best, key=lambda i: _draw(seed, f"{name}/{i}"))
        placed[choice] += counts[name]
        assigned[name] = sides[choice]
    return assigned


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def given_splits(splits: Sequence[str | None]) -> Splits:
    """The manifest's own split column: train, val (or validation), test. Raises UserError for others."""
    for value in splits:
        if value not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise UserError(
                f"split {value!r} in the manifest is unknown; where one clip has a split, all "
                f"need one of: {known}"
            )
    sides = np.array([SPLIT_NAMES[value] for value in splits if value is not None], np.int64)
    if not (sides == 0).any():
        raise UserError("the manifest's split column has no val clips, so trials cannot be ranked")
    return Splits(sides, folds=1)


def check_sides(
    labels: NDArray[np.int64], class_names: Sequence[str], splits: Splits, *, tested: bool = False
) -> None:
    """Raises UserError where a fold would validate nothing or train without a class, where no fold validates
    a class, or where with `tested` the test side is empty."""
    if len(class_names) < 2:
        raise UserError(
            f"all clips have the label {class_names[0]!r}: a classifier needs at least two classes"
        )
    if tested and not len(splits.test):
        raise UserError(
            "no clip is left on the test side: the groups that it was dealt have gone; "
            "give --test-share 0 or another --seed, which deals the sides anew, or add videos"
        )
    for fold in range(splits.folds):
        train, validation = splits.fold(fold)
        if not len(validation):
            raise UserError(
                f"fold {fold + 1} has no clips to validate on: the groups that it was dealt have gone; "
                "give fewer --folds, which deals the sides anew, or add videos"
            )
        for number in sorted(set(range(len(class_names))) - set(labels[train].tolist())):
            raise UserError(
                f"class {class_names[number]!r} has too few groups: fold {fold + 1} would train without it; "
                "add videos of it from other sources, or lower --folds"
            )
    for number in sorted(set(range(len(class_names))) - set(labels[splits.sides >= 0].tolist())):
        raise UserError(
            f"class {class_names[number]!r} has no clip to validate on, so trials cannot be ranked; "
            "give some of its clips the split val"
        )
