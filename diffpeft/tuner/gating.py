"""The tuner's part in gating: what the gates of an adapter are worth, and moving them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffpeft.config import DiffPruningConfig
from diffpeft.files.encoding import stored_size
from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.update import step as update
from diffpeft.gates.update.collect import collect, log_alphas
from diffpeft.gates.update.in_backward import InBackward, backward_steps, check_low_memory
from diffpeft.gates.update.state import GATING_BUFFERS
from diffpeft.gates.update.step import Progress
from diffpeft.sparse import elias_fano as positions
from diffpeft.sparse.sharded import check_whole
from diffpeft.tuner.base import FIXMASK, GATING
from diffpeft.tuner.state_dict_hooks import AdapterStateDict


class GatingPhase(AdapterStateDict):
    """Expected density and a step of the gates; methods take the adapter's name, by default the active adapter's."""

    def adapted_parameters(self, adapter_name: str | None = None) -> dict[str, int]:
        """Number of elements of every parameter that the adapter covers, by its name in the base model."""
        layers = self.layers_of(self.resolve(adapter_name))
        return {layer.parameter_key(n): shape.numel() for layer in layers for n, shape in layer.shapes.items()}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The gates' moments, by name in the PeftModel. They follow from gradients that are equal on all ranks;
        DistributedDataParallel, which reads this name, would send them around in every forward."""
        names = [name for name, _ in self.named_buffers()]
        return [f"base_model.{name}" for name in names if any(f".{part}." in name for part in GATING_BUFFERS)]

    def is_gated(self, adapter_name: str | None = None) -> bool:
        """Whether the adapter is in gating and has gates."""
        name = self.resolve(adapter_name)
        return self.peft_config[name].gated and self.phase(name) == GATING

    def l0_penalty(self, adapter_name: str | None = None) -> Tensor:
        """The expected number of nonzeros, before lambda; a differentiable scalar (arXiv 2012.07463, equations 4, 6).

        In fixmask it is the number of nonzeros, and in gating without gates the number of adapted parameters; neither
        has a gradient.
        """
        name = self.resolve(adapter_name)
        config = self.peft_config[name]
        terms = [
            gates.expected_l0(
                elements.log_alpha, None if gate is None else gate.log_alpha, config.stretch, config.group_penalty
            )
            for elements, gate in collect(self.layers_of(name), name)
        ]
        if terms:
            return torch.stack(terms).sum()
        return torch.tensor(float(self._count(name)))

    def _count(self, adapter_name: str) -> int:
        """Elements of w in gating, nonzeros in fixmask."""
        layers = self.layers_of(adapter_name)
        if self.phase(adapter_name) == FIXMASK:
            return sum(sum((layer.nnz(adapter_name) or {}).values()) for layer in layers)
        return sum(shape.numel() for layer in layers for shape in layer.shapes.values())

    @torch.no_grad()
    def num_nonzeros(self, adapter_name: str | None = None) -> int:
        """Nonzeros of the diff; in gating, those under deterministic gates."""
        name = self.resolve(adapter_name)
        if self.phase(name) == FIXMASK:
            return self._count(name)
        layers = self.layers_of(name)
        return sum(int(layer.dense_delta(name, p).count_nonzero()) for layer in layers for p in layer.shapes)

    def expected_nonzeros(self, adapter_name: str | None = None) -> float:
        """Expected number of nonzeros of the diff: sum over elements of P(element open) P(group open)."""
        name = self.resolve(adapter_name)
        if not self.is_gated(name):
            return float(self._count(name))
        stretch, known = self.peft_config[name].stretch, self.__dict__.get("_open_count")
        count = self.__dict__["_open_count"] = update.count_open(self.layers_of(name), name, stretch, known)
        return count.expected

    def expected_density(self, adapter_name: str | None = None) -> float:
        """Expected nonzeros as a share of all base parameters, adapted or not."""
        return self.expected_nonzeros(adapter_name) / self.num_base_parameters()

    def adapter_bytes(self, adapter_name: str | None = None) -> int:
        """Bytes that the diff takes in a file; in gating an estimate, for the expected nonzeros spread evenly."""
        name = self.resolve(adapter_name)
        layers = self.layers_of(name)
        if self.phase(name) == FIXMASK:
            dtype = self.peft_config[name].value_dtype
            parts = [(k, layer.shapes[p].numel()) for layer in layers for p, k in (layer.nnz(name) or {}).items()]
            return sum(stored_size(count, numel, dtype) for count, numel in parts)
        share = self.expected_nonzeros(name) / self._count(name)
        sizes = [shape.numel() for layer in layers for shape in layer.shapes.values()]
        return sum(positions.packed_size(round(share * n), n) + 4 * round(share * n) for n in sizes)

    def density_progress(self, adapter_name: str | None = None) -> float:
        """How far gating has come, from 0 at a dense diff to 1 at `target_density`, in the logarithm of the density."""
        name = self.resolve(adapter_name)
        if not self.is_gated(name):
            return 0.0
        target = self.peft_config[name].target_density
        if target == 1.0:
            return 1.0
        return min(1.0, max(0.0, math.log(self.expected_density(name)) / math.log(target)))

    def update_in_backward(self, optimizer: torch.optim.Optimizer, adapter_name: str | None = None) -> InBackward:
        """Have large diffs step within the backward pass, and gradients of gates used there, with `low_memory=True`.

        Call it once before training, or before training goes on; [`DiffPruningCallback`] does. The diffs take learning
        rate and weight decay of their group of the optimizer as they are during backward. Pruning ends it.

        Args:
            optimizer: of Adam's family, made of `model.parameters()`.
            adapter_name: the adapter, by default the active one.

        Returns:
            A handle that ends it before, with `remove()`, and has a factor of the learning rates, `rate_factor`.

        Raises:
            ValueError: the adapter is pruned or its config has no low_memory=True; more than one process; fp16 with
                gradient scaling; what [`diffpeft.gates.update.in_backward.InBackward`] refuses.
        """
        name = self.resolve(adapter_name)
        if self.phase(name) != GATING or not self.peft_config[name].low_memory:
            raise ValueError(
                f"adapter {name!r} is in {self.phase(name)} and has low_memory={self.peft_config[name].low_memory}; "
                "update_in_backward is for gating with DiffPruningConfig(low_memory=True)"
            )
        check_low_memory()
        return InBackward(optimizer, [step for layer in self.layers_of(name) for step in backward_steps(layer, name)])

    def gate_step(self, step: int, gating_steps: int, adapter_name: str | None = None) -> float:
        """Move the gates once, from the gradients of the task loss on them, and clear these gradients.

        Call it once an update, after backward and gradient clipping and before `optimizer.step()`, which then has
        nothing to do for the gates. [`DiffPruningCallback`] does. An update whose gradients are not finite is skipped,
        as a gradient scaler skips its own. With `low_memory=True` the gradients are in the gates' moments by then, except
        what was not finite.

        Args:
            step: updates done so far, from 0.
            gating_steps: length of the gating phase.
            adapter_name: the adapter, by default the active one.

        Returns:
            The lambda that was used: the config's, or the one that was solved for; NaN if the update was skipped.

        Raises:
            ValueError: the adapter is pruned; parameters are sharded; with `low_memory=True` gradients that were to be
                used in the backward pass.
        """
        name = self.resolve(adapter_name)
        if self.phase(name) != GATING:
            raise ValueError(f"adapter {name!r} is in fixmask, its gates are gone; do not call gate_step after pruning")
        config: DiffPruningConfig = self.peft_config[name]
        if not config.gated:
            return 0.0
        layers = self.layers_of(name)
        check_whole(log_alphas(layers, name), "gate_step")
        progress, known = Progress(step, gating_steps, self.num_base_parameters()), self.__dict__.get("_open_count")
        l0_lambda, self.__dict__["_open_count"] = update.gate_step(layers, name, config, progress, known)
        return l0_lambda
