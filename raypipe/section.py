"""What a config is made of, sections of checked fields, and how what is wrong with one is said."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SENTENCE = "sentence"
"""The type of an error whose message names the field by itself."""


class Section(BaseModel):
    """Frozen, and no unknown fields: a typo is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_truths(cls, value: object, info: ValidationInfo) -> object:
        refuse_truth(value, cls.model_fields[str(info.field_name)].annotation)
        return value


def refuse_truth(value: object, annotation: object) -> None:
    """Raises ValueError for true or false in place of a number, which pydantic would take for 1 or 0."""
    members = _members(annotation)
    if isinstance(value, bool) and bool not in members and {int, float} & members:
        raise ValueError("must be a number; YAML reads yes, no, on and off as true and false")


def _members(annotation: object) -> set[object]:
    """
    >>> _members(int | None) == {int, type(None)}
    True
    """
    inner = [one for one in get_args(annotation) if not isinstance(one, str)]
    return set().union(*map(_members, inner)) if inner else {annotation}


# --- what is wrong ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The first thing that is wrong with a config."""

    path: tuple[str, ...]
    """From the config to the field; empty: fields that contradict each other."""
    value: object
    rule: str
    kind: str
    """pydantic's name of the error."""


def problem_of(error: ValidationError) -> Problem:
    """Where a field may be one of several types, what each would have to be, unless one of them was meant."""
    errors = error.errors()
    path = _path(errors[0])
    # One that looked into the value took it for what it is: a mapping for a range, a list for a list.
    path = max((_path(e) for e in errors if _path(e)[: len(path)] == path), key=len)
    of_field = [e for e in errors if _path(e) == path]
    # Of the right type, and yet wrong: that type was meant.
    meant = [e for e in of_field if not _is_of_another_type(e)]
    first = (meant or of_field)[0]
    rules = [in_words(first["msg"])] if meant else [in_words(e["msg"]) for e in of_field]
    return Problem(path, first["input"], one_of(rules), first["type"])


def rule_of(error: ValidationError) -> str:
    """The rule that was broken first."""
    return problem_of(error).rule


def one_of(rules: Sequence[str]) -> str:
    """
    >>> one_of(["must be a number", "must be a list", "must be 'balanced'"])
    "must be a number, a list or 'balanced'"
    """
    first, *others = dict.fromkeys(rules)
    rest = [rule.removeprefix("must be ") for rule in others]
    return " or ".join([", ".join([first, *rest[:-1]]), *rest[-1:]])


def in_words(message: str) -> str:
    """pydantic's message as a rule.

    >>> in_words("Input should be greater than 0")
    'must be greater than 0'
    >>> in_words("Input should be a valid integer, unable to parse string as an integer")
    'must be a whole number'
    """
    for pattern, words in WORDS.items():
        message = re.sub(pattern, words, message)
    return message


WORDS = {
    r"^Value error, ": "",
    r"^Input should be": "must be",
    r"^Field required$": "must be given",
    r"^String should have at least 1 character$": "must not be empty",
    r"a valid (integer|number|boolean|string), .*": r"a valid \1",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "a text",
    "a valid list": "a list",
    r"a valid dictionary( or instance of \w+)?": "a mapping",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not one of those known.

    >>> nearest("widht", ["width", "depth"]), nearest("net", ["width", "depth"])
    ('; did you mean width?', '; fields are: width, depth')
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; fields are: {', '.join(known)}"


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _path(error: "ErrorDetails") -> tuple[str, ...]:
    return tuple(str(part) for part in error["loc"] if not _IS_TYPE.search(str(part)))


_IS_TYPE = re.compile(r"\[|^(bool|int|float|str|none|Range|constrained-\w+)$")
"""Parts of a path that say which of several types pydantic has tried."""


def _is_of_another_type(error: "ErrorDetails") -> bool:
    return error["type"].endswith(("_type", "_parsing", "_from_float", "literal_error"))
