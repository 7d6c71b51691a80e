"""Gates in three bytes each, for large parameters: what the low-memory mode holds, and how a gradient gets in.

- locations: fp16. A move is rounded at random to one of the two neighbours, by distance, so that moves far below the spacing
  (0.004 near 5) add up to what they should.
- first moment: int8, in units of a 127th of the largest of its row, rounded likewise.
- second moment: the means of its rows and columns (`diffpeft/gates/update/factored.py`).

The gradient of the locations is never stored. The backward pass folds it into the moments where it arises, and the update of
the gates lets them decay, so that between updates they hold beta times what an optimizer would. Gradients that come in parts, as
with accumulation or for a parameter that is used twice, add up in the first moment; the second adds the squares of the parts.

Random bits are those of `diffpeft/gates/noise.py`, of seeds from torch's generator, which a checkpoint restores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.compile import compile_and_run
from diffpeft.gates.hard_concrete import PIECE
from diffpeft.gates.kernels import BETAS, direction
from diffpeft.gates.noise import bits, new_seed, parts
from diffpeft.gates.update import factored

LEVELS = 127
"""Of the first moment on either side of nought."""
_FADED = 1e-30
"""A row whose largest first moment is below is taken to have none: soon its numbers would be too small to compute with."""
_HALF_TAIL = 1 << 13
"""fp32 has 13 bits of the fraction more than fp16."""


def to_half(x: Tensor, random: Tensor) -> Tensor:
    """fp32 `x` in fp16, up or down at random with the exact number as the mean, from 13 bits of int32 `random`."""
    kept = (x.view(torch.int32) + (random & (_HALF_TAIL - 1))) & -_HALF_TAIL
    return kept.view(torch.float32).to(torch.float16)


def to_levels(x: Tensor, random: Tensor) -> Tensor:
    """fp32 `x`, within 127 of nought, as int8, up or down at random with the exact number as the mean, from 19 other bits."""
    up = ((random >> 13) & 0x7FFFF).float() * 2.0**-19
    return torch.floor(x + up).clamp(-LEVELS, LEVELS).to(torch.int8)


def _random(like: Tensor, start: int, seed: Tensor) -> Tensor:
    places = torch.arange(start, start + like.numel(), dtype=torch.int32, device=like.device)
    return bits(seed, places.view(like.shape))


def _fold(exp_avg: Tensor, grad: Tensor, start: int, scale: Tensor, seed: Tensor) -> None:
    mean = exp_avg * scale.unsqueeze(1) + grad * (1 - BETAS[0])
    unit = mean.abs().amax(1) / LEVELS
    levels = mean / unit.clamp_min(factored.SMALLEST).unsqueeze(1)
    exp_avg.copy_(to_levels(levels, _random(levels, start, seed)))
    scale.copy_(unit)


def _move(
    log_alpha: Tensor,
    exp_avg: Tensor,
    start: int,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    rule: Tensor,
    seed: Tensor,
) -> None:
    mean, square = exp_avg * scale.unsqueeze(1), rows.unsqueeze(1) * columns
    move = direction(mean * rule[3], square * rule[4], rule[0])
    moved = log_alpha.float() - torch.where(move > 0, rule[2], rule[1]) * move
    log_alpha.copy_(to_half(moved, _random(moved, start, seed)))


def _by_rows(
    chain: Callable[..., None], fused: bool, matrices: Sequence[Tensor], vectors: Sequence[Tensor], *settings: Tensor
) -> None:
    """Run a chain on matrices, and on vectors with a number for each row: compiled, or on a CPU in blocks of rows."""
    if fused:
        done, _ = compile_and_run(chain, *matrices, 0, *vectors, *settings)
        if done:
            return
    columns, start = matrices[0].shape[1], 0
    height = max(1, PIECE // columns) if matrices[0].device.type == "cpu" else max(1, len(matrices[0]))
    for block in zip(*(torch.split(tensor, height) for tensor in (*matrices, *vectors)), strict=True):
        chain(*block[: len(matrices)], start, *block[len(matrices) :], *settings)
        start += block[0].numel()


class LeanGates(NamedTuple):
    """The gates of one large parameter: locations, and the two moments of their gradients."""

    log_alpha: Tensor
    """fp16, shape of the parameter."""
    exp_avg: Tensor
    """int8, shape of the parameter: the first moment over `scale`."""
    scale: Tensor
    """fp32, one a row of the parameter as a matrix, as are `rows`."""
    rows: Tensor
    """Means of the second moment over each row."""
    columns: Tensor
    """Means of the second moment over each column, fp32."""

    def fold(self, grad: Tensor, rows: Tensor | None = None, fused: bool = False) -> bool:
        """Add a gradient of the locations, or some rows of one, to the moments. Returns False, and leaves them as they are,
        where it is not finite.

        Args:
            grad: fp32, shape of the parameter; with `rows` shape (n, columns).
            rows: int64, shape (n,), each once: which rows of the gradient are given; the others are nought.
            fused: whether to compile.
        """
        matrix = grad.reshape(-1, len(self.columns))
        by_row, by_column = factored.mean_squares(matrix)
        if not bool(by_row.sum().isfinite()):
            return False
        share = (1 - BETAS[1]) * len(matrix) / len(self.rows)
        self.columns.add_(by_column, alpha=share)
        seed = parts(new_seed(), grad.device)
        if rows is None:
            self.rows.add_(by_row, alpha=1 - BETAS[1])
            exp_avg = self._matrix(self.exp_avg)
            _by_rows(_fold, fused, [exp_avg, matrix], [self.scale], seed)
            _put_back(exp_avg, self.exp_avg)
        else:
            self.rows.index_add_(0, rows, by_row, alpha=1 - BETAS[1])
            exp_avg, scale = self.exp_avg.index_select(0, rows), self.scale.index_select(0, rows)
            _by_rows(_fold, False, [exp_avg, matrix], [scale], seed)
            self.exp_avg.index_copy_(0, rows, exp_avg)
            self.scale.index_copy_(0, rows, scale)
        return True

    def move(self, rule: Tensor, fused: bool = False) -> None:
        """Let the moments decay and move the gates by the automatic rule; see [`diffpeft.gates.kernels.automatic_`]."""
        self.scale.mul_(BETAS[0])
        self.scale.mul_(self.scale * LEVELS > _FADED)
        self.rows.mul_(BETAS[1])
        self.columns.mul_(BETAS[1])
        by_row, by_column = factored.factors(self.rows, self.columns)
        log_alpha, exp_avg = self._matrix(self.log_alpha), self._matrix(self.exp_avg)
        seed = parts(new_seed(), log_alpha.device)
        _by_rows(_move, fused, [log_alpha, exp_avg], [self.scale, by_row], by_column, rule, seed)
        _put_back(log_alpha, self.log_alpha)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Locations and moments, fp32, at flat places, int64, shape (n,)."""
        row, column = places // len(self.columns), places % len(self.columns)
        by_row, by_column = factored.factors(self.rows, self.columns)
        log_alpha, exp_avg = (self._matrix(tensor).view(-1)[places] for tensor in (self.log_alpha, self.exp_avg))
        return log_alpha.float(), exp_avg * self.scale[row], by_row[row] * by_column[column]

    def _matrix(self, tensor: Tensor) -> Tensor:
        """As a contiguous matrix: a view, or a copy of what is laid out otherwise (channels_last)."""
        return tensor.detach().contiguous().view(len(self.rows), len(self.columns))


def fold_plain(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> bool:
    """[`LeanGates.fold`] for gates with moments of full size, fp32."""
    if not bool(grad.sum().isfinite()):
        return False
    exp_avg.add_(grad, alpha=1 - BETAS[0])
    exp_avg_sq.addcmul_(grad, grad, value=1 - BETAS[1])
    return True


def _put_back(matrix: Tensor, tensor: Tensor) -> None:
    if matrix.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(matrix.view(tensor.shape))
