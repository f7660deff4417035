import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import write_video
from networks import onnx_model
from runs import Run, extract, object_store, one_ray, write_videos

from raypipe.backbones import load_backbone
from raypipe.config import EmbeddingConfig, ExtractConfig, LimitsConfig, SamplingConfig
from raypipe.decode import ClipRequest, decode_clips
from raypipe.errors import RunFailed, UserError
from raypipe.extract import gpus_for, main
from raypipe.reading import read_yaml
from raypipe.shards import features_array
from raypipe.store import FeatureStore


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with one_ray():
        yield


BIG = LimitsConfig(max_pixels=128 * 96)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, _ray: None) -> Run:
    """Six videos, of which three fail: one is cut, one is text, one is larger than allowed."""
    run = Run(tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("first") / "features")
    write_video(run.videos / "calm" / "1.mp4")
    write_video(run.videos / "calm" / os.fsdecode(b"2\xff.mp4"), frames=30)
    write_video(run.videos / "fight" / "3.avi", codec="mpeg4", frames=2)
    write_video(run.videos / "fight" / "big.mp4", size=(160, 96))
    cut = write_video(run.videos / "fight" / "cut.mp4")
    cut.write_bytes(cut.read_bytes()[:3000])
    (run.videos / "text.mp4").write_text("not a video\n" * 100)
    (run.videos / "notes.txt").write_text("ignored")
    main(run.config(limits=BIG))
    return run


@pytest.fixture
def again(first: Run, tmp_path: Path) -> Run:
    """A copy of the first run, to go on from."""
    shutil.copytree(first.videos, tmp_path / "videos")
    shutil.copytree(first.store, tmp_path / "features")
    return Run(tmp_path / "videos", tmp_path / "features")


NO_INDEX = "Invalid data found when processing input; mov,mp4,m4a,3gp,3g2,mj2: moov atom not found"

# --- the first run ----------------------------------------------------------------------------------


def test_every_video_is_one_row_with_outcome_and_reason(first: Run) -> None:
    assert first.rows("video_id", "label", "outcome", "reason", "message") == [
        ("calm/1.mp4", "calm", "ok", None, None),
        ("calm/2\\xff.mp4", "calm", "ok", None, None),
        ("fight/3.avi", "fight", "ok", None, None),
        ("fight/big.mp4", "fight", "failed", "too_large", "160x96 pixels are more than --max-pixels 12288"),
        ("fight/cut.mp4", "fight", "failed", "not_video", NO_INDEX),
        ("text.mp4", None, "failed", "not_video", NO_INDEX),
    ]


def test_rows_say_what_was_read(first: Run) -> None:
    path = first.videos / "calm" / "1.mp4"
    columns = ("path", "size_bytes", "modified_s", "width", "height", "fps", "frame_count", "codec", "end_s")
    status = path.stat()
    assert first.rows(*columns)[0] == pytest.approx(
        (str(path), status.st_size, status.st_mtime, 128, 96, 30, 60, "h264", 2.0)
    )


def test_features_are_those_of_the_pictures(first: Run) -> None:
    table = FeatureStore(first.store).read(["outcome", "frame_pts_s", "frame_ok", "features"])
    request = ClipRequest(
        frames=4,
        size=64,
        view="both",
        motion_gap_s=0.0667,
        min_frames=4,
        max_pixels=1 << 20,
        max_packets=1000,
        max_duration_s=1000.0,
    )
    (clip,) = decode_clips(str(first.videos / "calm" / "1.mp4"), request)
    vectors = load_backbone("efficientnet_lite0").network().session()(clip.pictures).astype(np.float16)
    stored = features_array(table["features"].slice(0, 1), FeatureStore(first.store).spec())[0]
    np.testing.assert_allclose(stored, np.concatenate([vectors[:4], vectors[4:]], axis=1), atol=2e-3)
    assert stored.shape == (4, 2 * 1280) and np.ptp(stored, axis=0).max() > 0.1
    assert table["frame_pts_s"][0].as_py() == clip.frame_pts_s
    assert table["frame_ok"][0].as_py() == [True] * 4
    assert table["features"].is_null().to_pylist() == [False] * 3 + [True] * 3


