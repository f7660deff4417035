"""From new videos to predictions: find the model, extract the features it needs, predict, account for all.

python -m raypipe.predict --model results/tune --input videos/
"""

import io
import logging
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypipe import extract
from raypipe.backbones import FILES, load_backbone
from raypipe.config import (
    EmbeddingConfig,
    ExtractConfig,
    PredictConfig,
    SamplingConfig,
)
from raypipe.console import duration, run_command, shown_path
from raypipe.errors import RunFailed, UserError
from raypipe.evidence import versions
from raypipe.files import write_atomically, write_json
from raypipe.metrics import evaluate
from raypipe.outcomes import CLIP_COLUMNS, few
from raypipe.reading import load_config, write_yaml
from raypipe.saved_model import SavedModel, find_model, open_model
from raypipe.shards import features_array
from raypipe.splits import group_of
from raypipe.storage import Place, is_remote, place
from raypipe.store import FeatureStore
from raypipe.videos import list_videos
from raypipe.wording import scored

LOG = logging.getLogger("raypipe")

COLUMNS = [*CLIP_COLUMNS, "label", "group"]
"""What a prediction says of its clip, besides the probabilities."""


def main(config: PredictConfig) -> dict[str, Any]:
    """Runs the prediction; returns what summary.json holds. Raises UserError and RunFailed."""
    started_s = time.monotonic()
    model = open_model(find_model(config.model, results=Path("results")))
    LOG.info("model: %s, classes %s", shown_path(model.folder), ", ".join(model.classes))
    if config.input is None:
        config = config.model_copy(update={"input": extract.sample_videos()})
    extraction = extraction_of(config, model)
    refuse_other_features(model, extraction)
    listing = list_videos(str(config.input))
    # Everything that extraction promises holds here too: each video a row, nothing decoded twice.
    extracted = extract.main(extraction, listing)

    store = FeatureStore(extraction.output)
    predictions = predict(model, store, [video.video_id for video in listing.videos])
    folder = place(config.output, flag="--output")
    digests = predictions["content_digest"].to_pylist()
    predictions = predictions.drop_columns(["content_digest"])
    labels = {label for label in predictions["label"].to_pylist() if label}
    summary = {
        "model": str(model.folder),
        "fingerprint": model.spec.fingerprint,
        "clips": predictions.num_rows,
        "predicted": dict(Counter(name for name in predictions["predicted"].to_pylist() if name)),
        "outcomes": extracted["outcomes"],
        "judged": judge(predictions, digests, model),
        "unknown_labels": sorted(labels - set(model.classes)),
        "wall_s": round(time.monotonic() - started_s, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "command": shlex.join(["python", "-m", "raypipe.predict", *sys.argv[1:]]),
    }
    try:
        write_table(predictions, folder)
        write_json(folder / "summary.json", summary)
        write_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise RunFailed(f"--output {folder}: cannot be written: {error.strerror or error}") from None
    say_result(summary, folder)
    extract.refuse_too_many_failures(
        extraction.model_copy(update={"max_failed": config.max_failed, "output": config.output}), extracted
    )
    return summary


# --- features as the model knows them -----------------------------------------------------------------


def extraction_of(config: PredictConfig, model: SavedModel) -> ExtractConfig:
    """The extraction that gives the model's features, into a store of their own: other features, of another
    model, never meet them."""
    spec = model.spec
    output = place(config.output, flag="--output") if is_remote(config.output) else Path(config.output)
    return ExtractConfig(
        input=config.input,
        output=str(output / f"features-{spec.fingerprint}"),
        retry_failed=config.retry_failed,
        max_failed=math.inf,  # judged when the predictions of all others are written
        cpus=config.cpus,
        sampling=SamplingConfig(
            **{name: getattr(spec, name) for name in SamplingConfig.model_fields},
        ),
        embedding=embedding_of(spec.backbone, config.weights),
        limits=config.limits,
    )


def embedding_of(backbone: str, weights: str | None) -> EmbeddingConfig:
    """A backbone that is a file is known by its name alone: where it lies here `weights` says.

    >>> embedding_of("net.onnx", "here/net.onnx").backbone, embedding_of("VGG19", "vgg19.h5").weights
    ('here/net.onnx', 'vgg19.h5')
    """
    if weights and Path(backbone).suffix in FILES:
        return EmbeddingConfig(backbone=weights)
    return EmbeddingConfig(backbone=backbone, weights=weights)


def refuse_other_features(model: SavedModel, extraction: ExtractConfig) -> None:
    """Raises UserError where the features that this machine would make are not those of the model."""
    wanted = f"{shown_path(model.folder)}: the model needs features of backbone {model.spec.backbone}"
    try:
        embedding, frame_size = extraction.embedding, extraction.sampling.frame_size
        backbone = load_backbone(embedding.backbone, weights=embedding.weights, frame_size=frame_size)
    except UserError as error:
        is_file = Path(model.spec.backbone).suffix in FILES and embedding.backbone == model.spec.backbone
        advice = "; say with --weights where it lies" if is_file else ""
        raise UserError(f"{wanted}: {error}{advice}") from None
    here, there = asdict(extract.feature_spec(extraction.sampling, backbone)), asdict(model.spec)
    differing = [
        f"{name} is {here[name]} here and {there[name]} there" for name in here if here[name] != there[name]
    ]
    if differing:
        raise UserError(
            f"{wanted} as it was tuned on: {', '.join(differing)}; "
            "install the weights and the version of raypipe that it was tuned with, or tune again"
        )


# --- predictions --------------------------------------------------------------------------------------


def predict(model: SavedModel, store: FeatureStore, video_ids: Sequence[str]) -> pa.Table:
    """A row for each clip of these videos, in order: COLUMNS, a probability for each class, the answer."""
    wanted = pa.array(sorted(video_ids))
    parts = [predict_shard(model, store, shard, wanted) for shard in store.shards()]
    table = pa.concat_tables(parts)
    return table.sort_by([("video_id", "ascending"), ("clip_index", "ascending")])


def predict_shard(model: SavedModel, store: FeatureStore, shard: Place, video_ids: pa.Array) -> pa.Table:
    """The predictions of those clips of a shard that belong to these videos."""
    columns = [*COLUMNS, "content_digest"]
    rows = store.read([*columns, "features"], shards=[shard])
    rows = rows.filter(pc.is_in(rows["video_id"], video_ids))
    known = pc.is_valid(rows["features"]).to_numpy(zero_copy_only=False)
    probabilities = np.full((rows.num_rows, len(model.classes)), np.nan, np.float32)
    probabilities[known] = model.predict(features_array(rows["features"], store.spec())[known])
    return prediction_table(rows.select(columns), probabilities, model)


def prediction_table(rows: pa.Table, probabilities: NDArray[np.float32], model: SavedModel) -> pa.Table:
    """`rows` with their probabilities [N, C], null where NaN, and the class that the model answers."""
    unknown = np.isnan(probabilities[:, 0])
    answers = [
        None if u else model.classes[i]
        for u, i in zip(unknown, model.calibration.answers(probabilities), strict=True)
    ]
    rows = rows.append_column("predicted", pa.array(answers, pa.string()))
    for number, name in enumerate(model.classes):
        column = pa.array(probabilities[:, number], pa.float32(), mask=unknown)
        rows = rows.append_column(f"probability_{name}", column)
    return rows


def write_table(predictions: pa.Table, folder: Place) -> None:
    """The same rows twice: Parquet for programs, CSV for people."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("predictions.parquet", pq.write_table), ("predictions.csv", pa.csv.write_csv)):
        content = io.BytesIO()
        write(predictions, content)
        write_atomically(folder / name, content.getbuffer())


# --- scores, where the input has labels ------------------------------------------------------------------


def judge(predictions: pa.Table, digests: Sequence[str | None], model: SavedModel) -> dict[str, Any] | None:
    """Scores with 95 % intervals over the clips with a label that the model knows; None where none has one.

    `digests` are of the content of each row's file.
    """
    known = pc.is_in(predictions["label"], pa.array(model.classes))
    taking_part = pc.and_(known, pc.is_valid(predictions["predicted"])).to_numpy(zero_copy_only=False)
    if not taking_part.any():
        return None
    rows = predictions.filter(pa.array(taking_part))
    numbers = {name: number for number, name in enumerate(model.classes)}
    labels = np.array([numbers[label] for label in rows["label"].to_pylist()])
    answers = np.array([numbers[answer] for answer in rows["predicted"].to_pylist()])
    probabilities = np.stack([rows[f"probability_{name}"].to_numpy() for name in model.classes], axis=1)
    groups = list(map(group_of, rows["group"].to_pylist(), rows["video_id"].to_pylist()))
    tuned_on = model.content_digests()
    return {
        "clips_tuned_on": sum(d in tuned_on for d, part in zip(digests, taking_part, strict=True) if part),
        **asdict(evaluate(labels, probabilities, model.classes, predicted=answers, groups=groups)),
    }


# --- what a person sees ----------------------------------------------------------------------------------


def say_result(summary: dict[str, Any], folder: Place) -> None:
    """Answers by class, scores where there are any, and where the rows are."""
    answers = ", ".join(f"{name} {count}" for name, count in sorted(summary["predicted"].items()))
    left = summary["clips"] - sum(summary["predicted"].values())
    LOG.info(
        "%d clips: %s%s",
        summary["clips"],
        answers or "no answers",
        f"; {left} without an answer" if left else "",
    )
    if judged := summary["judged"]:
        LOG.info(
            "accuracy %s, AUC %s, on %d labelled clips in %d groups",
            scored(judged["accuracy"], judged["accuracy_interval"], "95 % interval "),
            scored(judged["auc"], judged["auc_interval"]),
            judged["clips"],
            judged["groups"],
        )
        if judged["clips_tuned_on"]:
            LOG.info(
                "%d of these %d clips belong to the features that the model was tuned on: "
                "expect less on new ones",
                judged["clips_tuned_on"],
                judged["clips"],
            )
    elif summary["unknown_labels"]:
        LOG.info("no scores: the model knows none of the labels %s", few(summary["unknown_labels"]))
    LOG.info("done in %s: %s", duration(summary["wall_s"]), shown_path(folder / "predictions.csv"))


if __name__ == "__main__":
    run_command(lambda: main(load_config(PredictConfig, prog="python -m raypipe.predict")))
