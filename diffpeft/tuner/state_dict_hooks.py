"""The tuner's hooks for saving and loading; what they do is in `diffpeft/tuner/state_dict.py`."""

from __future__ import annotations

from torch import Tensor, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.layer.find import outer_modules
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.tuner.base import DiffPruningTuner
from diffpeft.tuner.state_dict import check_complete, match_file, rename, tensors_to_save


class AdapterStateDict(DiffPruningTuner):
    """PEFT's hooks for saving and loading."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DiffPruningConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors for a file (PEFT's hook)."""
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return tensors_to_save(model, config, adapter_name, tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DiffPruningConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bring the adapter into the file's phase and shapes, which loading into an adapter that exists does not."""
        layers = {
            name: layer
            for name, layer in outer_modules(model)
            if isinstance(layer, DiffPruningLayer) and layer.has_adapter(adapter_name)
        }
        state_dict = match_file(layers.values(), config, adapter_name, state_dict)
        own = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.tensors(adapter_name)}
        state_dict = rename(state_dict, {cls._remove_adapter_name_from_key(key, adapter_name) for key in own})
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_complete(own, adapter_name, remapped)
        return remapped
