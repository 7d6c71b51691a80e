"""The output layer of a model that generates, as trainers look at it."""

from typing import Any

from torch import nn

from diffpeft.layer.layer import DiffPruningLayer


class OutputLayer(nn.Module):
    """A wrapped output layer as a module of no adapter's type.

    TRL computes log-probabilities from the output layer's weight and refuses adapters on it, by their type, because
    others leave that weight as it was. Here it is the effective one, in training too, so nothing is ignored.
    """

    def __init__(self, layer: DiffPruningLayer) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # a view: not a second owner of the parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __eq__(self, other: object) -> bool:
        # PEFT looks for the output layer's name by comparing it with every module.
        return other is self or other is self.layer

    def __hash__(self) -> int:
        return hash(self.layer)
