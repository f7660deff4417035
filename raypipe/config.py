"""Typed configs: defaults here, a YAML file over them, flags over that, and help from the docstrings.

A command's config is made of sections; each part of raypipe receives its own section only. In YAML a
section is a mapping; as flags all fields stand side by side, so field names are unique in a command.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import Field, ValidationError, field_validator, model_validator

from raypipe.sampling import Policy
from raypipe.section import Section, rule_of
from raypipe.space import (
    IGNORED_WITH,
    IN_MID_TRAINING,
    Range,
    SearchSpace,
    Value,
    checked,
    draws_at_ends,
    ends_of,
    looked_at,
    wrong,
)

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, lt=1)]
Location = Annotated[str, Field(min_length=1)]
"""A path or URI. An empty one is a mistake, as of a variable that a script has not set."""
Backend = Literal["tensorflow", "jax"]


class Command(Section):
    """What every command takes."""

    config: Location | None = None
    """YAML file with any of these fields; flags win over it. Presets are in configs/."""


# --- extract --------------------------------------------------------------------------------------


class SamplingConfig(Section):
    """Which frames of a clip the network sees, and how."""

    frames: Annotated[int, Field(ge=1, le=1024)] = 16
    """T, frames per clip."""
    policy: Policy = "uniform"
    """uniform: spread evenly, from first to last. middle: the middle one of each of T equal parts. fps:
    --sample-fps a second from the start, T at most. keyframes: those nearest to uniform's, which long files
    give fastest; a clip without any is sampled as by uniform."""
    sample_fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames a second, with --policy fps; a clip that is over earlier repeats its last frame."""
    frame_size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Width and height of a frame in pixels; the whole picture is scaled to it."""
    view: Literal["rgb", "motion", "both"] = "both"
    """rgb: the frames. motion: signed differences of two frames as pictures. both: side by side, 2 D."""
    motion_gap_s: Seconds = 0.0667
    """Seconds between the two frames of a motion picture; two frames at 30 a second."""
    min_frames: Count = 4
    """A damaged clip with fewer real frames than this is failed, not partial."""
    window_s: Seconds | None = None
    """Cut each video into clips of so many seconds, a row each; none: the whole video is one clip."""
    stride_s: Seconds | None = None
    """Seconds from the start of one clip to the next one's, with --window-s; none: --window-s."""

    @model_validator(mode="after")
    def _goes_together(self) -> "SamplingConfig":
        if (self.policy == "fps") != (self.sample_fps is not None):
            raise ValueError("--sample-fps goes with --policy fps, and only with it")
        if self.stride_s and not self.window_s:
            raise ValueError("--stride-s needs --window-s")
        if self.stride_s and self.window_s and self.stride_s < self.window_s / 100:
            raise ValueError(f"--stride-s {self.stride_s:g} is less than a hundredth of --window-s")
        return self


class EmbeddingConfig(Section):
    """The network that turns frames into features."""

    backbone: Location = "efficientnet_lite0"
    """efficientnet_lite0, 1 or 2, a name in keras.applications (VGG19, ResNet50, ...), or a .onnx or .keras
    file that takes RGB pictures [N, H, W, 3] from 0 to 255 and gives vectors [N, D]."""
    weights: Location | None = None
    """File of weights for a keras.applications name; none: those that Keras downloads."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: the GPUs of the cluster, where the network can run on them, else its CPU cores."""


class LimitsConfig(Section):
    """What one file may cost before it is given up."""

    timeout_s: Seconds = 60.0
    """Seconds that decoding a clip may take: a whole video, or one window of it."""
    max_memory_mb: Annotated[int, Field(ge=256)] = 2048
    """MiB of address space that decoding a file may take."""
    max_pixels: Count = 1 << 26
    """Width times height of a frame; larger ones are too_large."""
    max_packets: Count = 2_000_000
    """Frames in a file; longer ones are too_large. Two million are 18 hours at 30 a second."""
    max_duration_s: Seconds = 172800.0
    """Seconds that the frames of a file span; longer ones are too_large. The default is two days."""


