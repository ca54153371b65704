"""The checks of annotations that all tests run under; see annotations.py."""

from dataclasses import dataclass

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

checked = jaxtyped(typechecker=beartype)
PART = torch.ones(2, 3)


@checked
def taken(x: Float[Tensor, "rows columns"], *, rows: int | None = None) -> Float[Tensor, "rows columns"]:
    return x[:rows]


@pytest.mark.parametrize("before", [0, 2])
def test_other_shapes_types_and_results_are_refused_also_behind_calls_that_passed(before):
    for _ in range(before):
        taken(PART)
        taken(PART, rows=2)
    for wrong in (PART[0], PART.long(), PART.tolist(), None):
        with pytest.raises(TypeCheckError, match="parameters of"):
            taken(wrong)
    with pytest.raises(TypeCheckError, match="rows"):
        taken(PART, rows=2.0)
    with pytest.raises(TypeCheckError, match="return value of"):
        taken(PART, rows=1)
    with pytest.raises(TypeError, match="argument"):
        taken(PART, columns=1)


@pytest.mark.parametrize("wrong", [[PART[0]], (PART,), [PART, "text"]])
def test_items_of_containers_are_told_apart(wrong):
    @checked
    def count(parts: list[Float[Tensor, "rows columns"]]) -> int:
        return len(parts)

    assert count([PART]) == count([PART]) == 1
    assert count([PART, PART]) == 2

    def often():
        for _ in range(100):  # beartype looks at one item, drawn at random
            count(wrong)

    with pytest.raises(TypeCheckError):
        often()


def test_functions_within_functions_are_checked_with_what_they_close_over():
    def scaled(factor):
        @checked
        def by_factor(x: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
            return x * factor if factor < 3 else x[:-1]

        return by_factor

    x = torch.ones(4)
    assert scaled(1)(x).sum() == 4
    assert scaled(2)(x).sum() == 8
    with pytest.raises(TypeCheckError, match="return value of"):
        scaled(3)(x)


def test_dataclasses_of_the_same_fields_keep_their_own_types():
    kinds = []
    for kind in (int, str):

        @checked
        @dataclass
        class Held:
            value: kind

        kinds.append(Held)
    assert [kinds[0](1).value, kinds[1]("a").value] == [1, "a"]
    for held, wrong in zip(kinds, ("a", 1), strict=True):
        with pytest.raises(TypeCheckError):
            held(wrong)


def test_errors_of_the_function_itself_come_through():
    @checked
    def failing(text: str) -> int:
        raise KeyError(text)

    for _ in range(2):
        with pytest.raises(KeyError, match="abc"):
            failing("abc")


def test_the_package_is_checked():
    from pbsp.solver.hessian import output_error

    with pytest.raises(TypeCheckError):
        output_error(PART, PART, PART[0])
