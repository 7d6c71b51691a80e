import pytest
import torch

from diffpeft.gates.update import factored


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


def test_without_any_gradient_the_moment_is_nought():
    rows, columns = factored.factors(torch.zeros(3), torch.zeros(2))
    assert not torch.outer(rows, columns).any()
