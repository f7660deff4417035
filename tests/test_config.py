import re
from pathlib import Path

import pytest

from raypipe.config import (
    AFTER,
    BEFORE,
    DEFAULT_SPACE,
    Command,
    CompareConfig,
    ExtractConfig,
    LimitsConfig,
    PredictConfig,
    Range,
    SamplingConfig,
    TrialConfig,
    TuneConfig,
    load_config,
    read_yaml,
    write_yaml,
)
from raypipe.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def load(kind: type[Command], *arguments: str) -> Command:
    return load_config(kind, arguments, prog=f"python -m raypipe.{kind.__name__}")


def error_of(kind: type[Command], *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(kind, *arguments)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2
    return str(caught.value)


# --- from nothing to flags --------------------------------------------------------------------------


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
        ("sampling: 3", "sampling = 3: must be a valid dictionary or instance of SamplingConfig"),
        ("limits: {timeout_s: .inf}", "limits.timeout_s = inf: must be less than or equal to 1000000"),
        ("max_failed: -1", "max_failed = -1: must be greater than or equal to 0"),
        ("cpus: a", "cpus = 'a': must be a valid integer, unable to parse string as an integer"),
        ("- output", "must be a mapping of fields to values"),
    ],
)
def test_a_mistake_in_a_file(content: str, said: str, tmp_path: Path) -> None:
    assert error_in_file(ExtractConfig, content, tmp_path) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("widht: [8]", "widht is not a field of a trial; did you mean width?"),
        ("width: []", "width has no values"),
        ("width: [32, 1]", "width: 1: must be greater than or equal to 4"),
        ("loss: [mse]", "loss: mse: must be 'cross_entropy' or 'focal'"),
        ("dropout: 0.3", "dropout = 0.3: must be a valid list"),
        ("dropout: {low: 0.5, high: 1.5}", "dropout: 1.5: must be less than 1"),
        ("dropout: {low: 0.5, high: 0}", "dropout = {'low': 0.5, 'high': 0}: low 0.5 must be below high 0"),
        (
            "dropout: {low: 0, high: 0.1, log: yes}",
            "dropout = {'low': 0, 'high': 0.1, 'log': True}: low 0 must be above 0 for a log range",
        ),
        ("dropout: {low: 0, high: 1, logg: yes}", "dropout.logg is not a field; did you mean log?"),
        ("dropout: {low: 0.1}", "dropout.high = {'low': 0.1}: Field required"),
    ],
)
def test_a_mistake_in_a_search_space(content: str, said: str, tmp_path: Path) -> None:
    assert error_in_file(TuneConfig, f"space: {{{content}}}", tmp_path) == f"space.{said}"


def error_in_file(kind: type[Command], content: str, folder: Path) -> str:
    file = folder / "mine.yaml"
    file.write_text(content)
    error = error_of(kind, "--config", str(file))
    assert error.startswith(f"{file}: ")
    return error.removeprefix(f"{file}: ")


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
        (TuneConfig, "--seed 2.5", "Error parsing --seed: invalid literal for int() with base 10: '2.5'"),
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


# --- fields that contradict each other ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--oversample", "class_weights and oversample each make rare classes count as much as common ones"),
        ("--loss focal --focal-alpha balanced", "class_weights and focal_alpha balanced each make"),
        (
            "--loss focal --focal-alpha 1.5",
            "focal_alpha 1.5 must be below 1: the other classes get 1 - alpha",
        ),
        ("--focal-alpha -1", "--focal-alpha -1: must be greater than 0"),
        ("--warmup-epochs 40", "warmup_epochs 40 must be below epochs 40: the learning rate would never"),
        (
            "--plateau-factor 0.5 --plateau-patience 10",
            "plateau_patience 10 must be below patience 10: the trial would stop before",
        ),
        ("--xla True --model gru", "xla cannot compile the cuDNN kernels of model gru"),
        (
            "--xla True --model tcn",
            "xla cannot compile a step that several devices share in TensorFlow;",
        ),
        ("--xla False --backend jax", "xla false: JAX always compiles with XLA"),
        ("--feeding fit --backend jax", "feeding fit is there to compare with the classic way"),
    ],
)
def test_fields_that_cannot_work_together_are_refused(arguments: str, said: str) -> None:
    assert error_of(TuneConfig, *arguments.split()).startswith(said)