class ExtractConfig(Command):
    """Videos in, feature shards out: decode, embed, write, with every video accounted for by name."""

    input: Location | None = None
    """Folder (sub-folder = label), manifest (.csv, .parquet, .jsonl), glob or URI; none: sample clips."""
    output: Location = "results/features"
    """Folder of the feature store; running again adds only what is new."""
    retry_failed: bool = False
    """Take the videos that failed before once more."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    failures: bool = False
    """Only show what failed and why, from the store in --output."""
    max_failed: Annotated[float, Field(ge=0)] = 0.5
    """More failed videos than this end with status 1; below 1 a share of all videos, else a count."""
    shard_rows: Count = 64
    """Clips per Parquet shard."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPU cores to use; none: all that the cluster has."""
    sampling: SamplingConfig = SamplingConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    limits: LimitsConfig = LimitsConfig()


# --- tune -----------------------------------------------------------------------------------------

ModelName = Literal["linear", "mean_pool", "gru", "bilstm_attention", "transformer", "tcn"]
MODEL_NAMES: tuple[ModelName, ...] = get_args(ModelName)
Metric = Literal["auc", "accuracy", "balanced_accuracy", "macro_f1"]
Factor = Annotated[float, Field(gt=0)]

RECURRENT: frozenset[ModelName] = frozenset({"gru", "bilstm_attention"})


class TrialConfig(Section):
    """One trial: a model and how it is trained. Fields named under `space` are drawn for each trial."""

    model: ModelName = "linear"
    """linear: a line over the mean, the spread and the roughness of the steps. mean_pool: an MLP over them.
    gru: its last state. bilstm_attention: a BiLSTM, then attention. transformer: an encoder. tcn: dilated
    convolutions over time."""
    view: Literal["all", "rgb", "motion"] = "all"
    """Which features of the store the model sees: all, or one half of a store extracted with view both."""
    inputs: Literal["features", "differences", "both"] = "features"
    """features: as they are. differences: of each step to the one before. both: side by side."""
    width: Annotated[int, Field(ge=4, le=4096)] = 64
    """Units of the hidden layers."""
    depth: Annotated[int, Field(ge=1, le=16)] = 1
    """Layers of the model's own kind: hidden layers, recurrent layers, encoder or convolution blocks."""
    dropout: Share = 0.3
    """Share of activations dropped in training."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """What is made small; focal counts clips less the surer the model is of them."""
    focal_alpha: Factor | list[Factor] | Literal["balanced"] | None = None
    """Focal only, factor of a class: a number below 1 for the rarest (the others 1 - alpha), a list with one
    for each class in the order of their names, balanced (by how rare each is), or null (1 for all)."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Focal only: how much less sure clips count; 0 is cross-entropy."""
    label_smoothing: Share = 0.0
    """Share of each label that is spread evenly over all classes."""
    class_weights: bool = True
    """Weigh each class by how rare it is, so that the rare one counts as much as the common one."""
    oversample: bool = False
    """Repeat the clips of rare classes in each epoch, until all classes have as many as the commonest."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """adamw: with decoupled weight decay. adam: without."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """The optimizer's step size; the highest one where a schedule changes it."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """AdamW's decoupled weight decay; adam ignores it."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Clips per step over all replicas."""
    clip_norm: Factor | None = 1.0
    """Gradients of all replicas together are scaled down to this global norm; null: never."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rate after warm-up: constant, or falling along half a cosine until the last epoch."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the learning rate rises evenly to its highest."""
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Cosine only: share of the highest learning rate that is left in the last epoch."""
    plateau_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the scheduled learning rate each time the validation loss has stopped falling; 1: off."""
    plateau_patience: Count = 4
    """Epochs without a better validation loss before plateau_factor is applied."""
    epochs: Count = 40
    """The most epochs a trial trains."""
    patience: Count = 10
    """Epochs without a better validation loss before a trial stops."""
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = "auto"
    """Number format of the layers; auto: the fastest that the card has, float32 on CPU."""
    xla: bool | Literal["auto"] = "auto"
    """Compile the training step with XLA; auto: where it works and pays."""
    feeding: Literal["auto", "device", "memmap", "fit"] = "auto"
    """device: features lie on the device. memmap: batches are gathered ahead from a shared file. fit: plain
    arrays into Keras' own fit, the classic way, never compiled. auto: device where they fit, else memmap."""
    device_cache_mb: Annotated[int, Field(ge=0)] = 2048
    """feeding auto: MiB of features that may lie on each device; more are fed from the shared file."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Epochs between kept checkpoints, besides the best; 0: the best only."""
    histograms: bool = False
    """Write histograms of the weights to TensorBoard, each epoch."""
    profile: bool = False
    """Write a profile of the second epoch to TensorBoard."""

    @model_validator(mode="after")
    def _can_work(self) -> "TrialConfig":
        reason = why_it_cannot_work(self)
        if reason:
            raise ValueError(reason)
        return self


