"""Gates in three bytes each, for large parameters: what the low-memory mode holds, and how a gradient gets in.

- log_alpha: fp16. A move is rounded stochastically to one of the two neighbours, by distance, so that moves far below
  the spacing (0.004 near 5) add up to what they should.
- first moment: int8 codes, in units of a 127th of the largest of its row, rounded likewise.
- second moment: the means of its rows and columns (`diffpeft/gates/update/factored.py`).

The gradient of log_alpha is never stored. The backward pass accumulates it in the moments where it arises, and the step
of the gates lets them decay, so that between updates they hold beta times what an optimizer would. Gradients in parts
add up in the first moment; the second adds the squares of the parts. Seeds come from torch's generator.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.compile import CHUNK_ELEMENTS, compile_and_run
from diffpeft.gates.functions import Accumulate
from diffpeft.gates.hard_concrete import Stretch, open_shift
from diffpeft.gates.kernels import element_positions
from diffpeft.gates.noise import new_seed, random_bits, seed_words
from diffpeft.gates.update import factored, kernels
from diffpeft.gates.update.held import LOG_ALPHAS, LOW_MEMORY_MOMENTS, GatedLayer, status_of
from diffpeft.gates.update.kernels import BETAS, MIN_DIVISOR
from diffpeft.gates.update.state import LINE_ELEMENTS, GateColumns

MAX_CODE = 127
"""Largest code of the first moment, on either side of zero."""
_MIN_ROW_MOMENT = 1e-30
"""Below, a row's largest first moment counts as zero: soon its numbers would be too small to compute with."""
_EXTRA_BITS = 1 << 13
"""fp32 has 13 bits of the fraction more than fp16."""


def round_to_half(x: Tensor, random: Tensor) -> Tensor:
    """fp32 `x` in fp16, rounded stochastically with the exact number as the mean, from 13 bits of int32 `random`."""
    kept = (x.view(torch.int32) + (random & (_EXTRA_BITS - 1))) & -_EXTRA_BITS
    return kept.view(torch.float32).to(torch.float16)


def round_to_codes(x: Tensor, random: Tensor) -> Tensor:
    """fp32 `x` in [-127, 127] as int8, rounded stochastically with the exact number as the mean, from 19 other bits."""
    up = ((random >> 13) & 0x7FFFF).float() * 2.0**-19
    return torch.floor(x + up).clamp(-MAX_CODE, MAX_CODE).to(torch.int8)


def _accumulate(matrices: Sequence[Tensor], start: int, vectors: Sequence[Tensor], seed: Tensor) -> None:
    (exp_avg, grad), (scale,) = matrices, vectors
    mean = exp_avg * scale.unsqueeze(1) + grad * (1 - BETAS[0])
    unit = mean.abs().amax(1) / MAX_CODE
    codes = mean / unit.clamp_min(MIN_DIVISOR).unsqueeze(1)
    exp_avg.copy_(round_to_codes(codes, random_bits(seed, element_positions(codes, start))))
    scale.copy_(unit)


def _step(
    matrices: Sequence[Tensor], start: int, vectors: Sequence[Tensor], columns: Tensor, rule: Tensor, seed: Tensor
) -> None:
    (log_alpha, exp_avg), (scale, rows) = matrices, vectors
    mean, square = exp_avg * scale.unsqueeze(1), rows.unsqueeze(1) * columns
    move = kernels.direction(mean * rule[3], square * rule[4], rule[0])
    moved = log_alpha.float() - torch.where(move > 0, rule[2], rule[1]) * move
    log_alpha.copy_(round_to_half(moved, random_bits(seed, element_positions(moved, start))))


