"""The lambda of the automatic rule, solved for on some of the gates so that the expected nonzeros are those wanted."""

import math
from collections.abc import Callable

import torch

from diffpeft.gates.hard_concrete import Stretch, open_logit
from diffpeft.gates.update.kernels import BETAS, MIN_DIVISOR, direction
from diffpeft.gates.update.state import GateSet

SAMPLE_GATES = 1 << 17
"""Gates on which lambda is solved for; the full count corrects what the sample gets wrong in the next step."""
COARSE_STRIDE = 16
"""One in so many of them tells where about lambda is, before all of them do."""


class PenaltySolver:
    """Finds the step after which some of the gates have `ratio` times their expected number of nonzeros.

    Args:
        gates: all gates.
        correction: of the bias of the two moments.
        max_step: the farthest that a gate moves.
        stretch: (l, r).
        ratio: of the expected number of nonzeros after the step and before it.
    """

    def __init__(
        self, gates: GateSet, correction: tuple[float, float], max_step: float, stretch: Stretch, ratio: float
    ) -> None:
        some = gates.sample(max(1, sum(gates.sizes) // SAMPLE_GATES))
        self.logit = open_logit(some.log_alpha, stretch)
        self.mean = torch.lerp(some.exp_avg, some.grad, 1 - BETAS[0]).div_(correction[0])
        square = (some.exp_avg_sq * BETAS[1]).addcmul_(some.grad, some.grad, value=1 - BETAS[1])
        self.square = square.div_(correction[1])
        self.group_open = gates.open_groups(stretch).index_select(0, some.owner)
        self.max_step, self.ratio = max_step, ratio
        self._before: dict[int, float] = {}

    def before(self, stride: int) -> float:
        """The nonzeros of one in `stride` before the step."""
        if stride not in self._before:
            self._before[stride] = float((torch.sigmoid(self.logit[::stride]) * self.group_open[::stride]).sum())
        return self._before[stride]

    def expected(self, l0_lambda: float, closing_scale: float, stride: int = 1) -> float:
        """The nonzeros of one in `stride` after a step, as a multiple of those wanted."""
        move = direction(self.mean[::stride], self.square[::stride], l0_lambda)
        move = move if closing_scale == 1.0 else torch.where(move > 0, move * closing_scale, move)
        after = (torch.sigmoid(self.logit[::stride] - self.max_step * move) * self.group_open[::stride]).sum()
        return float(after) / max(self.ratio * self.before(stride), MIN_DIVISOR)

    def solve(self) -> tuple[float, float]:
        """The least lambda, and the share of their way that closing gates are let go, that give what is wanted."""
        if self.expected(0.0, 1.0) <= 1.0:
            if self.expected(0.0, 0.0) <= 1.0:
                return 0.0, 0.0
            return 0.0, _bisect(lambda scale: self.expected(0.0, scale), 0.0, 1.0, 16)
        # Gradients of log_alpha are far below 1 in any network with a bounded loss; the bracket grows if not.
        low, high = -46.0, math.log(max(float(self.square.max()) ** 0.5, 1e-12)) + 7.0
        if self.expected(math.exp(high), 1.0) > 1.0:
            return math.exp(high), 1.0
        if len(self.logit) > COARSE_STRIDE**3:
            about = _bisect(lambda x: self.expected(math.exp(x), 1.0, COARSE_STRIDE), low, high, 20)
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