def why_it_cannot_work(trial: TrialConfig) -> str | None:
    """The reason why these fields contradict each other, or None."""
    balanced = ["class_weights"] * trial.class_weights + ["oversample"] * trial.oversample
    balanced += ["focal_alpha balanced"] * (trial.loss == "focal" and trial.focal_alpha == "balanced")
    if len(balanced) > 1:
        return (
            f"{' and '.join(balanced)} each make rare classes count as much as common ones; together they "
            "count more: keep one"
        )
    if isinstance(trial.focal_alpha, float) and trial.focal_alpha >= 1:
        return f"focal_alpha {trial.focal_alpha:g} must be below 1: the other classes get 1 - alpha"
    if trial.warmup_epochs and trial.warmup_epochs >= trial.epochs:
        return (
            f"warmup_epochs {trial.warmup_epochs:g} must be below epochs {trial.epochs}: "
            "the learning rate would never reach its highest"
        )
    if trial.plateau_factor < 1 and trial.plateau_patience >= trial.patience:
        return (
            f"plateau_patience {trial.plateau_patience} must be below patience {trial.patience}: "
            "the trial would stop before its learning rate is lowered"
        )
    if trial.xla is True and trial.model in RECURRENT:
        return f"xla cannot compile the cuDNN kernels of model {trial.model}; use xla auto or another model"
    if trial.xla is True and trial.feeding == "fit":
        return "xla true: feeding fit is Keras' fit as in classic scripts, never compiled; use feeding auto"
    return None


RULES = (
    frozenset({"loss", "focal_alpha", "class_weights", "oversample"}),
    frozenset({"warmup_epochs", "epochs"}),
    frozenset({"plateau_factor", "plateau_patience", "patience"}),
    frozenset({"model", "xla", "feeding"}),
)
"""The fields of each rule that a trial or its backend must keep: combined, so that a search is known to draw
nothing that breaks one."""


DEFAULT_SPACE: SearchSpace = {
    "model": ["linear", "mean_pool", "bilstm_attention"],
    "width": [32, 64, 128],
    "dropout": Range(low=0.1, high=0.6),
    "learning_rate": Range(low=5e-4, high=2e-3, log=True),
    "weight_decay": Range(low=0.03, high=1.0, log=True),
}
"""What is drawn for a trial, whatever its model."""

DEFAULT_SPACE_BY_MODEL: dict[ModelName, SearchSpace] = {
    "bilstm_attention": {"learning_rate": Range(low=5e-5, high=1e-3, log=True)},
    "gru": {"depth": [1, 2]},
    "transformer": {"depth": [1, 2], "dropout": Range(low=0.1, high=0.4)},
    "tcn": {"depth": [2, 3], "dropout": Range(low=0.1, high=0.4)},
}
"""What is drawn for trials of one model only, over the space of all."""


class SplitConfig(Section):
    """How clips are divided: a group is never on both sides."""

    folds: Annotated[int, Field(ge=2, le=100)] = 5
    """Parts of the training side; each is predicted by a model trained on the others."""
    test_share: Annotated[float, Field(ge=0, le=0.9)] = 0.2
    """Share of the clips set aside, read once, for the best trial only."""
    protocol: Literal["grouped", "random", "both"] = "grouped"
    """grouped: a group stays whole. random: clips are dealt out one by one, as in most papers, which lets
    scenes leak and flatters. both: grouped, and the best trial once more on random folds, to compare."""


class ResourcesConfig(Section):
    """What a trial claims from the cluster."""

    gpus_per_trial: Count = 2
    """GPUs that a trial trains on together; without any in the cluster, so many logical CPU devices."""
    cpus_per_trial: Count = 1
    """CPU cores that a trial claims."""