def test_what_lies_beside_the_shards(first: Run) -> None:
    names = {path.name for path in first.store.iterdir()} - first.shards().keys()
    assert names == {".lock", "features.json", "summary.json", "config.yaml", "failures.csv"}
    assert read_yaml(ExtractConfig, first.store / "config.yaml") == first.config(limits=BIG)
    summary = json.loads((first.store / "summary.json").read_text())
    assert (summary["videos"], summary["extracted"], summary["done_before"]) == (6, 6, 0)
    assert summary["outcomes"] == {"ok": 3, "failed": 3}
    assert summary["reasons"] == {"too_large": 1, "not_video": 2}
    assert summary["cpu_s"].keys() == {"decode", "embed"} and min(summary["cpu_s"].values()) > 0


def test_a_network_of_ones_own(again: Run, tmp_path: Path, _ray: None) -> None:
    """It is loaded to extract, and no more to find that nothing is to be done."""
    network = tmp_path / "means.onnx"
    network.write_bytes(onnx_model(size=64))
    own = Run(again.videos, tmp_path / "own")
    embedding = EmbeddingConfig(backbone=str(network))
    main(own.config(embedding=embedding, limits=BIG))
    spec = FeatureStore(own.store).spec()
    assert (spec.backbone, spec.dim) == ("means.onnx", 6)
    (features,) = features_array(FeatureStore(own.store).read(["features"])["features"].slice(0, 1), spec)
    assert features.shape == (4, 6) and features[:, :3].min() > 0
    done = run_elsewhere(f"""
from raypipe.config import EmbeddingConfig
embedding = EmbeddingConfig(backbone={str(network)!r})
summary = main(config_of({str(again.videos)!r}, {str(own.store)!r}, embedding=embedding))
print(summary["extracted"], sorted({{"ray", "av", "onnxruntime", "keras", "pandas"}} & sys.modules.keys()))
""")
    assert done.stdout == "0 []\n", done.stderr
    other = tmp_path / "other.onnx"
    other.write_bytes(onnx_model(size=64, gain=2.0))
    network.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"weights_digest is .* there and .* here"):
        main(own.config(embedding=embedding))


def test_gpus_embed_what_the_cores_decode(first: Run, tmp_path: Path) -> None:
    """On GPUs that Ray only believes in: where each step runs, not how fast."""
    own = Run(first.videos, tmp_path / "features")
    done = run_elsewhere(f"""
import os
os.environ["RAYPIPE_FAKE_GPUS"] = "1"
import ray
from raypipe import workers
from raypipe.config import LimitsConfig
places = Path({str(tmp_path)!r})
def note(step):
    ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    (places / f"{{step}}-{{os.getpid()}}").write_text(",".join(ids))
class DecodeTables(workers.DecodeTables):
    def __init__(self, *given):
        note("decode")
        super().__init__(*given)
class EmbedTables(workers.EmbedTables):
    def __init__(self, *given):
        note("embed")
        super().__init__(*given)
workers.DecodeTables, workers.EmbedTables = DecodeTables, EmbedTables
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
limits = LimitsConfig(max_pixels=128 * 96)
print(main(config_of({str(own.videos)!r}, {str(own.store)!r}, limits=limits))["outcomes"])
""")
    assert done.stdout == "{'ok': 3, 'failed': 3}\n", done.stderr
    held = {step: [p.read_text() for p in tmp_path.glob(f"{step}-*")] for step in ("decode", "embed")}
    assert set(held["decode"]) == {""} and len(held["decode"]) == 2
    assert set(held["embed"]) <= {"0", "1"} and held["embed"]
    features = {
        store: FeatureStore(store).read(["video_id", "outcome", "reason", "features"])
        for store in (own.store, first.store)
    }
    assert features[own.store].equals(features[first.store])


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("gpu", 0, "--device gpu: the cluster has no GPU"),
        ("gpu", 2, "--device gpu: this ONNX Runtime cannot"),
    ],
)
def test_gpus_that_are_asked_for_in_vain(device: str, gpus: int, words: str) -> None:
    network = load_backbone("efficientnet_lite0").network()
    with pytest.raises(UserError, match=words):
        gpus_for(network, gpus, EmbeddingConfig(device=device))
    assert gpus_for(network, gpus, EmbeddingConfig(device="cpu")) == 0
    assert gpus_for(network, gpus, EmbeddingConfig()) == 0


