"""Gates as updates take them, for tests of the rules, and the penalty's gradient in closed form."""

from collections.abc import Sequence

from torch import Tensor

from diffpeft.gates.hard_concrete import Stretch, open_probability
from diffpeft.gates.update import rules
from diffpeft.gates.update.rules import StepSettings
from diffpeft.gates.update.state import GateSet, Group

STRETCH = (-1.5, 1.5)


def penalty_gradient(group: Group, stretch: Stretch, form: str) -> tuple[Tensor, Tensor | None]:
    """Gradient of one group's expected number of nonzeros, in closed form: by element and by group gate."""
    elements = open_probability(group.elements.log_alpha.detach(), stretch)
    by_element = elements * (1 - elements)
    if group.group_gate is None:
        return by_element, None
    open_group = open_probability(group.group_gate.log_alpha.detach(), stretch)
    by_group = open_group * (1 - open_group)
    if form == "product":
        return by_element * open_group, by_group * elements.sum()
    return by_element, by_group


def open_elements(groups: Sequence[Group]) -> Tensor:
    """Sum of P(element open) of each group."""
    return GateSet(groups).open_elements(STRETCH)


def expected_nonzeros(groups: Sequence[Group]) -> float:
    """The expected number of nonzeros of all groups."""
    return GateSet(groups).expected_nonzeros(STRETCH, open_elements(groups))


def automatic_step(
    groups: Sequence[Group], step: int, max_step: float, expected: float, wanted: float, accumulated: bool = False
) -> tuple[float, Tensor]:
    """One step from `expected` to `wanted` nonzeros; lambda, and the elements that are open then."""
    settings = StepSettings(step, max_step, STRETCH, accumulated=accumulated)
    return rules.automatic_step(GateSet(groups), wanted / expected, open_elements(groups), settings)
