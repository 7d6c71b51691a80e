"""Sparse diffs: what fits a model, and indices as flat positions."""

import pytest
import torch

from diffpeft.sparse.diff import check_diff, count_nonzeros, flatten_indices

SHAPES = {"a": torch.Size((2, 3))}


@pytest.mark.parametrize(
    ("name", "positions", "values", "message"),
    [
        ("b", [0], [1.0], "which is none of the 1 parameters"),
        ("a", [0, 1], [1.0], r"use \(k,\)"),
        ("a", [1, 0], [1.0, 1.0], "strictly increasing"),
        ("a", [6], [1.0], r"outside \[0, 6\)"),
        ("a", [0], [float("nan")], "NaN"),
    ],
)
def test_a_diff_that_does_not_fit_is_refused(name, positions, values, message):
    with pytest.raises(ValueError, match=message):
        check_diff({name: (torch.tensor(positions), torch.tensor(values))}, SHAPES)


def test_a_diff_that_fits():
    diff = {"a": (torch.tensor([0, 5]), torch.ones(2))}
    check_diff(diff, SHAPES)
    assert count_nonzeros(diff) == {"a": 2}


@pytest.mark.parametrize("shape", [(), (9,), (5, 7), (3, 2, 4)], ids=str)
def test_indices_become_the_positions_that_they_came_from(shape):
    positions = torch.arange(torch.Size(shape).numel())
    indices = torch.stack(torch.unravel_index(positions, shape)) if shape else torch.empty(0, 1)
    assert torch.equal(flatten_indices("a", indices, torch.Size(shape)), positions)


@pytest.mark.parametrize("indices", [[[2], [0]], [[0], [-1]]], ids=str)
def test_indices_outside_of_the_shape_are_refused(indices):
    with pytest.raises(ValueError, match="outside of"):
        flatten_indices("a", torch.tensor(indices), SHAPES["a"])
    with pytest.raises(ValueError, match="2 indices an entry do not fit"):
        flatten_indices("a", torch.tensor(indices), torch.Size((6,)))
