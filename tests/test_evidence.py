import numpy as np
import pytest
from features import make_store

from raypipe.cluster import Claim
from raypipe.config import SplitConfig
from raypipe.dataset import load_dataset, split_dataset
from raypipe.evidence import evaluate_side, notes, score, versions
from raypipe.trial import ClipSet

CLIPS = ClipSet(
    ["a", "b", "c", "d"], np.zeros((4, 1, 1), np.float16), np.array([0, 0, 1, 1]), ["calm", "fight"]
)
PROBABILITIES = np.array([[0.4, 0.6], [0.1, 0.9], [0.2, 0.8], [np.nan, np.nan]], np.float32)
TWO_CPUS = Claim(cpus=1, gpus=0, replicas=2)


def test_a_side_is_the_clips_that_have_an_answer():
    evaluation = evaluate_side(CLIPS, PROBABILITIES)
    assert (evaluation.clips, evaluation.accuracy) == (3, 1 / 3)
    assert score(evaluation, "accuracy") == 1 / 3


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (
            {"splits": ("train",) * 4 + ("val", "test")},
            "There is one validation side (the manifest's split col",
        ),
        ({"failed": 2}, "2 clips failed in extraction and take no part"),
        ({"grouped": False}, "The videos have no groups"),
        ({}, "GPU use, memory and energy were not measured: the cluster has no GPU."),
    ],
)
def test_what_a_reader_should_know(store, said, tmp_path):
    features = make_store(tmp_path, **store)
    dataset = load_dataset(features)
    splits = split_dataset(dataset, SplitConfig(), seed=0, store=features)
    told = notes(dataset, splits, TWO_CPUS)
    assert any(note.startswith(said) for note in told)
    assert any("the very clips" in note for note in told) == (splits.folds == 1)


def test_versions_name_what_the_numbers_depend_on():
    assert {"python", "raypipe", "ray", "keras", "tensorflow"} <= set(versions())