class TuneConfig(Command):
    """Feature shards in, the best model and its evidence out: trials on grouped folds, then a report."""

    features: Location = "results/features"
    """Folder that raypipe.extract wrote, or its URI."""
    results: Location = "results"
    """Folder or URI that the run's own folder, RESULTS/NAME, is made in; all nodes must see it."""
    zero_fill_failed: bool = False
    """Let videos that failed take part as clips of zeros, as classic scripts do; off: they take no part."""
    name: Location | None = None
    """The run is kept in RESULTS/NAME; none: tune, tune-2, and so on."""
    resume: Location | None = None
    """Folder or URI of a run that was stopped, RESULTS/NAME: goes on with its own settings; no other flag but
    --retry-failed."""
    retry_failed: bool = False
    """With --resume: train the trials that failed once more, each from its last epoch."""
    num_samples: Count = 5
    """Number of trials."""
    search: Literal["tpe", "random", "grid"] = "tpe"
    """How trials are drawn from the space: tpe learns from those before (Optuna), random does not, grid
    goes through all combinations."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """What cuts a trial short. asha: from grace_epochs on, trials not in the best third of those before.
    median: those below their median. pbt cuts none: from grace_epochs on, every perturb_epochs, the worst
    quarter takes over weights and settings of the best quarter, and changes some of the settings."""
    grace_epochs: Count = 15
    """Epochs every trial gets before it can be cut short, or takes over another's weights (pbt)."""
    perturb_epochs: Count = 5
    """pbt: epochs between two comparisons, for which all trials wait for each other."""
    max_concurrent: Count | None = None
    """The most trials at the same time; none: as many as the cluster has room for."""
    time_budget_s: Seconds | None = None
    """Seconds after which no trial starts and running ones end after their epoch; the best so far is
    finished. Such a run cannot be repeated exactly."""
    patience_trials: Count | None = None
    """Trials in a row without a better one before the search ends; none: all are run."""
    warm_start: Location | None = None
    """Folder or URI of an earlier run, RESULTS/NAME: its best settings are tried first, up to half of the
    trials."""
    metric: Metric = "auc"
    """What ranks trials, on validation folds."""
    backend: Backend = "tensorflow"
    """What Keras computes with; jax needs raypipe[jax]."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of splits, trials, weights and shuffling."""
    splits: SplitConfig = SplitConfig()
    resources: ResourcesConfig = ResourcesConfig()
    trial: TrialConfig = TrialConfig()
    space: Annotated[SearchSpace, tyro.conf.Suppress] = Field(default_factory=lambda: dict(DEFAULT_SPACE))
    """What differs between trials: a list of values or {low, high, log} for each field; YAML only."""
    space_by_model: Annotated[dict[ModelName, SearchSpace], tyro.conf.Suppress] = Field(
        default_factory=lambda: dict(DEFAULT_SPACE_BY_MODEL)
    )
    """The same for trials of one model only, over `space`; YAML only."""

    @model_validator(mode="before")
    @classmethod
    def _own_space(cls, content: Any) -> Any:
        """Who gives a space means that one, and not the default one's part for each model besides."""
        if isinstance(content, dict) and "space" in content and "space_by_model" not in content:
            return content | {"space_by_model": {}}
        return content

    @field_validator("space")
    @classmethod
    def _checked_space(cls, space: SearchSpace) -> SearchSpace:
        return checked(space, "space", TrialConfig)

    @field_validator("space_by_model")
    @classmethod
    def _checked_spaces(cls, spaces: dict[ModelName, SearchSpace]) -> dict[ModelName, SearchSpace]:
        for model, space in spaces.items():
            if "model" in space:
                raise wrong(f"space_by_model.{model}.model: the model is drawn from space.model")
        return {m: checked(space, f"space_by_model.{m}", TrialConfig) for m, space in spaces.items()}

    @model_validator(mode="after")
    def _searchable(self) -> "TuneConfig":
        models = self._models()
        # The built-in space is for any trial; where this one never looks at a field of it, nobody erred.
        for name, values in self.space.items():
            if values != DEFAULT_SPACE.get(name):
                self._refuse_ignored("space", name, models)
        for model, space in self.space_by_model.items():
            for name, values in space.items():
                if values != DEFAULT_SPACE_BY_MODEL.get(model, {}).get(name):
                    self._refuse_ignored(f"space_by_model.{model}", name, [model])
        if self.search == "grid":
            for model in models:
                own = self.space_by_model.get(model, {})
                for name, values in self.space_of(model).items():
                    if isinstance(values, Range):
                        place = f"space_by_model.{model}" if name in own else "space"
                        raise ValueError(f"{place}.{name} is a range; search grid needs a list of values")
        return self

    def _refuse_ignored(self, section: str, name: str, models: Sequence[ModelName]) -> None:
        """Raises ValueError for a searched field that no trial of these models looks at."""
        if name == "model" or any(name in self.space_of(model) for model in models):
            return
        decider = IGNORED_WITH[name][0]
        fixed: list[Value] = [getattr(self.trial, decider)]
        drawn = [value for model in models for value in ends_of(self.space_of(model).get(decider, fixed))]
        values = " or ".join(map(_said, dict.fromkeys(models if decider == "model" else drawn)))
        search = "" if decider == "model" and section != "space" else f"search {decider} too, or "
        raise ValueError(f"{section}.{name}: {decider} {values} never looks at it; {search}leave it out")

    def _models(self) -> list[ModelName]:
        values = ends_of(self.space.get("model", [self.trial.model]))
        return [value for value in values if value in MODEL_NAMES]

    def space_of(self, model: ModelName) -> SearchSpace:
        """What is drawn for a trial of this model, itself not included: the fields that some such trial looks
        at, deciding fields before those that they decide about."""
        space = {k: v for k, v in (self.space | self.space_by_model.get(model, {})).items() if k != "model"}
        return looked_at(space, self.trial.model_dump() | {"model": model})

    @model_validator(mode="after")
    def _population(self) -> "TuneConfig":
        if self.scheduler != "pbt":
            return self
        spaces = [self.space_of(model) for model in self._models()]
        if self.num_samples < 2:
            raise ValueError("scheduler pbt needs num_samples 2 or more: its trials learn from each other")
        if self.grace_epochs >= self.trial.epochs:
            raise ValueError(
                f"grace_epochs {self.grace_epochs} must be below epochs {self.trial.epochs}: "
                "no trial would take over another's weights (scheduler pbt)"
            )
        if self.patience_trials is not None:
            raise ValueError("patience_trials: trials of scheduler pbt end together; use another scheduler")
        if any("epochs" in space for space in spaces):
            raise ValueError("space.epochs: trials of scheduler pbt train equally many epochs")
        if not any(IN_MID_TRAINING & space.keys() for space in spaces):
            names = ", ".join(sorted(IN_MID_TRAINING))
            raise ValueError(f"scheduler pbt changes settings in mid-training; search one of {names}")
        if any(
            0 in ends_of(space.get("dropout", []))
            for space in spaces
            if isinstance(space.get("dropout"), list)
        ):
            raise ValueError("space.dropout: 0 cannot be left in mid-training (scheduler pbt); use 0.01")
        return self

    @model_validator(mode="after")
    def _backend_can(self) -> "TuneConfig":
        """Every trial that the search can draw has fields that go together, and with the backend."""
        for trial in self.trials():
            if trial.xla is True and self.backend == "tensorflow" and self.resources.gpus_per_trial > 1:
                raise ValueError(
                    "xla cannot compile a step that several devices share in TensorFlow; "
                    "use xla auto, gpus_per_trial 1 or backend jax"
                )
            if trial.xla is False and self.backend == "jax":
                raise ValueError("xla false: JAX always compiles with XLA; use xla auto")
            if trial.feeding == "fit" and self.backend == "jax":
                raise ValueError("feeding fit is there to compare with the classic way in TensorFlow only")
        return self

    def trials(self) -> Iterator[TrialConfig]:
        """Trials at the ends of the search space, among them one for each way in which fields that stand in
        one rule can meet. Raises ValueError for one that cannot work."""
        for model in self._models():
            fixed = self.trial.model_dump() | {"model": model}
            for drawn in draws_at_ends(self.space_of(model), fixed, RULES):
                try:
                    yield TrialConfig.model_validate(fixed | drawn)
                except ValidationError as error:
                    rule = rule_of(error)
                    here = ", ".join(f"{name} {_said(v)}" for name, v in drawn.items() if name in rule)
                    raise ValueError(f"the space can draw {here}: {rule}" if here else rule) from None