@pytest.mark.parametrize(
    "arguments",
    [
        "--oversample --no-class-weights",
        "--loss focal --focal-alpha balanced --no-class-weights",
        "--loss focal --focal-alpha 0.25 0.75",
        "--focal-alpha balanced",  # cross-entropy has no alpha
        "--warmup-epochs 0.5 --epochs 1",
        "--plateau-factor 0.5",
        "--xla True --model tcn --gpus-per-trial 1",
        "--xla True --model tcn --backend jax",
        "--clip-norm None",
    ],
)
def test_fields_that_go_together_are_not(arguments: str) -> None:
    load(TuneConfig, *arguments.split())


def test_a_search_that_could_draw_what_cannot_work_is_refused(tmp_path: Path) -> None:
    content = "trial: {patience: 5}\nspace: {plateau_factor: [1, 0.5], plateau_patience: {low: 2, high: 5}}"
    assert error_in_file(TuneConfig, content, tmp_path) == (
        "the space can draw plateau_patience 5.0: plateau_patience 5 must be below patience 5: "
        "the trial would stop before its learning rate is lowered"
    )


# --- files ------------------------------------------------------------------------------------------


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


KINDS: dict[str, type[Command]] = {
    "extract": ExtractConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "compare": CompareConfig,
}


def kind_of(preset: Path) -> type[Command]:
    """The config of the command that the preset's comment gives."""
    command = re.search(rf"# .*python -m raypipe\.(\w+) --config configs/{preset.name}", preset.read_text())
    assert command, f"{preset.name} does not say which command uses it"
    return KINDS[command[1]]


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_loads_and_says_how_to_use_it(preset: Path) -> None:
    read_yaml(kind_of(preset), preset)


@pytest.mark.parametrize("name", KINDS)
def test_the_preset_of_a_command_is_its_built_in_default(name: str) -> None:
    assert read_yaml(KINDS[name], CONFIGS / f"{name}.yaml") == KINDS[name]()


@pytest.mark.parametrize(("name", "trial"), [("before", BEFORE), ("after", AFTER)])
def test_the_preset_of_a_way_to_train_is_the_built_in_one(name: str, trial: TrialConfig) -> None:
    preset = read_yaml(TuneConfig, CONFIGS / f"{name}.yaml")
    assert preset == TuneConfig(trial=trial, space={})


def test_a_space_of_ones_own_is_the_whole_space() -> None:
    assert TuneConfig().space_by_model and not TuneConfig(space={}).space_by_model
    given = {"tcn": {"depth": [4]}}
    assert TuneConfig(space={}, space_by_model=given).space_of("tcn") == {"depth": [4]}


def test_a_space_of_a_model_goes_over_that_of_all() -> None:
    trial = TrialConfig(model="gru")
    config = TuneConfig(
        trial=trial, space={"depth": [1], "width": [8]}, space_by_model={"tcn": {"depth": [4]}}
    )
    assert config.space_of("tcn") == {"depth": [4], "width": [8]}
    assert config.space_of("gru") == {"depth": [1], "width": [8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "space_by_model: {tcn: {wdith: [4]}}",
            "space_by_model.tcn.wdith is not a field of a trial; did you mean width?",
        ),
        (
            "space_by_model: {tcn: {model: [gru]}}",
            "space_by_model.tcn.model: the model is drawn from space.model",
        ),
        (
            "space: {width: [8, 16]}",
            "space.width: model linear never looks at it; search model too, or leave it out",
        ),
        ("search: grid", "space.dropout is a range; search grid needs a list of values"),
        ("space: {xla: {low: 0, high: 1}}", "space.xla is no number; give a list of values"),
        ("space: {width: [8, 8]}", "space.width has a value twice"),
        (
            "space_by_model: {tcn: {depth: [17]}}",
            "space_by_model.tcn.depth: 17: must be less than or equal to 16",
        ),
    ],
)
def test_a_mistake_in_a_space_by_model(content: str, said: str, tmp_path: Path) -> None:
    assert error_in_file(TuneConfig, content, tmp_path) == said


def test_every_field_of_a_trial_can_be_searched() -> None:
    trial = TrialConfig(model="gru", loss="focal", focal_alpha=[0.3, 0.7])
    space = {name: [value] for name, value in trial.model_dump().items()}
    assert TuneConfig(space=space).space["focal_alpha"] == [[0.3, 0.7]]
