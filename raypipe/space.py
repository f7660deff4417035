"""What a search draws from: values or a range for fields of a trial, and which of them count with which.

Nothing here knows what the fields are for; `raypipe.config` says which of them cannot go together.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from raypipe.section import SENTENCE, Section, nearest, refuse_truth, rule_of


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


Value = bool | int | float | str | list[float] | None
Values = list[Value] | Range
SearchSpace = dict[str, Values]


def ends_of(values: Values) -> Sequence[Value]:
    """Where a searched field could go wrong: every listed value, or both ends of a range."""
    return [values.low, values.high] if isinstance(values, Range) else values


# --- which fields count --------------------------------------------------------------------------------

IGNORED_WITH: dict[str, tuple[str, tuple[Value, ...]]] = {
    "focal_alpha": ("loss", ("cross_entropy",)),
    "focal_gamma": ("loss", ("cross_entropy",)),
    "weight_decay": ("optimizer", ("adam",)),
    "final_share": ("schedule", ("constant",)),
    "plateau_patience": ("plateau_factor", (1.0,)),
    "device_cache_mb": ("feeding", ("device", "memmap", "fit")),
    "width": ("model", ("linear",)),
    "depth": ("model", ("linear",)),
}
"""Fields that a trial never looks at, by the field that decides about it and its values that make it so."""

IN_MID_TRAINING = frozenset(
    {
        "learning_rate",
        "weight_decay",
        "dropout",
        "label_smoothing",
        "focal_alpha",
        "focal_gamma",
        "clip_norm",
    }
)
"""Fields that can change between two epochs: they shape neither the model nor the optimizer's state."""


def is_ignored(field: str, trial: Mapping[str, object]) -> bool:
    """Whether a trial with these fields never looks at this one, so that there is nothing to draw.

    >>> is_ignored("focal_gamma", {"loss": "cross_entropy"}), is_ignored("focal_gamma", {"loss": "focal"})
    (True, False)
    """
    decider, values = IGNORED_WITH.get(field, (field, ()))
    return trial[decider] in values


def looked_at(space: SearchSpace, fixed: Mapping[str, Any]) -> SearchSpace:
    """The fields of a space that some trial looks at, over these fixed fields: those that decide about others
    before them.

    >>> list(looked_at({"focal_gamma": [1.0, 2.0]}, {"loss": "cross_entropy"}))
    []
    >>> list(looked_at({"focal_gamma": [1.0, 2.0], "loss": ["cross_entropy", "focal"]}, {}))
    ['loss', 'focal_gamma']
    """
    deciders = {decider for decider, _ in IGNORED_WITH.values()}
    in_order = sorted(space, key=lambda name: name not in deciders)
    return {name: space[name] for name in in_order if not _never_counts(name, space, fixed)}


def _never_counts(field: str, space: SearchSpace, fixed: Mapping[str, Any]) -> bool:
    if field not in IGNORED_WITH:
        return False
    decider, ignoring = IGNORED_WITH[field]
    values = space.get(decider, [fixed.get(decider)])
    return not isinstance(values, Range) and all(value in ignoring for value in values)


# --- what can be drawn ---------------------------------------------------------------------------------


def checked(space: SearchSpace, place: str, fields: type[Section]) -> SearchSpace:
    """The space with each listed value as the field makes of it, so that a drawn value is the one listed.
    Raises what pydantic makes an error of, naming the field, for what no field of its name can be."""
    return {name: _checked_values(f"{place}.{name}", name, space[name], fields) for name in space}


def _checked_values(place: str, name: str, values: Values, fields: type[Section]) -> Values:
    if name not in fields.model_fields:
        raise wrong(f"{place} is not a field of a trial{nearest(name, fields.model_fields)}")
    if values == []:
        raise wrong(f"{place} has no values")
    field = fields.model_fields[name]
    adapter: TypeAdapter[Value] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    found = []
    for value in ends_of(values):
        try:
            refuse_truth(value, field.annotation)
            found.append(adapter.validate_python(value))
        except ValidationError as error:
            raise wrong(f"{place}: {value}: {rule_of(error)}") from None
        except ValueError as error:
            raise wrong(f"{place}: {str(value).lower()}: {error}") from None
    if isinstance(values, Range):
        if isinstance(field.default, bool | str):
            raise wrong(f"{place} is no number; give a list of values")
        return values
    if len({repr(value) for value in found}) < len(found):
        raise wrong(f"{place} has a value twice")
    return found


def wrong(sentence: str) -> PydanticCustomError:
    """An error that names the field by itself."""
    return PydanticCustomError(SENTENCE, "{sentence}", {"sentence": sentence})


def draws_at_ends(
    space: SearchSpace, fixed: Mapping[str, Any], together: Sequence[frozenset[str]]
) -> Iterator[dict[str, Value]]:
    """What can be drawn from the ends of a space: all combinations of fields that stand in one rule, and each
    value of the others. Fields of two rules need no combining. Raises ValueError for too many combinations.

    >>> list(draws_at_ends({"a": [1, 2], "b": [3, 4]}, {}, [frozenset("ab")]))
    [{'a': 1, 'b': 3}, {'a': 1, 'b': 4}, {'a': 2, 'b': 3}, {'a': 2, 'b': 4}]
    >>> list(draws_at_ends({"a": [1, 2], "b": [3, 4]}, {}, []))
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}, {'a': 1, 'b': 3}, {'a': 1, 'b': 4}]
    """
    if not space:
        yield {}
    ends = {name: ends_of(values) for name, values in space.items()}
    first = {name: values[0] for name, values in ends.items()}
    in_rules = [[name for name in space if name in fields] for fields in together]
    alone = [[name] for name in space if not any(name in names for names in in_rules)]
    for names in filter(None, in_rules + alone):
        count = math.prod(len(ends[name]) for name in names)
        if count > MOST_COMBINATIONS:
            raise ValueError(
                f"the space has {count} combinations of {', '.join(names)}, too many to check; "
                "list fewer values, or give ranges"
            )
        for values in itertools.product(*(ends[name] for name in names)):
            drawn = first | dict(zip(names, values, strict=True))
            yield {name: value for name, value in drawn.items() if not is_ignored(name, {**fixed, **drawn})}


MOST_COMBINATIONS = 10_000
"""Checking one takes about a tenth of a millisecond."""
