"""What a section refuses, and in which words."""

import pytest
from pydantic import ValidationError

from raypipe.section import Section, problem_of

NO_TRUTH = "must be a number; YAML reads yes, no, on and off as true and false"


class Part(Section):
    count: int = 1
    share: float | None = None
    switch: bool | str = False
    alpha: float | list[float] | None = None


class Whole(Section):
    part: Part = Part()


@pytest.mark.parametrize(
    ("content", "path", "rule"),
    [
        ({"count": True}, "part.count", NO_TRUTH),
        (
            {"share": False},
            "part.share",
            NO_TRUTH,
        ),
        ({"count": "many"}, "part.count", "must be a whole number"),
        ({"count": 1.5}, "part.count", "must be a whole number"),
        ({"alpha": {"a": 1}}, "part.alpha", "must be a number or a list"),
        ({"alpha": "x"}, "part.alpha", "must be a number or a list"),
        ({"alpha": [1, "x"]}, "part.alpha.1", "must be a number"),
        ({"share": [1]}, "part.share", "must be a number"),
        (3, "part", "must be a mapping"),
    ],
)
def test_a_problem_names_the_field_and_the_rule(content: object, path: str, rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({"part": content})
    problem = problem_of(caught.value)
    assert (".".join(problem.path), problem.rule) == (path, rule)


def test_where_true_and_false_are_meant_they_are_taken() -> None:
    assert Part(switch=True).switch is True