def _said(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- predict --------------------------------------------------------------------------------------


class PredictConfig(Command):
    """New videos in, predictions out, by the best model of a tune run. Labels are optional."""

    model: Location | None = None
    """Folder or URI of a tune run, or of its best/; none: the newest run in results/ that has a model."""
    input: Location | None = None
    """Folder (sub-folder = label), manifest (.csv, .parquet, .jsonl), glob or URI; none: sample clips."""
    output: Location = "results/predictions"
    """Folder of the predictions and of their features; running again decodes only what is new."""
    weights: Location | None = None
    """File of weights of the model's backbone, where its features were extracted with --weights; or the .onnx
    or .keras file that the backbone is, if it is not in the current folder."""
    retry_failed: bool = False
    """Take the videos that failed before once more."""
    max_failed: Annotated[float, Field(ge=0)] = 0.5
    """More failed videos than this end with status 1; below 1 a share of all videos, else a count."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPU cores to use; none: all that the cluster has."""
    limits: LimitsConfig = LimitsConfig()


# --- compare --------------------------------------------------------------------------------------

BEFORE = TrialConfig(
    model="bilstm_attention",
    view="rgb",
    class_weights=False,
    optimizer="adam",
    learning_rate=1e-4,
    weight_decay=0.0,
    clip_norm=None,
    schedule="constant",
    plateau_factor=0.5,
    epochs=60,
    precision="float32",
    xla=False,
    feeding="fit",
)
"""The classic script: plain Keras. configs/before.yaml is equal to it."""

BEFORE_ON_JAX = BEFORE.model_copy(update={"xla": "auto", "feeding": "auto"})
"""The same as far as JAX can: it always compiles, and is not fed by Keras' fit."""

AFTER = TrialConfig(
    model="mean_pool",
    dropout=0.6,
    loss="focal",
    focal_alpha="balanced",
    class_weights=False,
    label_smoothing=0.05,
    learning_rate=1e-3,
    batch_size=64,
    schedule="cosine",
    warmup_epochs=2.0,
    final_share=0.02,
    plateau_factor=0.5,
    epochs=60,
)
"""All of raypipe's. configs/after.yaml is equal to it."""


class PricesConfig(Section):
    """What training costs, in one currency."""

    price_per_kwh: Annotated[float, Field(ge=0)] | None = None
    """Price of a kilowatt-hour that the GPUs draw; null: not counted."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of an hour of what a trial claims; null: not counted."""
    currency: str = "EUR"
    """Of both prices."""


class CompareConfig(Command):
    """The classic way to train and raypipe's, on the same grouped folds: what each gives and costs."""

    features: Location = "results/features"
    """Folder that raypipe.extract wrote, or its URI."""
    results: Location = "results"
    """Folder or URI that the comparison's own folder is made in; all nodes must see it."""
    name: Location | None = None
    """The comparison is kept in RESULTS/NAME, where a stopped one goes on; none: compare, compare-2, ..."""
    before: Location | None = None
    """YAML file whose `trial` is the first way to train; none: the classic one, configs/before.yaml (with
    backend jax: its xla and feeding auto, as JAX always compiles and is not fed by Keras' fit)."""
    after: Location | None = None
    """YAML file whose `trial` is the second; none: raypipe's, configs/after.yaml."""
    ablate: bool = False
    """Also train the first way with each single change of the second, a column for each."""
    seeds: Count = 3
    """Trainings of each way, with seeds that follow one another; more make the figures surer."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the splits, and of the first training."""
    at_once: Count = 1
    """Trainings at the same time; more than 1 may slow each other and blur the times."""
    backend: Backend = "tensorflow"
    """What Keras computes with; jax needs raypipe[jax]."""
    splits: SplitConfig = SplitConfig()
    resources: ResourcesConfig = ResourcesConfig()
    prices: PricesConfig = PricesConfig()
