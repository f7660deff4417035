"""From nothing to a file to flags, and what is said of a mistake."""

import resource
import uuid
from pathlib import Path

import pytest
from mistakes import error_in_file, error_of, load

from raypipe.config import (
    DEFAULT_SPACE,
    Command,
    CompareConfig,
    ExtractConfig,
    LimitsConfig,
    PredictConfig,
    SamplingConfig,
    TrialConfig,
    TuneConfig,
)
from raypipe.reading import read_yaml, write_yaml
from raypipe.space import Range
from raypipe.storage import RemotePath


@pytest.mark.parametrize("kind", [ExtractConfig, TuneConfig, PredictConfig, CompareConfig])
def test_without_arguments_the_defaults(kind: type[Command]) -> None:
    assert load(kind) == kind()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("output: there\nsampling: {frames: 8, view: rgb}\nlimits: {timeout_s: 5}\n")
    config = load(ExtractConfig, "--config", str(file), "--frames", "4", "--max-failed=3")
    assert config == ExtractConfig(
        config=str(file),
        output="there",
        max_failed=3,
        sampling=SamplingConfig(frames=4, view="rgb"),
        limits=LimitsConfig(timeout_s=5),
    )


@pytest.mark.parametrize("flag", ["--learning-rate=0.01", "--learning_rate=0.01"])
def test_a_flag_is_no_longer_searched(flag: str) -> None:
    config = load(TuneConfig, flag, "--width", "32")
    assert isinstance(config, TuneConfig)
    assert config.trial == TrialConfig(learning_rate=0.01, width=32)
    assert config.space.keys() == DEFAULT_SPACE.keys() - {"learning_rate", "width"}


