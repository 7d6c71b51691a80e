"""The pull lambda of the automatic rule: solved for on some of the gates, for the expected number of nonzeros that is wanted."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffpeft.gates.hard_concrete import Stretch, open_logit
from diffpeft.gates.kernels import BETAS, direction
from diffpeft.gates.update.low_memory import LeanGates
from diffpeft.gates.update.state import Gates, Group, is_small, open_wholes, owners

SAMPLE = 1 << 17
"""Gates on which lambda is solved for; the full count corrects what the sample gets wrong in the next step."""
LINE = 16
"""Of these, so many are neighbours: as many as memory gives at a time."""
COARSE = 16
"""One in so many of them tells where about lambda is, before all of them do."""


def _shape_of_some(numel: int, stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of one in `stride` of a flat tensor's elements, from all over it: lines of neighbours if it is long."""
    lines = numel // (LINE * stride) if stride > 1 else 0
    return ((lines, LINE), (LINE * stride, 1)) if lines else ((-(-numel // stride),), (stride,))


def some(tensors: Sequence[Tensor], stride: int) -> Tensor:
    """One in `stride` of the elements of each, joined."""
    shapes = [_shape_of_some(tensor.numel(), stride) for tensor in tensors]
    sizes = [math.prod(shape) for shape, _ in shapes]
    joined = tensors[0].new_empty(sum(sizes))
    places = [part.view(shape) for part, (shape, _) in zip(torch.split(joined, sizes), shapes, strict=True)]
    flat = [tensor if tensor.is_contiguous() else tensor.reshape(-1) for tensor in tensors]
    torch._foreach_copy_(places, [one.as_strided(*shape) for one, shape in zip(flat, shapes, strict=True)])
    return joined


@functools.lru_cache(maxsize=64)
def _places_of_some(sizes: tuple[int, ...], stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where what [`some`] takes of tensors of these sizes is in its tensor, int32, and which tensor that is, int64."""
    places = []
    for numel in sizes:
        shape, (step, *_) = _shape_of_some(numel, stride)
        starts = torch.arange(0, shape[0] * step, step, dtype=torch.int32, device=device)
        line = torch.arange(shape[1] if len(shape) > 1 else 1, dtype=torch.int32, device=device)
        places.append((starts.unsqueeze(1) + line).view(-1))
    return torch.cat(places), owners(tuple(map(len, places)), device)


Columns = list[Tensor]
"""Of gates: locations, gradients and the two moments, and the indices of their groups."""


def _of_plain(groups: Sequence[Group], which: Sequence[int], stride: int) -> Columns:
    columns = zip(*(gates for index in which if isinstance(gates := groups[index].elements, Gates)), strict=True)
    return [*(some(column, stride) for column in columns), _indices(groups, which, stride)]


def _of_small(columns: Sequence[Tensor], groups: Sequence[Group], which: Sequence[int], stride: int) -> Columns:
    owner = owners(tuple(groups[index].elements.log_alpha.numel() for index in which), columns[0].device)
    index = torch.tensor(which, device=owner.device).index_select(0, owner)
    return [some([column], stride) for column in (*columns, index)]


def _of_lean(groups: Sequence[Group], which: int, stride: int) -> Columns:
    gates = groups[which].elements
    assert isinstance(gates, LeanGates)
    count, device = gates.log_alpha.numel(), gates.log_alpha.device
    lines = torch.arange(0, count - LINE, LINE * stride, device=device)
    log_alpha, exp_avg, exp_avg_sq = gates.at((lines.unsqueeze(1) + torch.arange(LINE, device=device)).view(-1))
    return [log_alpha, torch.zeros_like(log_alpha), exp_avg, exp_avg_sq, torch.full_like(log_alpha, which).long()]


def _indices(groups: Sequence[Group], which: Sequence[int], stride: int) -> Tensor:
    sizes = tuple(groups[index].elements.log_alpha.numel() for index in which)
    device = groups[which[0]].elements.log_alpha.device
    return torch.tensor(which, device=device).index_select(0, _places_of_some(sizes, stride, device)[1])


def _sampled(groups: Sequence[Group], small: Sequence[Tensor] | None, stride: int) -> Columns:
    kinds: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        kinds.setdefault("small" if is_small(group) else type(group.elements), []).append(index)
    parts = [_of_lean(groups, which, stride) for which in kinds.get(LeanGates, [])]
    if Gates in kinds:
        parts.append(_of_plain(groups, kinds[Gates], stride))
    if small is not None:
        parts.append(_of_small(small, groups, kinds["small"], stride))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


class Sample:
    """Some of the gates, on which the step is found after which they have `ratio` times their expected number of nonzeros.

    Args:
        groups: all gates.
        small: columns of the joined small ones, as in [`Gates`], if there are any.
        correction: of the bias of the two moments.
        pace: the farthest that a gate moves.
        stretch: (l, r).
        ratio: see above.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        small: Sequence[Tensor] | None,
        correction: tuple[float, float],
        pace: float,
        stretch: Stretch,
        ratio: float,
    ) -> None:
        stride = max(1, sum(group.elements.log_alpha.numel() for group in groups) // SAMPLE)
        log_alpha, grad, exp_avg, exp_avg_sq, index = _sampled(groups, small, stride)
        self.logit = open_logit(log_alpha, stretch)
        self.mean = torch.lerp(exp_avg, grad, 1 - BETAS[0]).div_(correction[0])
        self.square = (exp_avg_sq * BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1]).div_(correction[1])
        self.whole = open_wholes(groups, stretch).index_select(0, index)
        self.pace, self.ratio = pace, ratio
        self._before: dict[int, float] = {}

    def before(self, stride: int) -> float:
        """The nonzeros of one in `stride` before the step."""
        if stride not in self._before:
            self._before[stride] = float((torch.sigmoid(self.logit[::stride]) * self.whole[::stride]).sum())
        return self._before[stride]

    def expected(self, pull: float, brake: float, stride: int = 1) -> float:
        """The nonzeros of one in `stride` after a step, as a multiple of those wanted."""
        move = direction(self.mean[::stride], self.square[::stride], pull)
        move = move if brake == 1.0 else torch.where(move > 0, move * brake, move)
        after = (torch.sigmoid(self.logit[::stride] - self.pace * move) * self.whole[::stride]).sum()
        return float(after) / max(self.ratio * self.before(stride), 1e-30)

    def solve(self) -> tuple[float, float]:
        """The least pull, and the share of their way that gates which close are let go, that give what is wanted."""
        if self.expected(0.0, 1.0) <= 1.0:
            if self.expected(0.0, 0.0) <= 1.0:
                return 0.0, 0.0
            return 0.0, _bisect(lambda brake: self.expected(0.0, brake), 0.0, 1.0, 16)
        # Gradients of the locations are far below 1 in any network with a bounded loss; the bracket grows if not.
        low, high = -46.0, math.log(max(float(self.square.max()) ** 0.5, 1e-12)) + 7.0
        if self.expected(math.exp(high), 1.0) > 1.0:
            return math.exp(high), 1.0
        if len(self.logit) > COARSE**3:
            about = _bisect(lambda x: self.expected(math.exp(x), 1.0, COARSE), low, high, 20)
            width = 0.1
            while width < high - low:  # until the root lies between
                below, above = max(low, about - width), min(high, about + width)
                if self.expected(math.exp(below), 1.0) > 1.0 >= self.expected(math.exp(above), 1.0):
                    return math.exp(_bisect(lambda x: self.expected(math.exp(x), 1.0), below, above, 6)), 1.0
                width *= 8
        return math.exp(_bisect(lambda x: self.expected(math.exp(x), 1.0), low, high, 24)), 1.0


def _bisect(function: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """The upper end of the interval, halved so often, at which a falling function goes below 1."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 1.0 else (low, middle)
    return high
