"""The tuner's part in combining finished adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper

from diffpeft.config import check_density
from diffpeft.sparse.combine import combine
from diffpeft.tuner.finished import FinishedDiffs
from diffpeft.tuner.gating import GATING


class Combining(FinishedDiffs):
    """Adapters made of others."""

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        target_density: float | None = None,
        heads_from: str | None = None,
    ) -> None:
        """Add a finished adapter that combines others; see [`diffpeft.sparse.combine.combine`]. It is frozen and not active.

        Args:
            adapters: finished adapters of this model.
            weights: one a adapter.
            adapter_name: the new adapter's name.
            combination_type: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune".
            density: for all types but "linear", the share of each diff's nonzeros that goes in.
            majority_sign_method: for TIES, "total" or "frequency".
            target_density: nonzeros of the result at most, as a share of all base parameters; None keeps all.
            heads_from: which adapter's heads (`modules_to_save`) the new one gets a copy of, where several have one:
                heads of different tasks have no sum.

        Raises:
            ValueError: a name that exists or does not; an adapter in gating; several heads without `heads_from`; what
                `combine` refuses.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; choose another name or delete it first")
        for name in adapters:
            if self.phase(self._name(name)) == GATING:
                raise ValueError(f"adapter {name!r} is in gating; call magnitude_prune(adapter_name={name!r}) first")
        heads = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        owners = [name for name in dict.fromkeys(adapters) if any(name in head.modules_to_save for head in heads)]
        if heads_from is None and len(owners) > 1:
            raise ValueError(f"{owners} have a head each, which cannot be summed; say whose to take with heads_from=")
        if heads_from is not None and heads_from not in owners:
            raise ValueError(f"heads_from={heads_from!r} has no head; use one of {owners}, or None")
        total = self.num_base_parameters()
        if target_density is not None:
            check_density(target_density)
        diff = combine(
            [self.get_diff(name) for name in adapters],
            weights,
            combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
            max_nonzeros=None if target_density is None else max(1, round(target_density * total)),
        )
        nnz = {key: where.numel() for key, (where, _) in diff.items()}
        source = heads_from or (owners[0] if owners else adapters[0])
        self.peft_config[adapter_name] = replace(
            self.peft_config[source],
            **self._common_targets(adapters),
            nnz_pattern=nnz,
            value_dtype="float32",
            target_density=max(sum(nnz.values()), 1) / total,
            inference_mode=True,
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in self._layers(adapter_name):
            keys = {layer.parameter_key(name): name for name in layer.shapes}
            layer.set_diff(adapter_name, {name: diff[key] for key, name in keys.items() if key in diff})
        for head in heads:
            if source in head.modules_to_save:
                head.modules_to_save[adapter_name].load_state_dict(head.modules_to_save[source].state_dict())
        self.set_requires_grad(adapter_name, requires_grad=False)

    def _common_targets(self, adapters: Sequence[str]) -> dict[str, Any]:
        """What of the config says where the diffs of all these adapters are."""
        fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        targets = [{field: getattr(self.peft_config[name], field) for field in fields} for name in adapters]
        if all(target == targets[0] for target in targets):
            return targets[0]
        keys = sorted({layer.module_key for name in adapters for layer in self._layers(name)})
        anywhere = any(target["target_modules"] is None for target in targets)
        return {**dict.fromkeys(fields), "target_modules": None if anywhere else keys}