# --- further runs -----------------------------------------------------------------------------------


def run_elsewhere(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a fresh process, with `main`, `config_of` and `Path` at hand."""
    preamble = """
import sys
from pathlib import Path
from raypipe.config import ExtractConfig, SamplingConfig
from raypipe.extract import gpus_for, main
def config_of(input, output, **fields):
    sampling = SamplingConfig(frames=4, frame_size=64)
    return ExtractConfig(input=input, output=output, sampling=sampling, **fields)
"""
    return subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True)


def test_pictures_do_not_pass_through_the_object_store(tmp_path: Path, _ray: None) -> None:
    """Theirs would be twice what the object store holds."""
    videos, network = write_videos(tmp_path / "videos", 30), tmp_path / "means.onnx"
    network.write_bytes(onnx_model(size=224))
    run, before = Run(videos, tmp_path / "features"), object_store()
    embedding, sampling = EmbeddingConfig(backbone=str(network)), SamplingConfig(frames=16, view="both")
    assert main(run.config(embedding=embedding, sampling=sampling))["outcomes"] == {"ok": 30}
    after = object_store()
    pictures = 30 * 2 * 16 * 224 * 224 * 3
    assert after["spilled"] == 0 and after["created"] - before["created"] < pictures / 100


def test_with_nothing_new_no_ray_and_no_decoder(again: Run) -> None:
    before = again.shards()
    done = run_elsewhere(f"""
summary = main(config_of({str(again.videos)!r}, {str(again.store)!r}))
print(summary["done_before"], summary["extracted"], sorted({{"ray", "av"}} & sys.modules.keys()))
""")
    assert done.stdout == "6 0 []\n", done.stderr
    assert again.shards() == before


def test_a_new_label_reaches_the_rows_without_decoding(again: Run) -> None:
    manifest = again.videos / "labels.csv"
    manifest.write_text("path,label,group,split\ncalm/1.mp4,busy,g1,test\nfight/3.avi,fight,,\n")
    done = run_elsewhere(f"""
summary = main(config_of({str(manifest)!r}, {str(again.store)!r}))
print(summary["done_before"], summary["extracted"], sorted({{"ray", "av"}} & sys.modules.keys()))
""")
    assert done.stdout == "2 0 []\n", done.stderr
    rows = again.rows("video_id", "label", "group", "split", "outcome")
    assert rows[0] == ("calm/1.mp4", "busy", "g1", "test", "ok")
    assert rows[2:4] == [
        ("fight/3.avi", "fight", None, None, "ok"),
        ("fight/big.mp4", "fight", None, None, "failed"),
    ]


def test_what_is_new_changed_or_tried_again_is_extracted_and_nothing_else(again: Run, _ray: None) -> None:
    """A larger limit alone is no reason to try again."""
    assert main(again.config())["extracted"] == 0

    write_video(again.videos / "calm" / "0.mp4", frames=10)
    write_video(again.videos / "calm" / "1.mp4", frames=20)
    names = ("calm/0.mp4", "calm/1.mp4", "fight/3.avi", "fight/big.mp4", "fight/cut.mp4", "fight/none.mp4")
    manifest = again.videos / "labels.csv"
    manifest.write_text("path,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in names))
    unchanged = features_of(again, "fight/3.avi")
    summary = main(again.config(input=str(manifest), retry_failed=True))
    assert (summary["extracted"], summary["done_before"]) == (5, 1)
    assert summary["outcomes"] == {"ok": 4, "failed": 2}
    assert again.rows("video_id", "frame_count", "outcome", "reason") == [
        ("calm/0.mp4", 10, "ok", None),
        ("calm/1.mp4", 20, "ok", None),
        ("calm/2\\xff.mp4", 30, "ok", None),
        ("fight/3.avi", 2, "ok", None),
        ("fight/big.mp4", 60, "ok", None),
        ("fight/cut.mp4", None, "failed", "not_video"),
        ("fight/none.mp4", None, "failed", "missing"),
        ("text.mp4", None, "failed", "not_video"),
    ]
    np.testing.assert_array_equal(features_of(again, "fight/3.avi"), unchanged)


def features_of(run: Run, video_id: str) -> np.ndarray:
    table = FeatureStore(run.store).read(["video_id", "features"])
    place = table["video_id"].to_pylist().index(video_id)
    return features_array(table["features"].slice(place, 1), FeatureStore(run.store).spec())


@pytest.mark.parametrize(
    ("max_failed", "passes"), [(3, True), (2, False), (0.5, True), (0.4, False), (0, False)]
)
def test_max_failed(max_failed: float, passes: bool, again: Run) -> None:
    if passes:
        main(again.config(max_failed=max_failed))
        return
    with pytest.raises(RunFailed) as caught:
        main(again.config(max_failed=max_failed))
    assert str(caught.value) == (
        f"3 of 6 videos failed, more than --max-failed {max_failed:g}; "
        f"everything finished is kept in {again.store}"
    )
    assert len(again.rows("video_id")) == 6


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--input nowhere", 2, "--input nowhere: does not exist; give a folder"),
        ("--input empty", 2, "--input empty: no videos found"),
        ("--input nopath.csv", 2, "--input nopath.csv: has no column path; its columns are: file"),
        (
            "--input twice.csv",
            2,
            "--input twice.csv: the video {folder}/v.mp4 is listed 2 times; list it once",
        ),
        ("--input gone.csv", 2, "--input gone.csv: none of its 1 videos exists"),
        ("--input v --backbone vgg", 2, "--backbone vgg: unknown backbone; choose from: efficientnet_lite0"),
        ("--input v --view depth", 2, "invalid choice 'depth' for argument '--view'"),
        ("--input v --framez 4", 2, "Unrecognized options: --framez, 4; did you mean --frames?"),
        ("--input v --frames 0", 2, "--frames 0: must be greater than or equal to 1"),
        ("--config typo.yaml", 2, "typo.yaml: sampling.framez is not a field; did you mean frames?"),
        ("--config none.yaml", 2, "--config none.yaml: No such file or directory"),
        ("--input v --output v.mp4", 2, "--output {folder}/v.mp4: cannot be written: File exists"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: str, status: int, said: str, tmp_path: Path) -> None:
    files = {
        "v.mp4": "x",
        "v/v.mp4": "x",
        "empty/readme.md": "x",
        "nopath.csv": "file\nv.mp4\n",
        "twice.csv": "path,label\nv.mp4,a\n./v.mp4,b\n",
        "gone.csv": "path\ngone.mp4\n",
        "typo.yaml": "sampling: {framez: 4}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    command = [sys.executable, "-m", "raypipe.extract", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status and done.stdout == ""
    *logged, error = done.stderr.splitlines()
    assert error.startswith(f"error: {said.replace('{folder}', str(tmp_path))}")
    assert "Traceback" not in done.stderr and len(logged) <= 1
    assert not (tmp_path / "results").exists()


def test_other_features_in_the_store_and_too_many_failures(first: Run) -> None:
    here = ["--input", str(first.videos), "--output", str(first.store)]
    other = extract(*here, "--view", "rgb")
    assert other.communicate()[1].splitlines()[-1] == (
        f"error: --output {first.store}: holds other features: view is both there and rgb here, "
        "dim is 2560 there and 1280 here; choose another --output"
    )
    failed = extract(*here, "--max-failed", "2")
    said = "error: 3 of 6 videos failed, more than --max-failed 2; everything finished is kept in "
    assert failed.communicate()[1].splitlines()[-1] == f"{said}{first.store}"
    assert (other.returncode, failed.returncode) == (2, 1)
