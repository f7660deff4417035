"""What can be searched, and what is refused before the first trial."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from mistakes import error_in_file, error_of, load
from pydantic import ValidationError

from raypipe.config import RULES, TrialConfig, TuneConfig, why_it_cannot_work
from raypipe.search import grid


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("widht: [8]", "widht is not a field of a trial; did you mean width?"),
        ("width: []", "width has no values"),
        ("width: [32, 1]", "width: 1: must be greater than or equal to 4"),
        ("loss: [mse]", "loss: mse: must be 'cross_entropy' or 'focal'"),
        ("dropout: 0.3", "dropout = 0.3: must be a list or a mapping"),
        ("dropout: {low: 0.5, high: 1.5}", "dropout: 1.5: must be less than 1"),
        ("dropout: {low: 0.5, high: 0}", "dropout = {'low': 0.5, 'high': 0}: low 0.5 must be below high 0"),
        (
            "dropout: {low: 0, high: 0.1, log: yes}",
            "dropout = {'low': 0, 'high': 0.1, 'log': True}: low 0 must be above 0 for a log range",
        ),
        ("dropout: {low: 0, high: 1, logg: yes}", "dropout.logg is not a field; did you mean log?"),
        ("dropout: {low: 0.1}", "dropout.high = {'low': 0.1}: must be given"),
    ],
)
def test_a_mistake_in_a_search_space(content: str, said: str, tmp_path: Path) -> None:
    assert error_in_file(TuneConfig, f"space: {{{content}}}", tmp_path) == f"space.{said}"


def test_a_search_that_could_draw_what_cannot_work_is_refused(tmp_path: Path) -> None:
    content = "trial: {patience: 5}\nspace: {plateau_factor: [1, 0.5], plateau_patience: {low: 2, high: 5}}"
    assert error_in_file(TuneConfig, content, tmp_path) == (
        "the space can draw plateau_patience 5: plateau_patience 5 must be below patience 5: "
        "the trial would stop before its learning rate is lowered"
    )


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
        ("space: {dropout: [0, 0.0]}", "space.dropout has a value twice"),
        ("space: {batch_size: [32, 32.5]}", "space.batch_size: 32.5: must be a whole number"),
        (
            "space: {dropout: [yes, 0.1]}",
            "space.dropout: true: must be a number; YAML reads yes, no, on and off as true and false",
        ),
        (
            "space: {focal_alpha: [half], loss: [focal]}",
            "space.focal_alpha: half: must be a number, a list or 'balanced'",
        ),
        (
            "space: {plateau_patience: [2, 4]}",
            "space.plateau_patience: plateau_factor 1 never looks at it; "
            "search plateau_factor too, or leave it out",
        ),
        (
            "trial: {optimizer: adam}\nspace: {weight_decay: [0.1, 0.2]}",
            "space.weight_decay: optimizer adam never looks at it; search optimizer too, or leave it out",
        ),
        (
            "space: {model: [linear, gru]}\nspace_by_model: {linear: {width: [8, 16]}}",
            "space_by_model.linear.width: model linear never looks at it; leave it out",
        ),
        (
            "space_by_model: {tcn: {loss: [cross_entropy], focal_gamma: [1, 2]}}",
            "space_by_model.tcn.focal_gamma: loss cross_entropy never looks at it; "
            "search loss too, or leave it out",
        ),
        (
            "space_by_model: {tcn: {depth: [17]}}",
            "space_by_model.tcn.depth: 17: must be less than or equal to 16",
        ),
    ],
)
def test_a_mistake_in_a_space_by_model(content: str, said: str, tmp_path: Path) -> None:
    assert error_in_file(TuneConfig, content, tmp_path) == said


def test_listed_values_are_what_the_field_makes_of_them() -> None:
    space = {"model": ["mean_pool"], "dropout": [0, 0.3], "width": [32.0, 64], "clip_norm": [1, None]}
    found = TuneConfig(space=space, space_by_model={"tcn": {"dropout": [0]}})
    assert repr(found.space["dropout"]) == "[0.0, 0.3]" and repr(found.space["width"]) == "[32, 64]"
    assert repr(found.space["clip_norm"]) == "[1.0, None]"
    assert repr(found.space_by_model["tcn"]["dropout"]) == "[0.0]"


@pytest.mark.parametrize("flags", ["--model linear", "--optimizer adam", "--model linear --optimizer adam"])
def test_the_built_in_space_serves_every_trial(flags: str) -> None:
    """Nobody wrote what such a trial never looks at."""
    config = load(TuneConfig, *flags.split())
    assert isinstance(config, TuneConfig)
    drawn = config.space_of(config.trial.model)
    assert ("weight_decay" in drawn) == (config.trial.optimizer == "adamw")
    assert "width" not in drawn and "dropout" in drawn, "the model is linear: it has no width"
    preset = str(Path(__file__).parents[1] / "configs" / "tune.yaml")
    again = load(TuneConfig, "--config", preset, *flags.split())
    assert again.model_copy(update={"config": None}) == config


def test_what_no_trial_looks_at_is_nothing_to_change_in_mid_training() -> None:
    flags = "--scheduler pbt --optimizer adam --dropout 0.3 --learning-rate 0.001"
    assert error_of(TuneConfig, *flags.split()).startswith("scheduler pbt changes settings in mid-training")


def test_a_plateau_is_only_looked_for_where_it_counts() -> None:
    space = {"plateau_factor": [0.5, 1], "plateau_patience": [2, 4]}
    assert len(list(grid(TuneConfig(space=space, search="grid")))) == 3


# --- what goes together, in a large space -----------------------------------------------------------


def test_a_large_space_is_known_to_draw_nothing_that_cannot_work(tmp_path: Path) -> None:
    """Fields that no rule is about come first, and have more combinations than anyone could go through."""
    values = ", ".join(map(str, range(1, 33)))
    content = f"model: [mean_pool], width: [{values.replace('1, 2, 3, ', '')}], depth: [1, 2, 3, 4, 5, 6]"
    content += f", learning_rate: [{', '.join(f'{n / 1000}' for n in range(1, 21))}], batch_size: [{values}]"
    content += ", epochs: [40, 3], warmup_epochs: [0, 5]"
    assert error_in_file(TuneConfig, f"space: {{{content}}}", tmp_path) == (
        "the space can draw epochs 3, warmup_epochs 5: warmup_epochs 5 must be below epochs 3: "
        "the learning rate would never reach its highest"
    )


def test_what_is_ignored_breaks_no_rule() -> None:
    TuneConfig(
        trial={"class_weights": True},
        space={"loss": ["cross_entropy"], "plateau_factor": [1], "patience": [2]},
    )
    TuneConfig(trial={"batch_size": 33}, space={"batch_size": [32, 64]})


def test_too_many_combinations_of_one_rule_are_refused() -> None:
    space = {"epochs": list(range(200, 400)), "warmup_epochs": list(range(100))}
    with pytest.raises(ValidationError, match="20000 combinations of epochs, warmup_epochs, too many"):
        TuneConfig(space=space)


@pytest.mark.parametrize("rule", [why_it_cannot_work, TuneConfig._backend_can])
def test_fields_of_one_rule_are_combined(rule: Callable[..., object]) -> None:
    """Each `if` about fields of a trial must find them all in one of RULES."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    for condition in [node.test for node in ast.walk(tree) if isinstance(node, ast.If)]:
        assert any(fields_in(condition) <= together for together in RULES), fields_in(condition)
    assert fields_in(tree) and fields_in(tree) <= frozenset().union(*RULES)


def fields_in(tree: ast.AST) -> set[str]:
    """The fields that code reads of what it calls `trial`."""
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in read if isinstance(node.value, ast.Name) and node.value.id == "trial"}


def test_every_field_of_a_trial_can_be_searched() -> None:
    trial = TrialConfig(model="gru", loss="focal", focal_alpha=[0.3, 0.7])
    space = {name: [value] for name, value in trial.model_dump().items()}
    space |= {"plateau_factor": [0.5], "feeding": ["auto"]}
    assert TuneConfig(space=space).space["focal_alpha"] == [[0.3, 0.7]]
