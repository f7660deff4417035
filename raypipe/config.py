"""Typed configs: defaults here, a YAML file over them, flags over that, and help from the docstrings.

A command's config is made of sections; each part of raypipe receives its own section only. In YAML a
section is a mapping; as flags all fields stand side by side, so field names are unique in a command.
"""

import contextlib
import difflib
import io
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raypipe.errors import UserError

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, and no unknown fields: a typo is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Command(Section):
    """What every command takes."""

    config: str | None = None
    """YAML file with any of these fields; flags win over it. Presets are in configs/."""


# --- extract --------------------------------------------------------------------------------------


class SamplingConfig(Section):
    """Which frames of a clip the network sees, and how."""

    frames: Annotated[int, Field(ge=1, le=1024)] = 16
    """T, frames per clip, spread evenly over it."""
    frame_size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Width and height of a frame in pixels; the whole picture is scaled to it."""
    view: Literal["rgb", "motion", "both"] = "both"
    """rgb: the frames. motion: signed differences of two frames as pictures. both: side by side, 2 D."""
    motion_gap_s: Seconds = 0.0667
    """Seconds between the two frames of a motion picture; two frames at 30 a second."""
    min_frames: Count = 4
    """A damaged clip with fewer real frames than this is failed, not partial."""


class EmbeddingConfig(Section):
    """The network that turns frames into features."""

    backbone: str = "efficientnet_lite0"
    """Name of the backbone."""


class LimitsConfig(Section):
    """What one file may cost before it is given up."""

    timeout_s: Seconds = 60.0
    """Seconds that decoding a file may take."""
    max_memory_mb: Annotated[int, Field(ge=256)] = 2048
    """MiB of address space that decoding a file may take."""
    max_pixels: Count = 1 << 26
    """Width times height of a frame; larger ones are too_large."""
    max_packets: Count = 2_000_000
    """Frames in a file; longer ones are too_large. Two million are 18 hours at 30 a second."""


class ExtractConfig(Command):
    """Videos in, feature shards out: decode, embed, write, with every video accounted for by name."""

    input: str | None = None
    """Folder (sub-folder = label), manifest (.csv, .parquet, .jsonl), glob or URI; none: sample clips."""
    output: str = "results/features"
    """Folder of the feature store; running again adds only what is new."""
    retry_failed: bool = False
    """Take the videos that failed before once more."""
    max_failed: Annotated[float, Field(ge=0)] = 0.5
    """More failed videos than this end with status 1; below 1 a share of all videos, else a count."""
    shard_rows: Count = 64
    """Clips per Parquet shard; the most that a killed run has to do again per worker."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPU cores to use; none: all that the cluster has."""
    sampling: SamplingConfig = SamplingConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    limits: LimitsConfig = LimitsConfig()


# --- tune -----------------------------------------------------------------------------------------

ModelName = Literal["mean_pool", "bilstm_attention"]
Metric = Literal["auc", "accuracy", "balanced_accuracy", "macro_f1"]


class TrialConfig(Section):
    """One trial: a model and how it is trained. Fields named under `search` are drawn for each trial."""

    model: ModelName = "bilstm_attention"
    """mean_pool: an MLP over the mean and spread of the steps. bilstm_attention: a BiLSTM, then attention."""
    width: Annotated[int, Field(ge=4, le=4096)] = 64
    """Units of the hidden layers."""
    dropout: Share = 0.3
    """Share of activations dropped in training."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """AdamW's step size."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """AdamW's decoupled weight decay."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Clips per step over all replicas."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients of all replicas together are scaled down to this global norm."""
    class_weights: bool = True
    """Weigh each class by how rare it is, so that the rare one counts as much as the common one."""
    epochs: Count = 60
    """The most epochs a trial trains."""
    patience: Count = 10
    """Epochs without a better validation loss before a trial stops."""


class Range(Section):
    """Values between two numbers; `log` draws their logarithm evenly."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be above 0 for a log range")
        return self


SearchSpace = dict[str, list[bool | int | float | str] | Range]

DEFAULT_SEARCH: SearchSpace = {
    "model": ["mean_pool", "bilstm_attention"],
    "width": [32, 64, 128],
    "dropout": Range(low=0.1, high=0.6),
    "learning_rate": Range(low=5e-5, high=5e-4, log=True),
    "weight_decay": Range(low=0.01, high=0.3, log=True),
}


class SplitConfig(Section):
    """How clips are divided: a group is never on both sides."""

    folds: Annotated[int, Field(ge=2, le=100)] = 5
    """Parts of the training side; each is predicted by a model trained on the others."""
    test_share: Annotated[float, Field(ge=0, le=0.9)] = 0.2
    """Share of the clips set aside, read once, for the best trial only."""


class ResourcesConfig(Section):
    """What a trial claims from the cluster."""

    gpus_per_trial: Count = 2
    """GPUs that a trial trains on together; without any in the cluster, so many logical CPU devices."""
    cpus_per_trial: Count = 1
    """CPU cores that a trial claims."""


