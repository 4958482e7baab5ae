"""Squares that are known of a tensor stand for its views as long as nobody has written to any of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from titan_fp8.runtime.known_squares import note_squares, take_known_squares


def _noted() -> tuple[Tensor, Tensor]:
    whole, squares = torch.arange(12.0), torch.tensor([3.0, 4.0])
    note_squares(whole, squares)
    return whole, squares


def _views(whole: Tensor) -> list[Tensor]:
    with torch.no_grad():  # as FSDP makes them
        return [torch.as_strided(whole, (2, 3), (3, 1), 6), torch.as_strided(whole, (6,), (1,), 0)]


def test_views_that_cover_a_tensor_need_not_be_read() -> None:
    whole, squares = _noted()
    other = torch.ones(2)
    known, rest = take_known_squares([other, *_views(whole), whole[12:]])
    assert [id(each) for each in known] == [id(squares)]
    assert [id(each) for each in rest] == [id(other)]
    assert take_known_squares([]) == ([], [])


def test_they_are_taken_once() -> None:
    whole, squares = _noted()
    assert take_known_squares([whole]) == ([squares], [])
    assert take_known_squares([whole]) == ([], [whole])


def test_what_lies_in_a_part_of_a_storage_is_covered_by_its_own_views() -> None:
    whole = torch.arange(12.0)[4:10].detach()
    note_squares(whole, torch.ones(1))
    assert take_known_squares([whole[3:], whole[:3]])[1] == []


WRITES: dict[str, Callable[[Tensor, list[Tensor]], object]] = {
    "to the whole": lambda whole, views: whole.mul_(2),
    "to a view": lambda whole, views: views[0].mul_(2),
    "to a view of another kind": lambda whole, views: whole.view(3, 4)[1].zero_(),
    "by foreach": lambda whole, views: torch._foreach_mul_(views, 0.5),
    "of one value": lambda whole, views: views[1].__setitem__(0, 7.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_makes_them_unknown_until_they_are_noted_again(write: str) -> None:
    whole, _ = _noted()
    views = _views(whole)
    with torch.no_grad():
        WRITES[write](whole, views)
    known, rest = take_known_squares(views)
    assert known == []
    assert {id(each) for each in rest} == {id(each) for each in views}
    note_squares(whole, torch.ones(1))
    assert take_known_squares(views)[1] == []


def test_views_that_leave_something_out_or_overlap_are_read() -> None:
    whole, _ = _noted()
    first, second = _views(whole)
    twice = [whole[:6], whole[:6]]
    for views in ([first], [second], twice, [first, second, second], [first, whole[:5]], [whole.view(3, 4).t()]):
        assert take_known_squares(views)[0] == [], views


def test_a_copy_is_another_tensor() -> None:
    whole, _ = _noted()
    assert take_known_squares([whole.clone()])[0] == []
    assert take_known_squares([whole.double()])[0] == []
