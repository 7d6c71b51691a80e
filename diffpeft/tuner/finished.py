"""The tuner's part in finished diffs: what they are, and what dtype their values have."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from diffpeft.files.values import rounded
from diffpeft.layer.tensors import VALUES
from diffpeft.tuner.gating import FIXMASK, GatingPhase


class FinishedDiffs(GatingPhase):
    """Diffs as positions and values."""

    def open_values(self) -> None:
        """Check and decode what adapters have from files, which the first forward pass would do: call it before FSDP shards
        the model. Raises ValueError for what was never loaded or is damaged."""
        for layer in self.all_layers():
            for adapter_name in self.peft_config:
                for name in (layer.has_adapter(adapter_name) and layer.nnz(adapter_name)) or ():
                    layer.kept_values(adapter_name, name)

    @torch.no_grad()
    def cast_values(self, dtype: str, adapter_name: str | None = None) -> None:
        """Round a finished diff's values, for a file of fewer bytes: "bfloat16" or "float16" take half of "float32", "int8"
        a quarter.

        In memory they stay fp32. Once they train on they are saved in fp32 again.

        Raises ValueError in gating, for another dtype, and where values would become infinite.
        """
        name = self._name(adapter_name)
        if self.phase(name) != FIXMASK:
            raise ValueError(f"adapter {name!r} is in gating, its values are not final; call magnitude_prune first")
        config = copy.copy(self.peft_config[name])
        config.value_dtype = dtype
        config.__post_init__()
        result = {}
        for layer in self._layers(name):
            for parameter in getattr(layer, VALUES)[name]:
                values = layer.kept_values(name, parameter)
                result[values] = rounded(values, dtype)
                if not bool(result[values].isfinite().all()):
                    raise ValueError(f"{layer.parameter_key(parameter)} has values beyond {dtype}; use 'bfloat16'")
        for values, new in result.items():
            values.data = new
        for layer in self._layers(name):
            layer.configs[name] = config
        self.peft_config[name] = config

    @torch.no_grad()
    def get_diff(self, adapter_name: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """The diff: (positions, values) of each parameter with nonzeros, by its name in the base model.

        Positions are flat, int64, sorted; values fp32. In gating these are the nonzeros under deterministic gates.
        """
        name = self._name(adapter_name)
        diff = {}
        for layer in self._layers(name):
            for parameter in layer.shapes:
                if layer.is_gating(name):
                    delta = layer.dense_delta(name, parameter).reshape(-1)
                    where = torch.nonzero(delta).squeeze(1)
                    pair = where, delta[where]
                elif parameter in getattr(layer, VALUES)[name]:
                    values = layer.kept_values(name, parameter).detach()
                    pair = layer.positions(name, parameter), values.float().clone()
                else:
                    continue
                if pair[0].numel():
                    diff[layer.parameter_key(parameter)] = pair
        return diff
