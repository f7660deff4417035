"""`predict` on real Ray, real videos and a real Keras model whose weights are random."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from clips import Frame, draw_frame, write_video
from ray._private.utils import get_num_cpus
from runs import SAMPLING, one_ray
from s3 import Bucket
from saved import CLASSES, save_model

from raypipe.backbones import load_backbone
from raypipe.config import PredictConfig, SamplingConfig
from raypipe.errors import RunFailed, UserError
from raypipe.extract import feature_spec
from raypipe.predict import extraction_of, main, refuse_other_features
from raypipe.saved_model import open_model
from raypipe.schema import FeatureSpec
from raypipe.shards import features_array
from raypipe.storage import RemotePath
from raypipe.store import FeatureStore


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with one_ray():
        yield


def spec_of(**sampling: object) -> FeatureSpec:
    return feature_spec(SAMPLING.model_copy(update=sampling), load_backbone("efficientnet_lite0"))


def write_input(folder: Path) -> Path:
    """Four videos with labels, of which one is cut, one with a label that no model knows, one without."""
    for number, name in enumerate(("calm/1", "calm/2", "fight/3", "party/4", "5")):
        write_video(folder / f"{name}.mp4", frames=30 + number, size=(64, 48))
    cut = write_video(folder / "fight" / "cut.mp4", size=(64, 48))
    cut.write_bytes(cut.read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory, _ray: None) -> Path:
    """A folder with videos, a run and the predictions."""
    folder = tmp_path_factory.mktemp("predict")
    write_input(folder / "videos")
    save_model(folder / "run", spec_of())
    main(config_for(folder))
    return folder


def config_for(folder: Path, **fields: object) -> PredictConfig:
    paths = {"model": folder / "run", "input": folder / "videos", "output": folder / "out"}
    return PredictConfig.model_validate({k: str(path) for k, path in paths.items()} | fields)


def rows_of(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(folder / "out" / "predictions.parquet").to_pylist()
    return rows


def store_of(folder: Path) -> FeatureStore:
    (store,) = (folder / "out").glob("features-*")
    return FeatureStore(store)


def test_every_video_is_a_row_by_name_and_failed_ones_have_no_answer(predicted: Path) -> None:
    rows = rows_of(predicted)
    assert [(row["video_id"], row["label"], row["outcome"], row["reason"]) for row in rows] == [
        ("5.mp4", None, "ok", None),
        ("calm/1.mp4", "calm", "ok", None),
        ("calm/2.mp4", "calm", "ok", None),
        ("fight/3.mp4", "fight", "ok", None),
        ("fight/cut.mp4", "fight", "failed", "not_video"),
        ("party/4.mp4", "party", "ok", None),
    ]
    for row in rows:
        answer = (row["predicted"], row["probability_calm"], row["probability_fight"])
        assert (None in answer) == (row["outcome"] == "failed")
        assert row["outcome"] != "failed" or answer == (None, None, None)


def test_probabilities_are_the_models_over_the_stored_features(predicted: Path) -> None:
    store = store_of(predicted)
    table = store.read(["outcome", "features"])
    known = [i for i, outcome in enumerate(table["outcome"].to_pylist()) if outcome == "ok"]
    model = open_model(predicted / "run" / "best")
    expected = model.predict(features_array(table["features"], store.spec())[known])
    rows = [rows_of(predicted)[i] for i in known]
    found = [[row[f"probability_{name}"] for name in CLASSES] for row in rows]
    np.testing.assert_allclose(np.array(found, np.float32), expected, atol=1e-6)
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in model.calibration.answers(expected)]


def test_the_csv_has_the_same_rows(predicted: Path) -> None:
    lines = list(csv.DictReader((predicted / "out" / "predictions.csv").read_text().splitlines()))
    assert [line["video_id"] for line in lines] == [row["video_id"] for row in rows_of(predicted)]
    assert list(lines[0]) == list(rows_of(predicted)[0])
    assert float(lines[1]["probability_calm"]) == pytest.approx(rows_of(predicted)[1]["probability_calm"])


def test_labels_that_the_model_knows_are_scored(predicted: Path) -> None:
    summary = json.loads((predicted / "out" / "summary.json").read_text())
    rows = [row for row in rows_of(predicted) if row["label"] in CLASSES and row["predicted"]]
    judged = summary["judged"]
    assert (judged["clips"], judged["groups"], judged["clips_tuned_on"]) == (3, 3, 0)
    assert judged["accuracy"] == np.mean([row["label"] == row["predicted"] for row in rows])
    low, high = judged["accuracy_interval"]
    assert 0 <= low <= judged["accuracy"] <= high <= 1
    assert summary["unknown_labels"] == ["party"]
    assert summary["outcomes"] == {"ok": 5, "failed": 1}
    assert {"raypipe", "keras"} <= summary["versions"].keys()


def run_predict(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raypipe.predict", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)


def test_again_with_nothing_new_nothing_is_decoded(predicted: Path) -> None:
    before, shards = rows_of(predicted), [s.stat().st_mtime_ns for s in store_of(predicted).shards()]
    run = run_predict(predicted, "--model", "run", "--input", "videos", "--output", "out")
    assert run.returncode == 0, run.stderr
    assert "6 videos: 6 done before, 0 to do" in run.stderr
    assert "dashboard" not in run.stderr, "no Ray"
    assert "port.cc" not in run.stderr, "TensorFlow's greetings are kept from the screen"
    assert run.stderr.splitlines()[-1].endswith("out/predictions.csv")
    assert [s.stat().st_mtime_ns for s in store_of(predicted).shards()] == shards
    assert rows_of(predicted) == before


def test_only_the_listed_videos_are_predicted(predicted: Path, tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text(f"path,video_id\n{predicted}/videos/calm/1.mp4,calm/1.mp4\n")
    before = rows_of(predicted)
    summary = main(config_for(predicted, input=str(tmp_path / "some.csv")))
    assert [row["video_id"] for row in rows_of(predicted)] == ["calm/1.mp4"]
    assert (summary["clips"], summary["judged"]) == (1, None)
    assert len(store_of(predicted).read(["video_id"])) == 6, "what was extracted is kept"
    main(config_for(predicted))
    assert rows_of(predicted) == before


def test_a_row_for_each_window_as_the_model_was_tuned(predicted: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "run", spec_of(window_s=0.5, stride_s=0.5))
    write_video(tmp_path / "videos" / "long.mp4", frames=45, size=(64, 48))
    main(config_for(tmp_path))
    rows = rows_of(tmp_path)
    assert [(row["clip_index"], row["start_s"]) for row in rows] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert all(row["predicted"] for row in rows)


def test_too_many_failures_are_status_1_with_all_rows_written(predicted: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "run", spec_of())
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_text("not a video")
    with pytest.raises(RunFailed, match=r"1 of 1 videos failed, more than --max-failed 0\.5"):
        main(config_for(tmp_path))
    assert [(row["video_id"], row["predicted"]) for row in rows_of(tmp_path)] == [("text.mp4", None)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights_digest": "f" * 16}, r"weights_digest is \w{16} here and f{16} there"),
        ({"backbone": "vgg99"}, r"the model needs features of backbone vgg99: .*unknown backbone"),
    ],
)
def test_features_that_this_machine_cannot_make_are_refused(
    change: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    model = open_model(save_model(tmp_path / "run", replace(spec_of(), **change)) / "best")
    with pytest.raises(UserError, match=sentence):
        refuse_other_features(model, extraction_of(config_for(tmp_path), model))


def test_the_extraction_takes_all_that_settles_features_from_the_model(tmp_path: Path) -> None:
    spec = replace(
        spec_of(), frames=7, steps=7, frame_size=96, view="motion", dim=1280, motion_gap_s=0.1,
        window_s=3.0, stride_s=1.0, min_frames=2,
    )  # fmt: skip
    extraction = extraction_of(PredictConfig(output="out"), open_model(save_model(tmp_path, spec) / "best"))
    assert extraction.sampling == SamplingConfig(
        frames=7, frame_size=96, view="motion", motion_gap_s=0.1, window_s=3.0, stride_s=1.0, min_frames=2
    )
    assert feature_spec(extraction.sampling, load_backbone(extraction.embedding.backbone)) == spec
    assert extraction.output == f"out/features-{spec.fingerprint}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "results/ holds no model yet; run python -m raypipe.tune first"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--max-failed", "-1"], "--max-failed -1: must be greater than or equal to 0"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    run = run_predict(tmp_path, *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert sentence in run.stderr


def test_predictions_that_cannot_be_written_are_one_sentence(predicted: Path, tmp_path: Path) -> None:
    shutil.copytree(predicted / "out", tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    (tmp_path / "out" / "summary.json").mkdir()
    with pytest.raises(RunFailed, match=r"^--output .*/out: cannot be written: Is a directory$"):
        main(config_for(predicted, output=str(tmp_path / "out")))


def test_model_and_predictions_may_lie_in_a_bucket(predicted: Path) -> None:
    """With all features there already, so that no worker is needed."""
    bucket = Bucket()
    store = store_of(predicted)
    files = {file.name: file.read_bytes() for file in Path(str(store.path)).iterdir() if file.is_file()}
    name = Path(str(store.path)).name
    bucket.put({f"out/{name}/{key}": content for key, content in files.items() if key != ".lock"})
    best = predicted / "run" / "best"
    bucket.put({f"run/best/{file.name}": file.read_bytes() for file in best.iterdir()})
    with pytest.raises(UserError, match=r"--model s3://.*/ru\?.*: no such folder"):
        main(config_for(predicted, output=bucket.uri("out"), model=bucket.uri("ru")))
    summary = main(config_for(predicted, output=bucket.uri("out"), model=bucket.uri("run")))
    assert summary["model"] == str(RemotePath(bucket.uri("run")) / "best")
    assert {"out/predictions.csv", "out/predictions.parquet", "out/summary.json"} <= set(bucket.names())
    rows = pq.read_table(io.BytesIO(bucket.get("out/predictions.parquet"))).to_pylist()
    assert rows == rows_of(predicted)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_three_commands_one_after_the_other(tmp_path: Path) -> None:
    """Extract, tune and predict as a person types them; the report shows the mistakes' frames."""
    sampling = ["--frames", "4", "--frame-size", "64"]
    for number in range(24):
        label = ("calm", "fight")[number % 2]

        def draw(frame: int, width: int, height: int, number: int = number) -> Frame:
            return draw_frame(frame * (1 + 8 * (number % 2)) + number, width, height)

        write_video(tmp_path / "videos" / label / f"{number}.mp4", frames=30, size=(64, 48), draw=draw)
    # With all cores for one training, so that the last two wait for each other.
    cores = ["--gpus-per-trial", "1", "--cpus-per-trial", str(get_num_cpus())]
    tuning = ["--num-samples", "2", "--epochs", "4", "--folds", "2", "--protocol", "both", *cores]
    for command in (
        ["extract", "--input", "videos", *sampling],
        ["tune", *tuning],
        ["predict", "--input", "videos"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", f"raypipe.{command[0]}", *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    assert "24 of these 24 clips belong to the features that the model was tuned on" in run.stderr
    rows = pq.read_table(tmp_path / "results" / "predictions" / "predictions.parquet").to_pylist()
    assert len(rows) == 24 and all(row["predicted"] for row in rows)
    # The test side is predicted here as it was when the model was made.
    known = list(
        csv.DictReader((tmp_path / "results" / "tune" / "best" / "predictions.csv").read_text().splitlines())
    )
    test = {row["video_id"]: float(row["p_calm"]) for row in known if row["side"] == "test"}
    found = {row["video_id"]: row["probability_calm"] for row in rows if row["video_id"] in test}
    assert test and found == pytest.approx(test, abs=2e-3)
    page = (tmp_path / "results" / "tune" / "report.html").read_text()
    for section in ("settings", "yardstick", "decisions", "calibration", "misses", "leaks", "cost", "repeat"):
        assert f'id="{section}"' in page
    assert "Random folds ignore groups" in page