def _by_rows(
    chain: Callable[..., None], fused: bool, matrices: Sequence[Tensor], vectors: Sequence[Tensor], *settings: Tensor
) -> None:
    """Run a chain on matrices, and on vectors with a number for each row: compiled, or on a CPU in blocks of rows."""
    if fused:
        done, _ = compile_and_run(chain, tuple(matrices), 0, tuple(vectors), *settings)
        if done:
            return
    (height, columns), start = matrices[0].shape, 0
    rows = max(1, CHUNK_ELEMENTS // columns if matrices[0].device.type == "cpu" else height)
    for block in zip(*(torch.split(tensor, rows) for tensor in (*matrices, *vectors)), strict=True):
        chain(block[: len(matrices)], start, block[len(matrices) :], *settings)
        start += block[0].numel()


class LowMemoryGates(NamedTuple):
    """The gates of one large parameter: log_alpha, and the two moments of its gradient."""

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

    def accumulate(self, grad: Tensor, rows: Tensor | None = None, fused: bool = False) -> bool:
        """Add a gradient of log_alpha to the moments. Returns False, and leaves them, where it is not finite.

        Args:
            grad: fp32, shape of the parameter; with `rows` shape (n, columns).
            rows: int64, shape (n,), each once: which rows of the gradient are given; the others are zero.
        """
        matrix = grad.reshape(-1, len(self.columns))
        by_row, by_column = factored.mean_squares(matrix)
        if not bool(by_row.sum().isfinite()):
            return False
        share = (1 - BETAS[1]) * len(matrix) / len(self.rows)
        self.columns.add_(by_column, alpha=share)
        seed = seed_words(new_seed(), grad.device)
        if rows is None:
            self.rows.add_(by_row, alpha=1 - BETAS[1])
            exp_avg = self._matrix(self.exp_avg)
            _by_rows(_accumulate, fused, [exp_avg, matrix], [self.scale], seed)
            _put_back(exp_avg, self.exp_avg)
        else:
            self.rows.index_add_(0, rows, by_row, alpha=1 - BETAS[1])
            exp_avg, scale = self.exp_avg.index_select(0, rows), self.scale.index_select(0, rows)
            _by_rows(_accumulate, False, [exp_avg, matrix], [scale], seed)
            self.exp_avg.index_copy_(0, rows, exp_avg)
            self.scale.index_copy_(0, rows, scale)
        return True

    def gradient_check(self) -> Tensor | None:
        """Nothing: what was not finite never got in."""
        return None

    def sample(self, stride: int) -> GateColumns:
        """One in `stride` of the gates, in lines of neighbours."""
        count, device = self.log_alpha.numel(), self.log_alpha.device
        lines = torch.arange(0, count - LINE_ELEMENTS, LINE_ELEMENTS * stride, device=device)
        return self.at((lines.unsqueeze(1) + torch.arange(LINE_ELEMENTS, device=device)).view(-1))

    def at(self, positions: Tensor) -> GateColumns:
        """The gates at flat positions, int64, shape (n,)."""
        row, column = positions // len(self.columns), positions % len(self.columns)
        by_row, by_column = factored.factors(self.rows, self.columns)
        log_alpha, exp_avg = (self._matrix(tensor).view(-1)[positions] for tensor in (self.log_alpha, self.exp_avg))
        moments = exp_avg * self.scale[row], by_row[row] * by_column[column]
        return GateColumns(log_alpha.float(), torch.zeros_like(moments[0]), *moments, torch.zeros_like(row))

    def step(self, rule: Tensor, stretch: Stretch, fused: bool = False) -> Tensor:
        """Let the moments decay, move the gates by the automatic rule and count them."""
        self.scale.mul_(BETAS[0])
        self.scale.mul_(self.scale * MAX_CODE > _MIN_ROW_MOMENT)
        self.rows.mul_(BETAS[1])
        self.columns.mul_(BETAS[1])
        by_row, by_column = factored.factors(self.rows, self.columns)
        log_alpha, exp_avg = self._matrix(self.log_alpha), self._matrix(self.exp_avg)
        seed = seed_words(new_seed(), log_alpha.device)
        _by_rows(_step, fused, [log_alpha, exp_avg], [self.scale, by_row], by_column, rule, seed)
        _put_back(log_alpha, self.log_alpha)
        return self.count_open(stretch, fused)

    def count_open(self, stretch: Stretch, fused: bool = False) -> Tensor:
        """Sum of P(z > 0) in units of 2^-30, int64, shape (1,)."""
        count: Tensor = kernels.open_elements([self.log_alpha], open_shift(stretch), fused=fused)
        return count.reshape(1)

    def _matrix(self, tensor: Tensor) -> Tensor:
        """A contiguous matrix: a view, or a copy of what is laid out otherwise (channels_last)."""
        return tensor.detach().contiguous().view(len(self.rows), len(self.columns))


def _put_back(matrix: Tensor, tensor: Tensor) -> None:
    if matrix.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(matrix.view(tensor.shape))


def low_memory_gates(layer: GatedLayer, adapter_name: str, name: str) -> LowMemoryGates | None:
    """The gates of a large parameter's elements in the low-memory mode; None where they are stored whole."""
    if name not in layer.held(LOW_MEMORY_MOMENTS[1], adapter_name):
        return None
    moments = (layer.held(kind, adapter_name)[name] for kind in LOW_MEMORY_MOMENTS)
    return LowMemoryGates(layer.held(LOG_ALPHAS[0], adapter_name)[name], *moments)


def accumulator(layer: GatedLayer, adapter_name: str, name: str) -> Accumulate | None:
    """The function that takes the gradient of low-memory gates in backward; None if these are not there or frozen."""
    gates = low_memory_gates(layer, adapter_name, name)
    if gates is None or not gates.log_alpha.requires_grad:
        return None
    if torch.compiler.is_compiling():
        raise RuntimeError("torch.compile cannot follow low_memory=True; leave the model uncompiled, or use False")

    def accumulate(grad: Tensor, rows: Tensor | None) -> None:
        if not gates.accumulate(grad, rows, layer.fused):
            status_of(layer, adapter_name).finite = False

    return accumulate
