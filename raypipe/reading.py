"""A command's config from its YAML file and its flags, and back into a file."""

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ValidationError

from raypipe.config import Command, TrialConfig, TuneConfig
from raypipe.errors import UserError
from raypipe.files import write_atomically
from raypipe.section import SENTENCE, Section, in_words, is_section, nearest, one_of, problem_of
from raypipe.space import Range, SearchSpace
from raypipe.storage import Place, is_remote, place

C = TypeVar("C", bound=Command)


def load_config(kind: type[C], arguments: Sequence[str] | None = None, *, prog: str) -> C:
    """The config for `arguments` (default: the command line), over its YAML file, over the defaults.

    Raises UserError naming file or flag, field, value and rule.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = fields_given(kind, arguments)
    file = _flag_value(arguments, "config")
    if file == "":
        raise UserError("--config '': must not be empty")
    default = kind() if file is None else read_yaml(kind, _file(file))
    if isinstance(default, TuneConfig):
        _refuse_beside_resume(given)

        # A flag fixes a field, so it is no longer searched.
        def kept(space: SearchSpace) -> SearchSpace:
            return {name: values for name, values in space.items() if name not in given}

        by_model = {model: kept(space) for model, space in default.space_by_model.items()}
        default = default.model_copy(update={"space": kept(default.space), "space_by_model": by_model})
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


def fields_given(kind: type[Section], arguments: Sequence[str]) -> list[str]:
    """The fields of a command that flags are given for, also for those set to what they are anyway.

    >>> fields_given(TuneConfig, ["--no-class-weights", "--num-samples=5", "--name", "mine"])
    ['name', 'num_samples', 'class_weights']
    """
    found = []
    for name, field in kind.model_fields.items():
        if is_section(field.annotation):
            found += fields_given(field.annotation, arguments)  # type: ignore[arg-type]
        elif _has_flag(arguments, name):
            found.append(name)
    return found


NO_OTHER_FLAG = "with --resume a run goes on with the settings in its config.yaml; give no other flag"


def _refuse_beside_resume(given: Sequence[str]) -> None:
    others = [name for name in given if name not in ("resume", "retry_failed")]
    if "resume" in given and others:
        raise UserError(f"--{others[0].replace('_', '-')}: {NO_OTHER_FLAG}")


def _file(given: str) -> Place:
    return place(given, flag="--config") if is_remote(given) else Path(given)


def read_yaml(kind: type[C], path: Place, *, flag: str = "--config") -> C:
    """The config in a YAML file over the defaults. Raises UserError naming file, field, value, rule."""
    try:
        return kind.model_validate(_mapping(path, flag))
    except ValidationError as error:
        raise UserError(f"{path}: {_first_error(kind, error)}") from None


def _mapping(path: Place, flag: str) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of fields to values")
    return content or {}


def read_trial(path: Place, *, flag: str) -> TrialConfig:
    """The `trial` of a file that raypipe.tune takes as well; what is for a search in it is not read. Raises
    UserError."""
    content = _mapping(path, flag)
    for name in content.keys() - TuneConfig.model_fields.keys():
        raise UserError(f"{path}: {name} is not a field{_did_you_mean(str(name), TuneConfig, TuneConfig)}")
    if "trial" not in content:
        raise UserError(f"{flag} {path}: has no `trial`, the way to train")
    try:
        return _TrialAlone.model_validate({"trial": content["trial"]}).trial
    except ValidationError as error:
        raise UserError(f"{path}: {_first_error(_TrialAlone, error)}") from None


class _TrialAlone(Section):
    trial: TrialConfig


def write_yaml(config: Command, path: Place) -> None:
    """The resolved config beside the results, as `--config` reads it."""
    text = yaml.safe_dump(config.model_dump(exclude={"config"}, mode="json"), sort_keys=False)
    write_atomically(path, text.encode())


def _first_error(kind: type[BaseModel], error: ValidationError) -> str:
    problem = problem_of(error)
    field = ".".join(problem.path)
    if problem.kind == "extra_forbidden":
        *parents, name = problem.path
        section: Any = kind
        if parents:
            section = Range if parents[0].startswith("space") else kind.model_fields[parents[0]].annotation
        return f"{field} is not a field{_did_you_mean(name, section, kind)}"
    if not field or problem.kind == SENTENCE:
        return problem.rule
    return f"{field} = {problem.value!r}: {problem.rule}"


def _did_you_mean(name: str, section: type[BaseModel], command: type[BaseModel]) -> str:
    if name in command.model_fields:
        return "; it belongs outside of any section"
    for owner, field in command.model_fields.items():
        if is_section(field.annotation) and name in field.annotation.model_fields:  # type: ignore[union-attr]
            return f"; it belongs under {owner}:"
    return nearest(name, section.model_fields)


def _flag_value(arguments: Sequence[str], field: str) -> str | None:
    """The last value given, as the parser takes it."""
    given = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if _has_flag([argument], field):
            given = argument.split("=", 1)[1] if "=" in argument else following
    return given


def _has_flag(arguments: Sequence[str], field: str) -> bool:
    """Also the flag that says no: --no-class-weights."""
    names = {f"--{field}".replace("_", "-"), f"--no-{field}".replace("_", "-")}
    return any(argument.split("=", 1)[0].replace("_", "-") in names for argument in arguments)


def _flag_error(text: str, arguments: Sequence[str]) -> str:
    """The command-line parser's boxed error as one sentence."""
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [i for i, line in enumerate(lines) if line and set(line) == {"─"}]
    words = " ".join(" ".join(lines[: rules[0]] if rules else lines).split())
    together = re.search(r"validation errors? for \w+ Value error, (.*?) \[type=", words)
    if together:
        return together[1]
    value_error = re.search(r"validation errors? for \w+ (\S+) (.*?) \[type=", words)
    if value_error:
        path, rule = value_error[1].split("."), value_error[2]
        field = next((part for part in path if _has_flag(arguments, part)), path[-1])
        value = _flag_value(arguments, field)
        said = "" if value is None else f" {shlex.quote(value)}"
        return f"--{field.replace('_', '-')}{said}: {in_words(rule)}"
    unread = re.search(r"Error parsing (--\S+): (.*)", words)
    if unread:
        return _unread(unread[1], unread[2])
    near = re.search(r"Perhaps you meant: *(--\S+)", " ".join(" ".join(lines).split()))
    return words.rstrip(".") + (f"; did you mean {near[1]}?" if near else "")


def _unread(flag: str, words: str) -> str:
    """What a flag takes, in place of the parser's own account of its attempts.

    >>> _unread("--seed", "invalid literal for int() with base 10: '2.5'")
    '--seed 2.5: must be a whole number'
    >>> _unread("--clip-norm", "no type matching {None}|FLOAT could be instantiated from ['x']. Got ...")
    '--clip-norm x: must be None or a number'
    """
    either = re.search(r"no type matching (.*?) could be instantiated from \[(.*?)\]", words)
    if either:
        given = " ".join(re.findall(r"'(.*?)'", either[2]))
        return f"{flag} {given}: {one_of([f'must be {PARSED_AS.get(k, k)}' for k in either[1].split('|')])}"
    single = re.match(
        r"(?:invalid literal for (int)\(\)|could not convert string to float).*?: '(.*)'", words
    )
    if single:
        return f"{flag} {single[2]}: must be {PARSED_AS['INT' if single[1] else 'FLOAT']}"
    return f"{flag}: {words}"


PARSED_AS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "STR": "a text",
    "{None}": "None",
    "{[FLOAT [FLOAT ...]]}": "numbers",
    "{balanced}": "balanced",
}
"""How the parser names what a flag takes, in words."""
