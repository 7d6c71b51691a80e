"""Second moments by the means of rows and columns, and the update of diffs."""

import pytest
import torch

from diffpeft.gates.update import factored
from diffpeft.gates.update.factored import DiffMoments
from diffpeft.gates.update.kernels import BETAS


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 6), (4, 6)), ((8, 512, 1024), (4096, 1024)), ((64, 32, 3, 3), (64, 288)), ((2, 3, 0), (2, 0))],
    ids=str,
)
def test_a_tensor_is_cut_where_that_leaves_the_fewest_means(shape, expected):
    assert factored.matrix_shape(torch.Size(shape)) == expected


@pytest.mark.parametrize(
    ("shape", "large"), [((129, 128), True), ((128, 128), False), ((1 << 20,), False), ((), False)], ids=str
)
def test_only_large_tensors_of_some_dimensions_are_factored(shape, large):
    assert factored.is_large(torch.Size(shape)) is large


def test_mean_squares(device):
    matrix = torch.randn(7, 5, device=device)
    by_row, by_column = factored.mean_squares(matrix)
    torch.testing.assert_close(by_row, matrix.square().mean(1))
    torch.testing.assert_close(by_column, matrix.square().mean(0))


def test_a_matrix_of_rank_one_is_what_its_factors_multiply_to(device):
    matrix = torch.outer(torch.rand(7), torch.rand(5)).to(device)
    rows, columns = factored.factors(matrix.mean(1), matrix.mean(0))
    torch.testing.assert_close(torch.outer(rows, columns), matrix)


def test_without_any_gradient_the_moment_is_zero():
    rows, columns = factored.factors(torch.zeros(3), torch.zeros(2))
    assert not torch.outer(rows, columns).any()


def fresh(rows: int, columns: int, device: str = "cpu") -> DiffMoments:
    return DiffMoments(*(torch.zeros(size, device=device) for size in ((rows,), (columns,), ())))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)], ids=str)
def test_the_rule_is_adafactors_without_a_first_moment(device, shape):
    w, moments = torch.randn(shape, device=device), fresh(6, 5, device)
    expected, square, clipped = w.view(6, 5).clone(), torch.zeros(6, 5, device=device), []
    for step in range(6):
        grad = torch.randn(shape, device=device) * (1e-3 if step < 4 else 3e-3)
        square = square * BETAS[1] + grad.view(6, 5).square() * (1 - BETAS[1])
        unbiased = square / (1 - BETAS[1] ** (step + 1))
        second = torch.outer(unbiased.mean(1), unbiased.mean(0)) / unbiased.mean()
        update = grad.view(6, 5) / second.sqrt()
        size = update.square().mean().sqrt()
        clipped.append(bool(size > 1))
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * update / size.clamp_min(1.0)
        assert moments.step(w, grad, rate=0.1, decay=0.01)
        torch.testing.assert_close(w.view(6, 5), expected, rtol=1e-4, atol=1e-5)
    assert set(clipped) == {True, False}


def test_a_row_without_any_gradient_stays(device):
    w, moments = torch.ones(6, 5, device=device), fresh(6, 5, device)
    grad = torch.randn(6, 5, device=device)
    grad[2] = 0
    moments.step(w, grad, rate=0.1, decay=0.0)
    assert bool((w[2] == 1).all())
    assert bool((w[:2] != 1).all())
    assert moments.step(w, torch.zeros(6, 5, device=device), rate=0.1, decay=0.0)
    assert bool(w.isfinite().all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    w, moments = torch.randn(6, 5), fresh(6, 5)
    moments.step(w, torch.randn(6, 5), rate=0.1, decay=0.1)
    before = [tensor.clone() for tensor in (w, *moments)]
    grad = torch.randn(6, 5)
    grad[1, 1] = bad
    assert not moments.step(w, grad, rate=0.1, decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip((w, *moments), before, strict=True))
