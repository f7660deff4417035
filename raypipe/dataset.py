"""What `tune` learns from: the labelled clips of a feature store, and how they are split."""

import json
import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from raypipe.config import SplitConfig
from raypipe.errors import UserError
from raypipe.splits import TEST, Splits, assign_groups, check_classes, given_splits
from raypipe.store import FeatureStore, features_array, write_json
from raypipe.training import ClipSet

LOG = logging.getLogger("raypipe")

COLUMNS = ["video_id", "label", "group", "split", "outcome", "content_digest", "features"]


@dataclass(frozen=True)
class Dataset:
    """Labelled clips with features, and what else the store says of them."""

    clips: ClipSet
    groups: list[str]
    splits: list[str | None]
    content_digests: list[str | None]
    outcomes: dict[str, int]
    """Clips of the whole store by outcome, those without features or label included."""
    unlabelled: int


def load_dataset(store: FeatureStore) -> Dataset:
    """Every clip that has features and a label. Raises UserError where there is nothing to learn from."""
    spec = store.spec()
    table = store.read(COLUMNS)
    outcomes = dict(Counter(table["outcome"].to_pylist()))
    usable = table.filter(pc.is_valid(table["features"]))
    labelled = usable.filter(pc.is_valid(usable["label"]))
    if labelled.num_rows == 0:
        what = "no labels" if usable.num_rows else "no clip with features"
        raise UserError(
            f"--features {store.path}: {what}; extract videos whose sub-folder or manifest gives a label"
        )
    labels = labelled["label"].to_pylist()
    class_names = sorted(set(labels))
    video_ids = labelled["video_id"].to_pylist()
    # A video without a group is its own group.
    groups = [
        group or f"video:{video_id}"
        for group, video_id in zip(labelled["group"].to_pylist(), video_ids, strict=True)
    ]
    return Dataset(
        clips=ClipSet(
            video_ids=video_ids,
            features=features_array(labelled["features"], spec),
            labels=np.array([class_names.index(label) for label in labels], np.int64),
            class_names=class_names,
        ),
        groups=groups,
        splits=labelled["split"].to_pylist(),
        content_digests=labelled["content_digest"].to_pylist(),
        outcomes=outcomes,
        unlabelled=usable.num_rows - labelled.num_rows,
    )


def split_dataset(dataset: Dataset, config: SplitConfig, *, seed: int, store: FeatureStore) -> Splits:
    """The side of each clip: the manifest's own, else by group, as decided when it was first seen."""
    names = dataset.clips.class_names
    if len(names) < 2:
        raise UserError(f"--features {store.path}: all clips have the label {names[0]!r}; two are needed")
    if any(dataset.splits):
        splits = given_splits(dataset.splits)
        check_classes(dataset.clips.labels, names, splits)
        return splits
    labels = [names[number] for number in dataset.clips.labels]
    # Kept beside the features: all runs over them share their sides, and no group moves later.
    path = store.path / "splits" / f"seed{seed}-folds{config.folds}-test{config.test_share:g}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    sides = assign_groups(
        dataset.groups, labels, folds=config.folds, test_share=config.test_share, seed=seed, kept=kept
    )
    splits = Splits(np.array([sides[group] for group in dataset.groups], np.int64), config.folds)
    check_classes(dataset.clips.labels, names, splits)
    if kept | sides != kept:
        path.parent.mkdir(exist_ok=True)
        write_json(path, dict(sorted((kept | sides).items())))
    return splits


def leaks(dataset: Dataset, splits: Splits) -> list[tuple[str, str]]:
    """Pairs of clips with the same content on two sides: they make a score look better than it is."""
    first: dict[str, int] = {}
    pairs = []
    for i, digest in enumerate(dataset.content_digests):
        if digest is None:
            continue
        j = first.setdefault(digest, i)
        if splits.sides[i] != splits.sides[j]:
            pairs.append((dataset.clips.video_ids[j], dataset.clips.video_ids[i]))
    return pairs


def class_counts(dataset: Dataset, splits: Splits) -> list[tuple[str, int, int, int]]:
    """Name, training clips, test clips and groups of each class."""
    labels, test = dataset.clips.labels, splits.sides == TEST
    return [
        (
            name,
            int(((labels == number) & ~test).sum()),
            int(((labels == number) & test).sum()),
            len({g for g, label in zip(dataset.groups, labels, strict=True) if label == number}),
        )
        for number, name in enumerate(dataset.clips.class_names)
    ]
