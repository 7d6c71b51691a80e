"""The tuner: wraps the modules of a base model, and takes an adapter through gating, pruning and fixmask."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffpeft import gate_update, gates, loading, pruning
from diffpeft.config import DiffPruningConfig, check_density
from diffpeft.head import fresh_head
from diffpeft.layer import VALUES, DiffPruningLayer, GateTensors
from diffpeft.optimizer import check_replaceable, replace_parameters

GATING, FIXMASK = "gating", "fixmask"


class DiffPruningModel(BaseTuner):
    """Diff Pruning (arXiv 2012.07463) on a base model; what `peft_model.base_model` is.

    An adapter is in one of two phases. In "gating" every adapted parameter has a dense diff w and hard-concrete gates;
    [`gate_step`] moves the gates. [`magnitude_prune`] leads to "fixmask", in which only the values at the kept positions
    exist and train. Methods take the adapter's name, by default the active adapter's.
    """

    prefix: str = "diffpruning_"
    tuner_layer_cls = DiffPruningLayer
    target_module_mapping: dict[str, list[str]] = {}  # the default is found in the model, not by its type
    _owners: dict[int, tuple[DiffPruningLayer, str]]  # during injection: which layer has the diff of a parameter

    # Injection

    def _prepare_adapter_config(
        self, peft_config: DiffPruningConfig, model_config: dict[str, Any]
    ) -> DiffPruningConfig:
        if peft_config.target_modules is None:
            head = [name for name in fresh_head(self.model) if name not in (peft_config.modules_to_save or [])]
            if head:
                peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *head]
        return peft_config

    def _check_new_adapter_config(self, config: DiffPruningConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, DiffPruningLayer):
                raise ValueError(
                    f"{name} already carries an adapter of another kind ({type(module).__name__}), under which the base "
                    "weights are not the model's own; unload it or merge it first"
                )
        if not any(p.is_floating_point() for p in self.model.parameters()):
            raise ValueError("the base model has no floating-point parameters, so there is nothing to adapt")

    def _check_target_module_exists(self, peft_config: DiffPruningConfig, key: str) -> Any:
        module = self.model.get_submodule(key)
        if isinstance(module, DiffPruningLayer):
            module = module.base_layer
        own = [name for name, p in module.named_parameters(recurse=False) if p.is_floating_point()]
        config = peft_config
        if peft_config.target_modules is None:
            # PEFT's own matching of exclusions, heads and layer indices, for a target that is this very module.
            if peft_config.layers_to_transform is not None and "." not in key:
                return False
            config = copy.copy(peft_config)
            config.target_modules = [key.rsplit(".", 1)[-1]]
        matched = super()._check_target_module_exists(config, key)
        return matched if own or not matched else False

    def _create_and_replace(
        self,
        peft_config: DiffPruningConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, DiffPruningLayer):
            own = target.named_parameters(recurse=False)
            ties = {name: self._owners[id(p)] for name, p in own if id(p) in self._owners}
            layer = DiffPruningLayer(target, current_key.replace(".base_layer", ""), ties)
            self._owners.update(_owners(layer))
            # A module with children may be wrapped before them: they stay children of the wrapped module.
            parent = parent.base_layer if isinstance(parent, DiffPruningLayer) else parent
            setattr(parent, target_name, layer)
            target = layer
        target.update_layer(adapter_name, peft_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the modules that the config matches (PEFT's hook). Raises ValueError for a parameter out of reach."""
        self._owners = {parameter: owner for layer in self._all_layers() for parameter, owner in _owners(layer).items()}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._owners = {}
        config = self.peft_config[adapter_name]
        for layer in self._all_layers():
            # PEFT takes a module inside one that is wrapped already for a part of the other adapter, and skips it.
            if not layer.has_adapter(adapter_name) and self._check_target_module_exists(config, layer.key):
                layer.update_layer(adapter_name, config)
        if config.target_modules is None and (config.layers_to_transform, config.exclude_modules) == (None, None):
            adapted = {
                id(p) for layer in self._layers(adapter_name) for p in layer.base_layer.parameters(recurse=False)
            }
            left = [name for name, p in self._base_parameters() if id(p) not in adapted and p.is_floating_point()]
            if left:
                raise ValueError(
                    f"{len(left)} parameters of the base model cannot be adapted by the default target_modules: "
                    f"{left[:5]}; name the modules to adapt in target_modules"
                )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """PEFT's hook behind `unload` and `merge_and_unload`, which by itself leaves wrapped modules inside others."""
        wrapped = [(name, m) for name, m in self.model.named_modules() if isinstance(m, DiffPruningLayer)]
        for name, layer in tqdm(reversed(wrapped), total=len(wrapped), disable=not progressbar, desc="Unloading"):
            with onload_layer(layer):
                if merge:
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                else:
                    layer.unmerge()
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base_layer)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"adapter_names={kwargs['adapter_names']!r}: batches that mix diff-pruning adapters are not supported "
                "yet; call set_adapter and run one batch for each adapter"
            )
        yield

    # Finding things

    def _all_layers(self) -> Iterator[DiffPruningLayer]:
        return (module for module in self.model.modules() if isinstance(module, DiffPruningLayer))

    def _layers(self, adapter_name: str) -> list[DiffPruningLayer]:
        return [layer for layer in self._all_layers() if layer.has_adapter(adapter_name)]

    def _name(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"active adapters are {self.active_adapters}; say which one you mean by adapter_name=")
            adapter_name = self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"no adapter {adapter_name!r}; there are {sorted(self.peft_config)}")
        return adapter_name

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the base model by name, each once, without heads that are trained whole."""
        skipped: set[int] = set()
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                skipped.update(id(p) for p in module.parameters())
            elif isinstance(module, DiffPruningLayer):
                skipped.update(id(p) for adapter in self.peft_config for p in module.adapter_parameters(adapter))
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in skipped:
                yield name.replace(".base_layer", ""), parameter

    def num_base_parameters(self) -> int:
        """Parameters of the base model, adapted or not, tied ones once, heads in `modules_to_save` not counted."""
        return sum(parameter.numel() for _, parameter in self._base_parameters())

    def adapted_parameters(self, adapter_name: str | None = None) -> dict[str, int]:
        """Number of elements of every parameter that the adapter covers, by its name in the base model."""
        layers = self._layers(self._name(adapter_name))
        return {layer.parameter_key(n): p.numel() for layer in layers for n, p in layer.own_parameters().items()}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The gates' moments, by name in the PeftModel. They follow from gradients that are equal on all ranks;
        DistributedDataParallel, which reads this name, would send them around in every forward."""
        names = ("diffpruning_exp_avg", "diffpruning_group_exp_avg")
        return [f"base_model.{name}" for name, _ in self.named_buffers() if any(f".{part}" in name for part in names)]

    # Phases

    def phase(self, adapter_name: str | None = None) -> str:
        """The adapter's phase: "gating" or "fixmask"."""
        name = self._name(adapter_name)
        return GATING if any(layer.is_gating(name) for layer in self._layers(name)) else FIXMASK

    def is_gated(self, adapter_name: str | None = None) -> bool:
        """Whether the adapter is in gating and has gates."""
        name = self._name(adapter_name)
        return self.peft_config[name].gated and self.phase(name) == GATING

    def _groups(self, adapter_name: str) -> list[gate_update.Group]:
        groups = []
        for layer in self._layers(adapter_name):
            for elements, whole in layer.gates(adapter_name).values():
                groups.append(gate_update.Group(_with_gradient(elements), whole and _with_gradient(whole)))
        return groups

    def l0_penalty(self, adapter_name: str | None = None) -> Tensor:
        """The expected number of nonzeros, before lambda; a differentiable scalar (arXiv 2012.07463, equations 4, 6).

        In fixmask it is the number of nonzeros, and in gating without gates the number of adapted parameters; neither
        has a gradient.
        """
        name = self._name(adapter_name)
        config = self.peft_config[name]
        terms = [
            gates.expected_l0(
                element.log_alpha, None if whole is None else whole.log_alpha, config.stretch, config.group_penalty
            )
            for layer in self._layers(name)
            for element, whole in layer.gates(name).values()
        ]
        if terms:
            return torch.stack(terms).sum()
        return torch.tensor(float(self._count(name)))

    def _count(self, adapter_name: str) -> int:
        """Elements of w in gating, nonzeros in fixmask."""
        layers = self._layers(adapter_name)
        if self.phase(adapter_name) == FIXMASK:
            return sum(sum((layer.nnz(adapter_name) or {}).values()) for layer in layers)
        return sum(p.numel() for layer in layers for p in layer.own_parameters().values())

    @torch.no_grad()
    def num_nonzeros(self, adapter_name: str | None = None) -> int:
        """Nonzeros of the diff; in gating, those under deterministic gates."""
        name = self._name(adapter_name)
        if self.phase(name) == FIXMASK:
            return self._count(name)
        layers = self._layers(name)
        return sum(int(layer.dense_delta(name, p).count_nonzero()) for layer in layers for p in layer.own_parameters())

    def expected_nonzeros(self, adapter_name: str | None = None) -> float:
        """Expected number of nonzeros of the diff: sum over elements of P(element open) P(group open)."""
        name = self._name(adapter_name)
        if not self.is_gated(name):
            return float(self._count(name))
        return gate_update.expected_nonzeros(self._groups(name), self.peft_config[name].stretch)

    def expected_density(self, adapter_name: str | None = None) -> float:
        """Expected nonzeros as a share of all base parameters, adapted or not."""
        return self.expected_nonzeros(adapter_name) / self.num_base_parameters()

    def sparsification(self, adapter_name: str | None = None) -> float:
        """How far gating has come, from 0 at a dense diff to 1 at `target_density`, in the logarithm of the density."""
        name = self._name(adapter_name)
        if not self.is_gated(name):
            return 0.0
        target = self.peft_config[name].target_density
        if target == 1.0:
            return 1.0
        return min(1.0, max(0.0, math.log(self.expected_density(name)) / math.log(target)))

    @torch.no_grad()
    def gate_step(self, step: int, gating_steps: int, adapter_name: str | None = None) -> float:
        """Move the gates once, from the gradients of the task loss on them, and clear these gradients.

        Call it once an update, after backward and gradient clipping and before `optimizer.step()`, which then has
        nothing to do for the gates. [`DiffPruningCallback`] does. An update whose gradients are not finite is skipped,
        as a gradient scaler skips its own.

        Args:
            step: updates done so far, from 0.
            gating_steps: length of the gating phase.
            adapter_name: the adapter, by default the active one.

        Returns:
            The lambda that was used: the config's, or the one that was solved for.
        """
        name = self._name(adapter_name)
        if self.phase(name) != GATING:
            raise ValueError(f"adapter {name!r} is in fixmask, its gates are gone; do not call gate_step after pruning")
        config: DiffPruningConfig = self.peft_config[name]
        if not config.gated:
            return 0.0
        groups = self._groups(name)
        l0_lambda = 0.0 if config.l0_lambda == "auto" else float(config.l0_lambda)
        if bool(torch.isfinite(torch.stack([group.elements.grad.sum() for group in groups]).sum())):
            if config.l0_lambda == "auto":
                total, expected = self.num_base_parameters(), self.expected_nonzeros(name)
                start = total * float(
                    torch.sigmoid(gates.open_logit(torch.tensor(config.init_log_alpha), config.stretch))
                )
                target = config.target_density * total
                wanted = gate_update.density_schedule(step, gating_steps, start, min(start, target))
                pace = gate_update.automatic_pace(step, gating_steps, config.gate_learning_rate)
                l0_lambda = gate_update.automatic_step(groups, step, pace, config.stretch, expected, wanted)
            else:
                pace = config.gate_learning_rate or gate_update.PAPER_PACE
                gate_update.fixed_lambda_step(groups, l0_lambda, step, pace, config.stretch, config.group_penalty)
        for layer in self._layers(name):
            for gate in (gate for pair in layer.gates(name).values() for gate in pair if gate is not None):
                gate.log_alpha.grad = None
        return l0_lambda

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
        if optimizer is not None:
            check_replaceable(optimizer, {p for parameters in old.values() for p in parameters if p.requires_grad})

        owners = [(layer, parameter) for layer in old for parameter in layer.own_parameters()]
        scores = [_score(layer, name, parameter) for layer, parameter in owners]
        kept, threshold = pruning.global_top_k(scores, k)
        per_parameter, replacement = {}, dict[nn.Parameter, nn.Parameter | None]()
        positions = dict(zip(owners, kept, strict=True))
        for layer, parameters in old.items():
            diff, w = {}, dict(layer.diffpruning_w[name])
            for parameter in layer.own_parameters():
                where = positions[layer, parameter]
                diff[parameter] = where, torch.take(layer.dense_delta(name, parameter), where)
                per_parameter[layer.parameter_key(parameter)] = where.numel(), w[parameter].numel()
            layer.set_diff(name, diff)
            values = getattr(layer, VALUES)[name]
            replacement.update(dict.fromkeys(parameters))
            replacement.update({w[parameter]: values[parameter] for parameter in values})
        config.target_density = density
        config.nnz_pattern = {key: count for key, (count, _) in per_parameter.items() if count}
        if optimizer is not None:
            replace_parameters(optimizer, replacement)
        return pruning.PruningSummary(k, total, threshold.value, per_parameter)

    @torch.no_grad()
    def get_diff(self, adapter_name: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """The diff: (positions, values) of each parameter with nonzeros, by its name in the base model.

        Positions are flat, int64, sorted; values fp32. In gating these are the nonzeros under deterministic gates.
        """
        name = self._name(adapter_name)
        diff = {}
        for layer in self._layers(name):
            for parameter in layer.own_parameters():
                if layer.is_gating(name):
                    delta = layer.dense_delta(name, parameter).reshape(-1)
                    where = torch.nonzero(delta).squeeze(1)
                    pair = where, delta[where]
                elif parameter in getattr(layer, VALUES)[name]:
                    pair = layer.positions(name, parameter), getattr(layer, VALUES)[name][parameter].detach().clone()
                else:
                    continue
                if pair[0].numel():
                    diff[layer.parameter_key(parameter)] = pair
        return diff

    # Loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DiffPruningConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bring the adapter into the file's phase and shapes, which loading into an adapter that exists does not."""
        layers = [m for m in model.modules() if isinstance(m, DiffPruningLayer) and m.has_adapter(adapter_name)]
        loading.adopt(layers, config, adapter_name, state_dict)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        loading.check_complete(model.state_dict(), adapter_name, remapped)
        return remapped


def _owners(layer: DiffPruningLayer) -> dict[int, tuple[DiffPruningLayer, str]]:
    return {id(parameter): (layer, name) for name, parameter in layer.own_parameters().items()}


def _with_gradient(tensors: GateTensors) -> gate_update.Gates:
    log_alpha, exp_avg, exp_avg_sq = tensors
    grad = torch.zeros_like(log_alpha) if log_alpha.grad is None else log_alpha.grad
    return gate_update.Gates(log_alpha.detach(), grad, exp_avg, exp_avg_sq)


def _score(layer: DiffPruningLayer, adapter_name: str, parameter: str) -> pruning.Scores:
    """|delta| of one parameter; where a gate is shut, a number far below that orders entries by how nearly it is open."""

    def score() -> Tensor:
        delta = layer.dense_delta(adapter_name, parameter).abs_()
        if parameter in layer.diffpruning_log_alpha[adapter_name]:
            stretch = layer.configs[adapter_name].stretch
            w = layer.diffpruning_w[adapter_name][parameter].detach().abs()
            nearly = gates.open_probability(
                layer.diffpruning_log_alpha[adapter_name][parameter].detach(), stretch
            ).mul_(w)
            delta = torch.where(delta > 0, delta, nearly.mul_(1e-12))
        return delta

    return score
