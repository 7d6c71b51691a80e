"""The tuner: wraps the modules of a base model, and takes an adapter through gating, pruning and fixmask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from diffpeft import gate_update, gates, pruning
from diffpeft.adapter import VALUES, GateTensors, is_quantized, own_shapes
from diffpeft.config import DiffPruningConfig, check_density
from diffpeft.injection import Injection
from diffpeft.layer import DiffPruningLayer, RootParameters
from diffpeft.mixed import BASE, MixedBatch, Part
from diffpeft.optimizer import check_replaceable, replace_parameters

GATING, FIXMASK = "gating", "fixmask"


class DiffPruningModel(Injection):
    """Diff Pruning (arXiv 2012.07463) on a base model; what `peft_model.base_model` is.

    An adapter is in one of two phases. In "gating" every adapted parameter has a dense diff w and hard-concrete gates;
    [`gate_step`] moves the gates. [`magnitude_prune`] leads to "fixmask", in which only the values at the kept positions
    exist and train. Methods take the adapter's name, by default the active adapter's.
    """

    # Finding things

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

    def _layers(self, adapter_name: str) -> list[DiffPruningLayer]:
        return [layer for layer in self.all_layers() if layer.has_adapter(adapter_name)]

    def _name(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"active adapters are {self.active_adapters}; say which one you mean by adapter_name=")
            adapter_name = self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"no adapter {adapter_name!r}; there are {sorted(self.peft_config)}")
        return adapter_name

    def num_base_parameters(self) -> int:
        """Parameters of the base model, adapted or not, tied ones once, heads in `modules_to_save` not counted."""
        packed = {id(p): module for module in self.model.modules() if is_quantized(module) for p in [module.weight]}
        return sum(
            own_shapes(packed[id(p)])["weight"].numel() if id(p) in packed else p.numel()
            for _, p in self.base_parameters()
        )

    def adapted_parameters(self, adapter_name: str | None = None) -> dict[str, int]:
        """Number of elements of every parameter that the adapter covers, by its name in the base model."""
        layers = self._layers(self._name(adapter_name))
        return {layer.parameter_key(n): shape.numel() for layer in layers for n, shape in layer.shapes.items()}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The gates' moments, by name in the PeftModel. They follow from gradients that are equal on all ranks;
        DistributedDataParallel, which reads this name, would send them around in every forward."""
        names = ("diffpruning_exp_avg", "diffpruning_group_exp_avg")
        return [f"base_model.{name}" for name, _ in self.named_buffers() if any(f".{part}" in name for part in names)]

    # Mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around forward and generate: takes `adapter_names`, an adapter's name or "__base__" a row."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_mixed(names)
        layers, root = list(self.all_layers()), getattr(self.model, RootParameters.NAME, None)
        batch = MixedBatch(
            self.model,
            names,
            self._parts(layers),
            self.__dict__.setdefault("_row_layouts", {}),
            root.run if isinstance(root, RootParameters) else None,
            _beams(**kwargs),
        )
        for layer in layers:
            layer.mixed = batch
        try:
            with batch.running():
                yield
        finally:
            for layer in layers:
                layer.mixed = None

    def _check_mixed(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
            raise ValueError(f"adapter_names={names!r} must be a list with an adapter's name for each row")
        unknown = sorted(set(names) - self.peft_config.keys() - {BASE})
        if unknown:
            raise ValueError(f"adapter_names has {unknown}, but there are {sorted(self.peft_config)} and {BASE!r}")
        if self.training:
            raise ValueError("adapter_names mixes adapters for inference; call model.eval() first, train one at a time")
        for layer in self.all_layers():
            if layer.merged:
                raise ValueError(
                    f"adapter_names cannot take {layer.merged_adapters} back out of the base weights of some rows; call "
                    "unmerge_adapter() first"
                )
            if layer.disable_adapters:
                raise ValueError("adapter_names was given while adapters are disabled; enable them, or leave it out")

    def _parts(self, layers: Sequence[DiffPruningLayer]) -> list[Part]:
        parts = []
        for layer in layers:
            if not isinstance(layer, RootParameters):
                shared = isinstance(layer.base_layer, nn.Embedding)
                parts.append(Part(layer, layer.key, layer.changes_any, partial(_run_layer, layer.forward), shared))
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                heads = module.modules_to_save
                parts.append(Part(module, name, heads.__contains__, partial(_run_head, module), False))
        return parts

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
        return sum(shape.numel() for layer in layers for shape in layer.shapes.values())

    @torch.no_grad()
    def num_nonzeros(self, adapter_name: str | None = None) -> int:
        """Nonzeros of the diff; in gating, those under deterministic gates."""
        name = self._name(adapter_name)
        if self.phase(name) == FIXMASK:
            return self._count(name)
        layers = self._layers(name)
        return sum(int(layer.dense_delta(name, p).count_nonzero()) for layer in layers for p in layer.shapes)

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

        owners = [(layer, parameter) for layer in old for parameter in layer.shapes]
        scores = [_score(layer, name, parameter) for layer, parameter in owners]
        kept, threshold = pruning.global_top_k(scores, k)
        per_parameter, replacement = {}, dict[nn.Parameter, nn.Parameter | None]()
        positions = dict(zip(owners, kept, strict=True))
        for layer, parameters in old.items():
            diff, w = {}, dict(layer.diffpruning_w[name])
            for parameter in layer.shapes:
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
            for parameter in layer.shapes:
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


def _run_layer(forward: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _run_head(wrapper: ModulesToSaveWrapper, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    head = wrapper.original_module if adapter_name == BASE else wrapper.modules_to_save[adapter_name]
    return head(*args, **kwargs)


def _beams(num_beams: Any = None, num_return_sequences: Any = None, generation_config: Any = None, **_: Any) -> int:
    """Rows that generation makes of each of its input's."""
    told = [getattr(generation_config, name, None) for name in ("num_beams", "num_return_sequences")]
    return max(int(count or 1) for count in (num_beams, num_return_sequences, *told))


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
