"""The tuner: wraps the modules of a base model, and takes an adapter through gating, pruning and fixmask."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from torch import nn

from diffpeft.config import DiffPruningConfig, check_density
from diffpeft.gates.scores import GatedDiff
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.tensors import GATING_PARAMETERS, VALUES
from diffpeft.sparse import scan
from diffpeft.sparse import top_k as pruning
from diffpeft.sparse.sharded import check_whole
from diffpeft.tuner.combining import Combining
from diffpeft.tuner.gating import GATING
from diffpeft.tuner.optimizer import check_replaceable, replace_parameters


class DiffPruningModel(Combining):
    """Diff Pruning (arXiv 2012.07463) on a base model; what `peft_model.base_model` is.

    An adapter is in one of two phases. In "gating" every adapted parameter has a dense diff w and hard-concrete gates;
    [`gate_step`] moves the gates. [`magnitude_prune`] leads to "fixmask", in which only the values at the kept positions
    exist and train. Methods take the adapter's name, by default the active adapter's.
    """

    @classmethod
    def of(cls, model: nn.Module | None) -> DiffPruningModel | None:
        """The tuner of a model: that of a `PeftModel`, or, where transformers' `model.add_adapter` or PEFT's
        `inject_adapter_in_model` put the adapters in, a view of the model that has the tuner's methods. None where there
        is no diff-pruning adapter."""
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

    @torch.no_grad()
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
        name = self._name(adapter_name)
        config: DiffPruningConfig = self.peft_config[name]
        if self.phase(name) != GATING:
            raise ValueError(
                f"adapter {name!r} is pruned already, to {self._count(name)} nonzeros; it cannot be pruned twice"
            )
        density = config.target_density if density is None else density
        check_density(density)
        total, adapted = self.num_base_parameters(), self._count(name)
        k = round(density * total)
        if not 1 <= k <= adapted:
            raise ValueError(
                f"density={density} of {total} base parameters is {k} nonzeros, but the adapted modules offer 1 to "
                f"{adapted}; change target_density or target_modules"
            )
        if any(name in layer.merged_adapters for layer in self._layers(name)):
            raise ValueError(f"adapter {name!r} is merged into the base model; call unmerge_adapter() before pruning")
        old = {layer: layer.adapter_parameters(name) for layer in self._layers(name)}
        check_whole((p for parameters in old.values() for p in parameters), "magnitude_prune")
        if optimizer is not None:
            check_replaceable(optimizer, {p for parameters in old.values() for p in parameters if p.requires_grad})

        owners = [(layer, parameter) for layer in old for parameter in layer.shapes]
        diffs = [_diff(layer, name, parameter) for layer, parameter in owners]
        kept, threshold = scan.top_k(diffs, k)
        per_parameter, replacement = {}, dict[nn.Parameter, nn.Parameter | None]()
        chosen = {owner: (p, diff.values(p)) for owner, diff, p in zip(owners, diffs, kept, strict=True)}
        for layer, parameters in old.items():
            diff, w = (
                {parameter: chosen[layer, parameter] for parameter in layer.shapes},
                dict(layer.diffpruning_w[name]),
            )
            for parameter, (where, _) in diff.items():
                per_parameter[layer.parameter_key(parameter)] = where.numel(), w[parameter].numel()
            layer.set_diff(name, diff)
            values = getattr(layer, VALUES)[name]
            replacement.update(dict.fromkeys(parameters))
            replacement.update({w[parameter]: values[parameter] for parameter in values})
        # A copy: the caller's config stays what it was, to begin another adapter with.
        config = self.peft_config[name] = copy.copy(config)
        config.target_density = density
        config.nnz_pattern = {key: count for key, (count, _) in per_parameter.items() if count}
        for layer in old:
            layer.configs[name] = config
            layer.noise.scratch.clear()
        if optimizer is not None:
            replace_parameters(optimizer, replacement)
        return pruning.PruningSummary(k, total, threshold.value, per_parameter)


def _diff(layer: DiffPruningLayer, adapter_name: str, parameter: str) -> GatedDiff:
    """The diff of one parameter in gating."""
    w, log_alpha, group_log_alpha = (getattr(layer, kind)[adapter_name] for kind in GATING_PARAMETERS)
    parts = (w[parameter].detach(), log_alpha.get(parameter, None), group_log_alpha.get(parameter, None))
    return GatedDiff(*parts, layer.configs[adapter_name].stretch)
