"""The model in best/: found, opened, and asked."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from features import SPEC, make_store
from saved import save_model

from raypipe.errors import UserError
from raypipe.saved_model import find_model, open_model, softmax

FEATURES = np.random.default_rng(0).normal(size=(300, SPEC.steps, SPEC.dim)).astype(np.float16)


def test_it_answers_as_plain_keras_does_with_temperature_and_threshold(tmp_path: Path) -> None:
    import keras

    model = open_model(find_model(str(save_model(tmp_path / "run", SPEC, threshold=0.4)), results=tmp_path))
    logits = keras.models.load_model(tmp_path / "run" / "best" / "model.keras")(FEATURES.astype(np.float32))
    expected = np.asarray(keras.ops.softmax(logits / 2.0))
    probabilities = model.predict(FEATURES)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    answers = model.calibration.answers(probabilities)
    assert answers.tolist() == (expected[:, 1] >= 0.4).tolist()
    assert answers.tolist() != expected.argmax(axis=1).tolist()
    assert model.predict(FEATURES[:0]).shape == (0, 2)


def test_a_model_of_one_view_sees_that_half(tmp_path: Path) -> None:
    spec = replace(SPEC, view="both", dim=2 * SPEC.dim)
    other = np.zeros_like(FEATURES)
    for view, sides in (("rgb", [FEATURES, other]), ("motion", [other, FEATURES])):
        model = open_model(save_model(tmp_path / view, spec, view=view) / "best")
        whole = open_model(save_model(tmp_path / f"{view}-alone", SPEC) / "best")
        seen = model.predict(np.concatenate(sides, axis=2))
        np.testing.assert_allclose(seen, whole.predict(FEATURES), atol=1e-6)


def test_softmax_of_large_logits() -> None:
    assert softmax(np.array([[1000.0, 0.0], [-1000.0, -1000.0]])).tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_the_newest_run_with_a_model_is_the_default(tmp_path: Path) -> None:
    for age_s, name in enumerate(("tune-2", "tune", "mine")):
        file = tmp_path / name / "best" / "model.json"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        os.utime(file, (1000 - age_s, 1000 - age_s))
    (tmp_path / "tune-3" / "trials").mkdir(parents=True)  # still running
    assert find_model(None, results=tmp_path) == tmp_path / "tune-2" / "best"
    for given in (tmp_path / "mine", tmp_path / "mine" / "best"):
        assert find_model(str(given), results=tmp_path) == tmp_path / "mine" / "best"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, "holds no model yet; run python -m raypipe.tune first, or name a run with --model"),
        ("nowhere", "--model nowhere: no such folder; name one that python -m raypipe.tune wrote"),
        ("running", "--model running: has no best/ with a model; its search has not ended, or it is no run"),
    ],
)
def test_no_model(given: str | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "running").mkdir()
    with pytest.raises(UserError) as error:
        find_model(given, results=Path("results"))
    assert str(error.value).endswith(sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"classes": None}, "'NoneType' object is not iterable"),
        ({"features": {"schema_version": 1}}, "features of schema_version 1"),
        ({"features": {}}, "has no 'schema_version'"),
    ],
)
def test_a_model_that_cannot_be_read(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    file = save_model(tmp_path, SPEC) / "best" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        UserError, match=r"is not a model of this version of raypipe: .*; tune again"
    ) as error:
        open_model(file.parent)
    assert sentence in str(error.value)
    file.write_text("{")
    with pytest.raises(UserError, match="is not a model of this version of raypipe"):
        open_model(file.parent)


def test_a_damaged_network_is_one_sentence(tmp_path: Path) -> None:
    best = save_model(tmp_path, SPEC) / "best"
    (best / "model.keras").write_bytes((best / "model.keras").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.keras: does not load in Keras 3"):
        open_model(best).predict(FEATURES)


def test_it_knows_which_clips_it_was_tuned_on(tmp_path: Path) -> None:
    make_store(tmp_path / "features", clips=4)
    knows = open_model(save_model(tmp_path / "run", SPEC, store=tmp_path / "features") / "best")
    assert knows.content_digests() == {f"{i:016x}" for i in range(4)}
    gone = open_model(save_model(tmp_path / "other", SPEC, store=tmp_path / "gone") / "best")
    assert gone.content_digests() == set()