class TuneConfig(Command):
    """Feature shards in, the best model and its evidence out: trials on grouped folds, then a report."""

    features: str = "results/features"
    """Folder that raypipe.extract wrote."""
    name: str | None = None
    """The run is kept in results/NAME; none: tune, tune-2, and so on."""
    num_samples: Count = 5
    """Number of trials."""
    metric: Metric = "auc"
    """What ranks trials, on validation folds."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of splits, trials, weights and shuffling."""
    splits: SplitConfig = SplitConfig()
    resources: ResourcesConfig = ResourcesConfig()
    trial: TrialConfig = TrialConfig()
    search: Annotated[SearchSpace, tyro.conf.Suppress] = Field(default_factory=lambda: dict(DEFAULT_SEARCH))
    """What differs between trials: a list of values or {low, high, log} for each field; YAML only."""

    @model_validator(mode="after")
    def _searchable(self) -> "TuneConfig":
        for name, values in self.search.items():
            if name not in TrialConfig.model_fields:
                raise ValueError(
                    f"search.{name} is not a field of a trial{_did_you_mean(name, TrialConfig, TrialConfig)}"
                )
            if values == []:
                raise ValueError(f"search.{name} has no values")
            ends = [values.low, values.high] if isinstance(values, Range) else values
            for value in ends:
                try:
                    TrialConfig.model_validate({name: value}, strict=False)
                except ValidationError as error:
                    raise ValueError(f"search.{name}: {value}: {_rule(error.errors()[0])}") from None
        return self


# --- reading --------------------------------------------------------------------------------------

C = TypeVar("C", bound=Command)


def load_config(kind: type[C], arguments: Sequence[str] | None = None, *, prog: str) -> C:
    """The config for `arguments` (default: the command line), over its YAML file, over the defaults.

    Raises UserError naming file or flag, field, value and rule.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    file = _flag_value(arguments, "config")
    default = read_yaml(kind, Path(file)) if file else kind()
    if isinstance(default, TuneConfig):
        # A flag fixes a field, so it is no longer searched.
        kept = {k: v for k, v in default.search.items() if not _has_flag(arguments, k)}
        default = default.model_copy(update={"search": kept})
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=prog,
                args=arguments,
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_flag_error(said.getvalue(), arguments)) from None
        raise


def read_yaml(kind: type[C], path: Path) -> C:
    """The config in a YAML file over the defaults. Raises UserError naming file, field, value, rule."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of fields to values")
    try:
        return kind.model_validate(content or {})
    except ValidationError as error:
        raise UserError(f"{path}: {_first_error(kind, error)}") from None


def write_yaml(config: Command, path: Path) -> None:
    """The resolved config beside the results, as `--config` reads it."""
    path.write_text(yaml.safe_dump(config.model_dump(exclude={"config"}, mode="json"), sort_keys=False))


def _first_error(kind: type[BaseModel], error: ValidationError) -> str:
    # Of a union's errors, those of the member that was meant: a mapping means a Range.
    meant = [e for e in error.errors() if not (isinstance(e["input"], dict) and "list[" in str(e["loc"]))]
    first = (meant or error.errors())[0]
    field = ".".join(str(part) for part in first["loc"] if "[" not in str(part) and part != "Range")
    if first["type"] == "extra_forbidden":
        *parents, name = (str(part) for part in first["loc"])
        section: Any = kind
        if parents:
            section = Range if parents[0] == "search" else kind.model_fields[parents[0]].annotation
        return f"{field} is not a field{_did_you_mean(name, section, kind)}"
    if not field:
        return _rule(first)
    return f"{field} = {first['input']!r}: {_rule(first)}"


def _rule(error: Any) -> str:
    """pydantic's own words: "Input should be greater than 0" -> "must be greater than 0"."""
    message = str(error["msg"]).removeprefix("Value error, ")
    return re.sub(r"^Input should be( a)?", r"must be\1", message)


def _did_you_mean(name: str, section: type[BaseModel], command: type[BaseModel]) -> str:
    if name in command.model_fields:
        return "; it belongs outside of any section"
    for owner, field in command.model_fields.items():
        if _is_section(field.annotation) and name in field.annotation.model_fields:  # type: ignore[union-attr]
            return f"; it belongs under {owner}:"
    near = difflib.get_close_matches(name, list(section.model_fields), 1)
    return f"; did you mean {near[0]}?" if near else f"; fields are: {', '.join(section.model_fields)}"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _flag_value(arguments: Sequence[str], field: str) -> str | None:
    """The last value given, as the parser takes it."""
    given = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if _has_flag([argument], field):
            given = argument.split("=", 1)[1] if "=" in argument else following
    return given


def _has_flag(arguments: Sequence[str], field: str) -> bool:
    names = {f"--{field}", f"--{field.replace('_', '-')}"}
    return any(argument.split("=", 1)[0] in names for argument in arguments)


def _flag_error(text: str, arguments: Sequence[str]) -> str:
    """The command-line parser's boxed error as one sentence."""
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [i for i, line in enumerate(lines) if line and set(line) == {"─"}]
    words = " ".join(" ".join(lines[: rules[0]] if rules else lines).split())
    value_error = re.search(r"validation errors? for \w+ (\S+) (.*?) \[type=", words)
    if value_error:
        field, rule = value_error[1].split(".")[-1], value_error[2]
        flag, value = f"--{field.replace('_', '-')}", _flag_value(arguments, field)
        return f"{flag}{'' if value is None else ' ' + value}: {_rule({'msg': rule})}"
    near = re.search(r"Perhaps you meant: *(--\S+)", " ".join(" ".join(lines).split()))
    return words.rstrip(".") + (f"; did you mean {near[1]}?" if near else "")
