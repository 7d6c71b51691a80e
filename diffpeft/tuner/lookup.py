"""Looking up the tuner of a model, and the adapter that a caller means."""

from __future__ import annotations

from typing import Any, TypeVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from diffpeft.layer.layer import DiffPruningLayer

Tuner = TypeVar("Tuner", bound=BaseTuner)


def find_tuner(cls: type[Tuner], model: nn.Module | None) -> Tuner | None:
    """The tuner of class `cls` of a model, or in it; None where there is none.

    Where layers were wrapped without a tuner, it is a view of their model that has the tuner's methods.

    Raises:
        ValueError: there are several.
    """
    modules = [] if model is None else list(model.named_modules())
    found = {name: module for name, module in modules if isinstance(module, cls)}
    if not found:
        owners = {name: module for name, module in modules if isinstance(vars(module).get("peft_config"), dict)}
        views = {name: _view(cls, module) for name, module in owners.items() if not isinstance(module, PeftModel)}
        found = {name: view for name, view in views.items() if view is not None}
    if len(found) > 1:
        raise ValueError(f"there are adapters in {sorted(found)}, and one of them can train; wrap their common parent")
    return next(iter(found.values()), None)


def _view(cls: type[Tuner], model: Any) -> Tuner | None:
    layer = next((module for module in model.modules() if isinstance(module, DiffPruningLayer)), None)
    if layer is None:
        return None
    tuner: Any = object.__new__(cls)
    nn.Module.__init__(tuner)
    tuner.model, tuner.peft_config, tuner.active_adapter = model, model.peft_config, layer.active_adapters
    tuner.training = model.training
    return tuner  # type: ignore[no-any-return]


def resolve(tuner: Any, adapter_name: str | None) -> str:
    """An adapter's name, by default that of the active one, of several the one that trains.

    Raises:
        ValueError: there is no such adapter, or none or several that could be meant.
    """
    if adapter_name is None:
        active = tuner.active_adapters
        meant = active if len(active) == 1 else [name for name in active if _trains(tuner, name)]
        if len(meant) != 1:
            raise ValueError(
                f"of {active} {len(meant)} train; say which one you mean by adapter_name=, or freeze others"
            )
        adapter_name = meant[0]
    check_names(tuner, [adapter_name])
    return adapter_name


def _trains(tuner: Any, adapter_name: str) -> bool:
    layers = tuner.layers_of(adapter_name)
    return any(parameter.requires_grad for layer in layers for parameter in layer.adapter_parameters(adapter_name))


def check_names(tuner: BaseTuner, names: list[str]) -> None:
    """Raise ValueError for adapters that the tuner does not have."""
    unknown = sorted(set(names) - tuner.peft_config.keys())
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise ValueError(f"there is no adapter {listed}; there are {sorted(tuner.peft_config)}")