@pytest.mark.parametrize("flag", ["--no-class-weights", "--no_class_weights", "--class-weights"])
def test_a_flag_that_says_yes_or_no_is_no_longer_searched(flag: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("space: {class_weights: [true, false], dropout: [0.1]}\n")
    config = load(TuneConfig, "--config", str(file), flag)
    assert isinstance(config, TuneConfig)
    assert (config.trial.class_weights, config.space) == ("no" not in flag, {"dropout": [0.1]})


def test_a_mistake_in_a_field_of_several_types_names_them(tmp_path: Path) -> None:
    said = "must be a number, a list or 'balanced'"
    for value, given in [("{a: 1}", "{'a': 1}"), ("half", "'half'")]:
        error = error_in_file(TuneConfig, f"trial: {{focal_alpha: {value}}}", tmp_path)
        assert error == f"trial.focal_alpha = {given}: {said}"
    error = error_in_file(TuneConfig, "trial: {focal_alpha: -1}", tmp_path)
    assert error == "trial.focal_alpha = -1: must be greater than 0"


def test_the_last_file_given_is_the_one_read(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for frames, file in enumerate(files, start=5):
        file.write_text(f"sampling: {{frames: {frames}}}")
    config = load(ExtractConfig, "--config", str(files[0]), f"--config={files[1]}")
    assert isinstance(config, ExtractConfig)
    assert (config.config, config.sampling.frames) == (str(files[1]), 6)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ExtractConfig, "--frames INT T, frames per clip. (default: 16)"),
        (
            ExtractConfig,
            "--timeout-s FLOAT Seconds that decoding a clip may take: a whole video, or one window of it. "
            "(default: 60.0)",
        ),
        (TuneConfig, "--num-samples INT Number of trials. (default: 5)"),
        (TuneConfig, "--batch-size INT Clips per step over all replicas. (default: 32)"),
    ],
)
def test_help_says_meaning_unit_and_default(
    kind: type[Command], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load(kind, "--help")
    assert not stop.value.code
    assert said in " ".join(capsys.readouterr().out.replace("│", " ").split())


NO_TRUTH = "must be a number; YAML reads yes, no, on and off as true and false"

# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("outptu: x", "outptu is not a field; did you mean output?"),
        ("sampling: {framez: 3}", "sampling.framez is not a field; did you mean frames?"),
        ("embedding: {net: 1}", "embedding.net is not a field; fields are: backbone, weights, device"),
        ("frames: 8", "frames is not a field; it belongs under sampling:"),
        ("sampling: {timeout_s: 3}", "sampling.timeout_s is not a field; it belongs under limits:"),
        ("sampling: {output: x}", "sampling.output is not a field; it belongs outside of any section"),
        ("sampling: {frames: 0}", "sampling.frames = 0: must be greater than or equal to 1"),
        ("sampling: {view: rgbx}", "sampling.view = 'rgbx': must be 'rgb', 'motion' or 'both'"),
        ("sampling: 3", "sampling = 3: must be a mapping"),
        ("limits: {timeout_s: .inf}", "limits.timeout_s = inf: must be less than or equal to 1000000"),
        ("max_failed: -1", "max_failed = -1: must be greater than or equal to 0"),
        ("cpus: a", "cpus = 'a': must be a whole number"),
        ("input: ''", "input = '': must not be empty"),
        ("shard_rows: yes", f"shard_rows = True: {NO_TRUTH}"),
        ("sampling: {sample_fps: on}", f"sampling.sample_fps = True: {NO_TRUTH}"),
        ("retry_failed: 7", "retry_failed = 7: must be true or false"),
        ("- output", "must be a mapping of fields to values"),
    ],
)
def test_a_mistake_in_a_file(content: str, said: str, tmp_path: Path) -> None:
    assert error_in_file(ExtractConfig, content, tmp_path) == said


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    error = error_in_file(ExtractConfig, "output: [x", tmp_path)
    assert error.startswith("not YAML: while parsing a flow sequence")
    assert "line 1, column 9" in error


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert error_of(ExtractConfig, "--config", str(file)).startswith(f"{file}: not YAML: ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert error_of(TuneConfig, "--config", str(missing)) == f"--config {missing}: No such file or directory"
    assert error_of(TuneConfig, f"--config={tmp_path}") == f"--config {tmp_path}: Is a directory"


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (TuneConfig, "--num-samples 0", "--num-samples 0: must be greater than or equal to 1"),
        (TuneConfig, "--num_samples=0", "--num-samples 0: must be greater than or equal to 1"),
        (TuneConfig, "--seed 5 --seed -2", "--seed -2: must be greater than or equal to 0"),
        (TuneConfig, "--dropout 1", "--dropout 1: must be less than 1"),
        (TuneConfig, "--seed 2.5", "--seed 2.5: must be a whole number"),
        (TuneConfig, "--learning-rate x", "--learning-rate x: must be a number"),
        (
            TuneConfig,
            "--focal-alpha 0.3 x",
            "--focal-alpha 0.3 x: must be None, a number, numbers or balanced",
        ),
        (TuneConfig, "--max-concurrent many", "--max-concurrent many: must be None or a whole number"),
        (TuneConfig, "--config=", "--config '': must not be empty"),
        (TuneConfig, "--results=", "--results '': must not be empty"),
        (ExtractConfig, "--input=", "--input '': must not be empty"),
        (ExtractConfig, "--backbone=", "--backbone '': must not be empty"),
        (PredictConfig, "--input=", "--input '': must not be empty"),
        (PredictConfig, "--model=", "--model '': must not be empty"),
        (CompareConfig, "--before=", "--before '': must not be empty"),
        (
            TuneConfig,
            "--resume results/tune --retry-failed --seed 0",
            "--seed: with --resume a run goes on with the settings in its config.yaml; give no other flag",
        ),
        (TuneConfig, "--space width", "Unrecognized options: --space, width"),
        (
            ExtractConfig,
            "--view x",
            "invalid choice 'x' for argument '--view'. Expected one of ('rgb', 'motion', 'both')",
        ),
        (ExtractConfig, "--framez 3", "Unrecognized options: --framez, 3; did you mean --frames?"),
        (ExtractConfig, "--timeout-s -1", "--timeout-s -1: must be greater than 0"),
        (ExtractConfig, "--frames", "Missing value for argument '--frames'. Expected 1 values"),
        (ExtractConfig, "--config", "Missing value for argument '--config'. Expected 1 values"),
        (ExtractConfig, "videos", "Unrecognized options: videos"),
    ],
)
def test_a_mistake_in_a_flag(kind: type[Command], arguments: str, said: str) -> None:
    assert error_of(kind, *arguments.split()) == said


# --- files ------------------------------------------------------------------------------------------


def test_a_config_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_yaml(ExtractConfig(input="older"), file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_yaml(ExtractConfig(input="newer"), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_yaml(ExtractConfig, file).input == "older"
    assert list(tmp_path.iterdir()) == [file]


def test_a_config_in_a_bucket_reads_as_it_was() -> None:
    file = RemotePath(f"memory://{uuid.uuid4().hex}/config.yaml")
    write_yaml(ExtractConfig(input="ü"), file)
    assert read_yaml(ExtractConfig, file) == ExtractConfig(input="ü")


@pytest.mark.parametrize(
    "config",
    [
        ExtractConfig(),
        ExtractConfig(input="ü/*.mp4", cpus=3, sampling=SamplingConfig(view="motion")),
        TuneConfig(),
        TuneConfig(name="a", space={"batch_size": [8], "dropout": Range(low=0, high=0.5)}),
    ],
)
def test_what_is_written_reads_as_it_was(config: Command, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_yaml(config, file)
    assert read_yaml(type(config), file) == config
    assert load(type(config), "--config", str(file)) == config.model_copy(update={"config": str(file)})
