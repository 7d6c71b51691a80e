"""The tuner that users call, `peft_model.base_model`, which takes an adapter through gating, pruning and fixmask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.config import FIXMASK, GATING, DiffPruningConfig
from diffpeft.files.encoding import stored_size
from diffpeft.files.keys import VALUES
from diffpeft.gates.update import step as gate_update
from diffpeft.gates.update.in_backward import InBackward, backward_steps, check_low_memory
from diffpeft.sparse.elias_fano import packed_size
from diffpeft.sparse.sharded import add_up, check_whole, processes_of, whole
from diffpeft.tuner import combining, fsdp, lookup, pruning, selection
from diffpeft.tuner.base import DiffPruningTuner


class DiffPruningModel(DiffPruningTuner):
    """Diff Pruning (arXiv 2012.07463) on a base model; what `peft_model.base_model` is.

    An adapter is in one of two phases. In "gating" every adapted parameter has a dense diff w and hard-concrete gates;
    [`gate_step`] moves the gates. [`magnitude_prune`] leads to "fixmask", in which only the values at the kept
    positions exist and train. Methods take the adapter's name, by default the active adapter's.
    """

    @classmethod
    def of(cls, model: nn.Module | None) -> DiffPruningModel | None:
        """The tuner of a model, or in it; None where there is no diff-pruning adapter. ValueError where there are two.

        Where transformers' `model.add_adapter` or PEFT's `inject_adapter_in_model` put the adapters in, it is a view of
        the model that has the tuner's methods.
        """
        return lookup.find_tuner(cls, model)

    # Gating

    def is_gated(self, adapter_name: str | None = None) -> bool:
        """Whether the adapter is in gating and has gates."""
        name = self.resolve(adapter_name)
        return self.peft_config[name].gated and self.phase(name) == GATING

    def gate_step(self, step: int, gating_steps: int, adapter_name: str | None = None) -> float:
        """Move the gates once, from the gradients of the task loss on them, and clear these gradients.

        Call it once an update, after backward and gradient clipping and before `optimizer.step()`, which then has
        nothing to do for the gates. [`DiffPruningCallback`] does. An update whose gradients are not finite is skipped,
        as a gradient scaler skips its own. With `low_memory=True` the gradients are in the gates' moments by then,
        except what was not finite.

        Args:
            step: updates done so far, from 0.
            gating_steps: length of the gating phase.

        Returns:
            The lambda that was used: the config's, or the one that was solved for; NaN if the update was skipped.

        Raises:
            ValueError: the adapter is pruned; with `low_memory=True` gradients that were to be used in backward.
        """
        name = self.resolve(adapter_name)
        if self.phase(name) != GATING:
            raise ValueError(f"adapter {name!r} is in fixmask, its gates are gone; do not call gate_step after pruning")
        config: DiffPruningConfig = self.peft_config[name]
        if not config.gated:
            return 0.0
        layers = self.layers_of(name)
        fsdp.shard_moments(layers, name)
        layers[0].noise.idle_passes = None
        progress = gate_update.Progress(step, gating_steps, self.num_base_parameters())
        known = self.__dict__.get("_open_count")
        l0_lambda, self.__dict__["_open_count"] = gate_update.gate_step(layers, name, config, progress, known)
        return l0_lambda

    def after_sharding(self) -> None:
        """Make gating tensors that `low_cpu_mem_usage=True` left out; to be called after `fully_shard`."""
        fsdp.after_sharding(self.layers_of(self.resolve(None)), self.resolve(None))

    def update_in_backward(self, optimizer: torch.optim.Optimizer, adapter_name: str | None = None) -> InBackward:
        """Have large diffs step within the backward pass, and gradients of gates used there, with `low_memory=True`.

        Call it once before training, or before training goes on; [`DiffPruningCallback`] does. The diffs take learning
        rate and weight decay of their group of the optimizer, which must be of Adam's family and made of
        `model.parameters()`. Pruning ends it, or `remove()` of the result, whose `rate_factor` multiplies the rates.

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

    # From gating to fixmask

    def magnitude_prune(
        self,
        density: float | None = None,
        adapter_name: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> pruning.PruningSummary:
        """Go from gating to fixmask: keep the largest |delta| over all tensors together (arXiv 2012.07463, 3.1).

        Exactly round(density * base parameters) entries are kept; where gates left fewer than that open, the entries
        most likely to be open fill up the rest, starting from zero.

        Args:
            density: nonzeros as a share of the base parameters, by default the config's `target_density`.
            optimizer: re-pointed at the kept values, in place: gates and dense diffs leave its groups and its state.

        Raises:
            ValueError: the adapter is pruned already; density outside (0, 1], or so small that nothing is kept, or more
                than the adapted modules have; a diff that is not finite; an optimizer that cannot be re-pointed.
        """
        return pruning.magnitude_prune(self, self.resolve(adapter_name), density, optimizer)

    def select_positions(
        self,
        batches: Iterable[Any] | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        adapter_name: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> pruning.PruningSummary:
        """Choose the positions of an adapter whose config has selection="gradient" or "random", and go to fixmask.

        [`DiffPruningCallback`] does it when training begins. "gradient" takes a few `batches` of the training data and
        the `loss` of a batch, e.g. `lambda batch: model(**batch).loss`. Values start at zero.

        Raises:
            ValueError: another selection, or "gradient" without batches; else as in [`magnitude_prune`].
        """
        return selection.select_positions(self, self.resolve(adapter_name), batches, loss, optimizer)

    # Sizes

    def l0_penalty(self, adapter_name: str | None = None) -> Tensor:
        """The expected number of nonzeros, before lambda; a differentiable scalar (arXiv 2012.07463, equations 4, 6).

        In fixmask it is the number of nonzeros, and in gating without gates the number of adapted parameters; neither
        has a gradient.
        """
        name = self.resolve(adapter_name)
        config = self.peft_config[name]
        penalty = gate_update.expected_l0(self.layers_of(name), name, config)
        return torch.tensor(float(self._count(name))) if penalty is None else penalty

    def expected_nonzeros(self, adapter_name: str | None = None) -> float:
        """Expected number of nonzeros of the diff: sum over elements of P(element open) P(group open)."""
        name = self.resolve(adapter_name)
        if not self.is_gated(name):
            return float(self._count(name))
        stretch, known = self.peft_config[name].stretch, self.__dict__.get("_open_count")
        count = self.__dict__["_open_count"] = gate_update.count_open(self.layers_of(name), name, stretch, known)
        return count.expected

    def expected_density(self, adapter_name: str | None = None) -> float:
        """Expected nonzeros as a share of all base parameters, adapted or not."""
        return self.expected_nonzeros(adapter_name) / self.num_base_parameters()

    def density_progress(self, adapter_name: str | None = None) -> float:
        """How far gating has come, from 0 at a dense diff to 1 at `target_density`, in the logarithm of the density."""
        name = self.resolve(adapter_name)
        if not self.is_gated(name):
            return 0.0
        target = self.peft_config[name].target_density
        if target == 1.0:
            return 1.0
        return min(1.0, max(0.0, math.log(self.expected_density(name)) / math.log(target)))

    @torch.no_grad()
    def num_nonzeros(self, adapter_name: str | None = None) -> int:
        """Nonzeros of the diff; in gating, those under deterministic gates."""
        name = self.resolve(adapter_name)
        if self.phase(name) == FIXMASK:
            return self._count(name)
        pieces = [layer.delta(name, p).count_nonzero().cpu() for layer in self.layers_of(name) for p in layer.shapes]
        return int(add_up(torch.stack(pieces).sum(), processes_of(self.diff_parameters(name))))

    def adapted_parameters(self, adapter_name: str | None = None) -> dict[str, int]:
        """Number of elements of every parameter that the adapter covers, by its name in the base model."""
        layers = self.layers_of(self.resolve(adapter_name))
        return {layer.parameter_key(n): shape.numel() for layer in layers for n, shape in layer.shapes.items()}

    def diff_parameters(self, adapter_name: str | None = None) -> set[nn.Parameter]:
        """The parameters that hold the diff: w in gating, values in fixmask."""
        name = self.resolve(adapter_name)
        kinds = ("diffpruning_w", VALUES)
        return {p for layer in self.layers_of(name) for kind in kinds for p in layer.held(kind, name).values()}

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
        return sum(packed_size(round(share * n), n) + 4 * round(share * n) for n in sizes)

    def _count(self, adapter_name: str) -> int:
        """Elements of w in gating, nonzeros in fixmask."""
        layers = self.layers_of(adapter_name)
        if self.phase(adapter_name) == FIXMASK:
            return sum(sum((layer.nnz(adapter_name) or {}).values()) for layer in layers)
        return sum(shape.numel() for layer in layers for shape in layer.shapes.values())

    # The diff

    @torch.no_grad()
    def get_diff(self, adapter_name: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """The diff: (positions, values) of each parameter with nonzeros, by its name in the base model.

        Positions are flat, int64, sorted; values fp32. In gating these are the nonzeros under deterministic gates.
        """
        name = self.resolve(adapter_name)
        diff = {}
        for layer in self.layers_of(name):
            if layer.is_gating(name):
                check_whole(layer.adapter_parameters(name), "get_diff in gating")
            for parameter in layer.shapes if layer.is_gating(name) else ():
                delta = layer.delta(name, parameter).reshape(-1)
                positions = torch.nonzero(delta).squeeze(1)
                if positions.numel():
                    diff[layer.parameter_key(parameter)] = positions, delta[positions]
            for sparse in layer.sparse_diffs(name).values():
                diff[sparse.key] = sparse.positions, whole(sparse.values).float().clone()
        return diff

    def open_values(self) -> None:
        """Check and decode the diffs that adapters have from files, which the first forward pass would do.

        Call it before FSDP shards the model. Raises ValueError for diffs that were never loaded or are damaged.
        """
        for layer in self.all_layers():
            for adapter_name in self.peft_config:
                for diff in layer.sparse_diffs(adapter_name).values():
                    diff.values  # noqa: B018 - decodes at first use

    def cast_values(self, dtype: str, adapter_name: str | None = None) -> None:
        """Round a pruned diff's values, for a file of fewer bytes.

        "bfloat16" or "float16" take half of "float32", "int8" a quarter. In memory values stay fp32. Once they train on
        they are saved in fp32 again.

        Raises:
            ValueError: in gating, for another dtype, and where values would become infinite.
        """
        pruning.cast_values(self, self.resolve(adapter_name), dtype)

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
        combining.add_weighted_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            target_density=target_density,
            heads_from=heads_from,
            combination_type=combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
        )
