"""What `tune` learns from: the labelled clips of a feature store, and how they are split."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from raypipe.config import SplitConfig, TrialConfig
from raypipe.errors import UserError
from raypipe.feature_map import FeatureSource
from raypipe.files import write_json
from raypipe.splits import TEST, Splits, assign_groups, check_sides, given_splits, group_of
from raypipe.storage import Place
from raypipe.store import FeatureStore
from raypipe.trial import ClipSet

LOG = logging.getLogger("raypipe")

COLUMNS = ["video_id", "clip_index", "label", "group", "split", "outcome", "content_digest"]


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
    zero_filled: int
    """Clips without features that take part as zeros."""


def load_dataset(store: FeatureStore, *, zero_fill: bool = False) -> Dataset:
    """Every clip that has features and a label, with `zero_fill` also those that failed, as zeros.

    Raises UserError where there is nothing to learn from.
    """
    spec = store.spec()
    table = store.read(COLUMNS)
    outcomes = dict(Counter(table["outcome"].to_pylist()))
    usable = table if zero_fill else table.filter(pc.not_equal(table["outcome"], "failed"))
    labelled = usable.filter(pc.is_valid(usable["label"]))
    if labelled.num_rows == 0:
        what = "no labels" if usable.num_rows else "no clip with features"
        raise UserError(
            f"--features {store.path}: {what}; extract videos whose sub-folder or manifest gives a label"
        )
    labels = labelled["label"].to_pylist()
    class_names = sorted(set(labels))
    video_ids = labelled["video_id"].to_pylist()
    groups = list(map(group_of, labelled["group"].to_pylist(), video_ids))
    clip_indices = labelled["clip_index"].to_pylist()
    ids = tuple(zip(video_ids, clip_indices, strict=True))
    source = FeatureSource(str(store.path), ids, spec.steps, spec.dim)
    return Dataset(
        clips=ClipSet(
            video_ids=clip_names(video_ids, clip_indices),
            features=source.open(),
            labels=np.array([class_names.index(label) for label in labels], np.int64),
            class_names=class_names,
            view=spec.view,
            fingerprint=spec.fingerprint,
            source=source,
        ),
        groups=groups,
        splits=labelled["split"].to_pylist(),
        content_digests=labelled["content_digest"].to_pylist(),
        outcomes=outcomes,
        unlabelled=usable.num_rows - labelled.num_rows,
        zero_filled=labelled["outcome"].to_pylist().count("failed"),
    )


def clip_names(video_ids: Sequence[str], clip_indices: Sequence[int]) -> list[str]:
    """A video's id, with the number of the clip where it was cut into several.

    >>> clip_names(["a.mp4", "b.mp4", "b.mp4"], [0, 0, 1])
    ['a.mp4', 'b.mp4#0', 'b.mp4#1']
    """
    clips = Counter(video_ids)
    return [
        video_id if clips[video_id] == 1 else f"{video_id}#{index}"
        for video_id, index in zip(video_ids, clip_indices, strict=True)
    ]


def split_dataset(dataset: Dataset, config: SplitConfig, *, seed: int, store: FeatureStore) -> Splits:
    """The side of each clip: the manifest's own, else by group, as decided when it was first seen."""
    names = dataset.clips.class_names
    if len(names) < 2:
        raise UserError(f"--features {store.path}: all clips have the label {names[0]!r}; two are needed")
    if any(dataset.splits):
        if config.protocol == "random":
            raise UserError(
                "--protocol random: the manifest has a split column, which says the side of each clip; "
                "extract with a manifest without it, or use --protocol both"
            )
        splits = given_splits(dataset.splits)
        check_sides(dataset.clips.labels, names, splits)
        return splits
    labels = [names[number] for number in dataset.clips.labels]
    # Random: as if each clip were a source of its own.
    groups = dataset.clips.video_ids if config.protocol == "random" else dataset.groups
    # Kept beside the features: all runs over them share their sides, and no group moves later.
    dealt = "-random" if config.protocol == "random" else ""
    path = store.path / "splits" / f"seed{seed}-folds{config.folds}-test{config.test_share:g}{dealt}.json"
    kept = kept_sides(path)
    sides = assign_groups(
        groups, labels, folds=config.folds, test_share=config.test_share, seed=seed, kept=kept
    )
    splits = Splits(np.array([sides[group] for group in groups], np.int64), config.folds)
    check_sides(dataset.clips.labels, names, splits, tested=config.test_share > 0)
    if kept | sides != kept:
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, dict(sorted((kept | sides).items())))
        except OSError as error:
            raise UserError(
                f"{path}: the sides of the groups cannot be kept: {error.strerror or error}; they lie beside "
                "the features, so that no group moves later: make that folder writable, or copy the features"
            ) from None
    return splits


def kept_sides(path: Place) -> dict[str, int]:
    """The side of each group as it was decided before; empty where nothing was. Raises UserError."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        whole = isinstance(kept, dict) and all(type(side) is int for side in kept.values())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None
    except ValueError:  # neither JSON nor text
        whole = False
    if not whole:
        raise UserError(
            f"{path}: is damaged; it says on which side each group stands: restore it from a copy, "
            "or remove it, and the groups are dealt anew"
        )
    return dict(kept)


def deal_at_random(dataset: Dataset, splits: Splits, *, seed: int) -> Splits:
    """The same test side, and the training side in as many folds, clip by clip, classes balanced."""
    training = splits.training
    names = [dataset.clips.video_ids[row] for row in training]
    labels = [dataset.clips.class_names[dataset.clips.labels[row]] for row in training]
    folds = max(2, splits.folds)
    dealt = assign_groups(names, labels, folds=folds, test_share=0.0, seed=seed)
    sides = splits.sides.copy()
    sides[training] = [dealt[name] for name in names]
    return Splits(sides, folds)


def check_trial(clips: ClipSet, trial: TrialConfig) -> None:
    """Raises UserError for a trial that these clips cannot serve."""
    clips.seen_as(trial.view)
    steps, classes = clips.features.shape[1], len(clips.class_names)
    if trial.inputs != "features" and steps < 2:
        raise UserError(f"--inputs {trial.inputs}: the features have one step, so there are no differences")
    if isinstance(trial.focal_alpha, list) and len(trial.focal_alpha) != classes:
        raise UserError(
            f"--focal-alpha has {len(trial.focal_alpha)} numbers for {classes} classes: "
            f"{', '.join(clips.class_names)}"
        )


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


def torn_groups(dataset: Dataset, splits: Splits) -> list[str]:
    """Named groups that stand on several sides, as only a given split can have them."""
    sides: dict[str, set[int]] = {}
    for group, side in zip(dataset.groups, splits.sides.tolist(), strict=True):
        sides.setdefault(group, set()).add(side)
    return sorted(group for group, found in sides.items() if len(found) > 1)


def data_digest(dataset: Dataset, splits: Splits) -> str:
    """Changes with any clip, label, side or kind of features that is learned from."""
    content = hashlib.sha256(splits.sides.tobytes() + dataset.clips.labels.tobytes())
    content.update(dataset.clips.fingerprint.encode())
    for words in (dataset.clips.video_ids, dataset.groups, [str(d) for d in dataset.content_digests]):
        content.update("\0".join(words).encode(errors="surrogateescape"))
    return content.hexdigest()[:32]


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
