"""Whether the Trainer's optimizer holds an adapter's parameters."""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from diffpeft.sparse.sharded import is_sharded


class OptimizerCheck:
    """Checks that an optimizer holds an adapter's parameters, at the beginning and when its state is loaded later.

    A Trainer keeps its optimizer from one `train()` to the next, but pruning and loading give an adapter new
    parameters.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def watch(self, optimizer: Any, tuner: BaseTuner, adapter_name: str) -> None:
        """Check the optimizer now, and from now on whenever a state is loaded. ValueError where it lacks parameters."""
        if self._handle is not None:
            self._handle.remove()
        plain = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        if not isinstance(plain, Optimizer):  # DeepSpeed's holds others in their place
            return

        def check(*_: Any) -> None:
            held = {parameter for group in plain.param_groups for parameter in group["params"]}
            own = [p for layer in tuner.layers_of(adapter_name) for p in layer.adapter_parameters(adapter_name)]
            missing = sum(1 for p in own if p.requires_grad and p not in held)
            if missing and not any(is_sharded(parameter) for parameter in own):
                raise ValueError(
                    f"the optimizer does not hold {missing} of the {len(own)} parameters of adapter {adapter_name!r}, "
                    "which was pruned, loaded or added after the optimizer was made; make a new Trainer for this run"
                )

        check()
        self._handle = plain.register_load_state_dict_pre_hook(check)
