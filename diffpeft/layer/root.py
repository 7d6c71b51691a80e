"""The parameters that a model owns by itself."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from diffpeft.gates.noise import NoisePass, remove_hooks
from diffpeft.layer.layer import DiffPruningLayer


class RootParameters(DiffPruningLayer):
    """The parameters that the model itself owns, like CLIP's logit scale. Nothing can wrap the model, so this is a child
    of it that puts the effective parameters in their place while it runs.

    Args:
        model: the base model.
        noise: as of [`DiffPruningLayer`].
    """

    NAME = "root_parameters"

    def __init__(self, model: nn.Module, noise: NoisePass) -> None:
        super().__init__(model, "", {}, noise)
        self._plain: dict[str, nn.Parameter | None] = {}

    @property
    def module_key(self) -> str:
        """The name of the child, which is not the model's own."""
        return self.NAME

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":  # not as a submodule: the model would contain itself
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def watch(self) -> None:
        """Put effective parameters in whenever the model runs."""
        self.base_layer.register_forward_pre_hook(self._before)
        self.base_layer.register_forward_hook(self._after, always_call=True)

    def unwatch(self) -> None:
        """Undo [`watch`]."""
        remove_hooks(self.base_layer, self._before, self._after)

    def _before(self, module: nn.Module, args: Any) -> None:
        self.put()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.put_back()

    def put(self) -> None:
        """Put the effective parameters in the place of the plain ones."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        effective = {name: self.effective(name) for name in self.shapes}
        model = self.base_layer
        for name, tensor in effective.items():
            if tensor is not model._parameters[name]:
                self._plain[name] = model._parameters[name]
                self._running[name] = tensor, cast(Tensor, model._parameters[name])
                model._parameters[name] = tensor  # type: ignore[assignment]

    def put_back(self) -> None:
        """Undo [`put`]."""
        self.base_layer._parameters.update(self._plain)
        self._plain, self._running = {}, {}
