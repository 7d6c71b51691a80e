"""What a user calls: `peft_model.base_model`, which takes an adapter through gating, pruning and fixmask."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from diffpeft.files.encoding import rounded
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.tuner import combining, pruning
from diffpeft.tuner.base import FIXMASK
from diffpeft.tuner.gating import GatingPhase


class DiffPruningModel(GatingPhase):
    """Diff Pruning (arXiv 2012.07463) on a base model; what `peft_model.base_model` is.

    An adapter is in one of two phases. In "gating" every adapted parameter has a dense diff w and hard-concrete gates;
    [`gate_step`] moves the gates. [`magnitude_prune`] leads to "fixmask", in which only the values at the kept positions
    exist and train. Methods take the adapter's name, by default the active adapter's.
    """

    @classmethod
    def of(cls, model: nn.Module | None) -> DiffPruningModel | None:
        """The tuner of a model; None where there is no diff-pruning adapter.

        Where transformers' `model.add_adapter` or PEFT's `inject_adapter_in_model` put the adapters in, it is a view of the
        model that has the tuner's methods.
        """
        if isinstance(model, PeftModel):
            return model.base_model if isinstance(model.base_model, cls) else None
        if model is None or isinstance(model, cls):
            return model
        layer = next((module for module in model.modules() if isinstance(module, DiffPruningLayer)), None)
        if layer is None or not isinstance(getattr(model, "peft_config", None), dict):
            return None
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model, tuner.peft_config, tuner.active_adapter = model, model.peft_config, layer.active_adapters
        tuner.training = model.training
        return tuner

    # From gating to fixmask

    def magnitude_prune(
        self,
        density: float | None = None,
        adapter_name: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> pruning.PruningSummary:
        """Go from gating to fixmask: keep the largest |delta| over all tensors together (arXiv 2012.07463, section 3.1).

        Exactly round(density * base parameters) entries are kept; where gates left fewer than that open, the entries
        most likely to be open fill up the rest, starting from zero.

        Args:
            density: nonzeros as a share of the base parameters, by default the config's `target_density`.
            adapter_name: the adapter, by default the active one.
            optimizer: re-pointed at the kept values, in place: gates and dense diffs leave its groups and its state.

        Raises:
            ValueError: the adapter is pruned already; density outside (0, 1], or so small that nothing is kept, or more
                than the adapted modules have; a diff that is not finite; an optimizer that cannot be re-pointed.
        """
        return pruning.magnitude_prune(self, self.resolve(adapter_name), density, optimizer)

    # The diff

    @torch.no_grad()
    def get_diff(self, adapter_name: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """The diff: (positions, values) of each parameter with nonzeros, by its name in the base model.

        Positions are flat, int64, sorted; values fp32. In gating these are the nonzeros under deterministic gates.
        """
        name = self.resolve(adapter_name)
        diff = {}
        for layer in self.layers_of(name):
            for parameter in layer.shapes if layer.is_gating(name) else ():
                delta = layer.dense_delta(name, parameter).reshape(-1)
                positions = torch.nonzero(delta).squeeze(1)
                if positions.numel():
                    diff[layer.parameter_key(parameter)] = positions, delta[positions]
            for sparse in layer.sparse_diffs(name).values():
                diff[sparse.key] = sparse.positions, sparse.values.detach().float().clone()
        return diff

    def open_values(self) -> None:
        """Check and decode the diffs that adapters have from files, which the first forward pass would do.

        Call it before FSDP shards the model. Raises ValueError for diffs that were never loaded or are damaged.
        """
        for layer in self.all_layers():
            for adapter_name in self.peft_config:
                for diff in layer.sparse_diffs(adapter_name).values():
                    diff.values  # noqa: B018 - decodes at first use

    @torch.no_grad()
    def cast_values(self, dtype: str, adapter_name: str | None = None) -> None:
        """Round a pruned diff's values, for a file of fewer bytes.

        "bfloat16" or "float16" take half of "float32", "int8" a quarter. In memory values stay fp32. Once they train on they
        are saved in fp32 again.

        Raises:
            ValueError: in gating, for another dtype, and where values would become infinite.
        """
        name = self.resolve(adapter_name)
        if self.phase(name) != FIXMASK:
            raise ValueError(f"adapter {name!r} is in gating, its values are not final; call magnitude_prune first")
        config = copy.copy(self.peft_config[name])
        config.value_dtype = dtype
        config.__post_init__()
        diffs = [diff for layer in self.layers_of(name) for diff in layer.sparse_diffs(name).values()]
        result = [rounded(diff.values, dtype) for diff in diffs]
        for diff, values in zip(diffs, result, strict=True):
            if not bool(values.isfinite().all()):
                raise ValueError(f"{diff.key} has values beyond {dtype}; use 'bfloat16'")
        for diff, values in zip(diffs, result, strict=True):
            diff.parameter.data = values
        for layer in self.layers_of(name):
            layer.configs[name] = config
        self.peft_config[name] = config

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
        """Add a pruned adapter that combines others; see [`diffpeft.sparse.combine`]. It is frozen and not active.

        Args:
            adapters: pruned adapters of this model.
            weights: one for each adapter.
            adapter_name: the new adapter's name.
            combination_type: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune".
            density: for all types except "linear", the share of each diff's nonzeros that goes in.
            majority_sign_method: for TIES, "total" or "frequency".
            target_density: nonzeros of the result at most, as a share of all base parameters; None keeps all.
            heads_from: the adapter whose heads (`modules_to_save`) the new one gets a copy of, where several have one:
                heads of different tasks have no sum.

        Raises:
            ValueError: a name that exists or does not; an adapter in gating; several heads without `heads_from`; what
                `combine` refuses.
        """
        source = combining.check_combinable(self, adapters, adapter_name, heads_from)
        modules = {layer.module_key for name in adapters for layer in self.layers_of(name)}
        combining.add_combination(
            self,
            [self.get_diff(name) for name in adapters],
            weights,
            adapter_name,
            source,
            targets=combining.common_targets([self.peft_config[name] for name in adapters], modules),
            target_density=target_density,
            combination_type=combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
        )
