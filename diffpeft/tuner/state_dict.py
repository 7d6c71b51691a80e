"""The tuner's part in what goes into an adapter's file and what comes out of one (PEFT's hooks)."""

from __future__ import annotations

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.files import values
from diffpeft.layer.find import outer_modules
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.tensors import POSITIONS, VALUES
from diffpeft.sparse.sharded import is_sharded
from diffpeft.tuner import loading
from diffpeft.tuner.base import DiffPruningTuner


class AdapterStateDict(DiffPruningTuner):
    """Saving and loading."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DiffPruningConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What goes into the file (PEFT's hook): values in the config's dtype, positions with their seal."""
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        layers = {
            n: m for n, m in model.named_modules() if isinstance(m, DiffPruningLayer) and m.has_adapter(adapter_name)
        }
        kept = {}
        for module, layer in layers.items():
            for name in layer.nnz(adapter_name) or {}:
                keys = tuple(f"{module}.{kind}.{adapter_name}.{name}" for kind in (VALUES, POSITIONS))
                if all(key in tensors for key in keys):
                    # What was just opened is not yet what the state dict has; what is sharded is whole there alone.
                    mine = layer.sparse(adapter_name, name).values
                    kept[layer, name, keys] = tensors[keys[0]] if is_sharded(mine) else mine
        if not all(values.fit(tensor, config.value_dtype) for tensor in kept.values()):
            config.value_dtype = "float32"  # they have trained since they were cast
            for layer in layers.values():
                layer.configs[adapter_name] = config
        targets = config.target_modules if isinstance(config.target_modules, (list, set)) else []
        if any(layer.merged for layer in layers.values()) and any(
            target.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for target in targets
        ):
            raise ValueError(
                f"PEFT saves the whole embeddings beside the diff where target_modules names them, {sorted(targets)}, and "
                "they hold the diff already while it is merged; call unmerge_adapter() first"
            )
        for (layer, name, keys), tensor in kept.items():
            tensors.update(zip(keys, layer.sparse(adapter_name, name).encoded(tensor), strict=True))
        return tensors

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
        state_dict = loading.adopt(list(layers.values()), config, adapter_name, state_dict)
        own = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.tensors(adapter_name)}
        state_dict = loading.rename(state_dict, {cls._remove_adapter_name_from_key(key, adapter_name) for key in own})
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        loading.check_complete(own, adapter_name, remapped)
        return remapped
