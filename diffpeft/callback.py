"""The three phases in the stock Trainer. Every step taken here is a public method of the model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from diffpeft.ddp import DDPFinder
from diffpeft.model import GATING, DiffPruningModel

logger = logging.getLogger(__name__)


def check_setting(args: TrainingArguments) -> None:
    """Raise ValueError for ways to run the Trainer in which the gates or the kept values would train wrongly."""
    # The launcher and the Trainer both say in the environment what Accelerate is to do.
    sharded = [name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    if sharded or args.fsdp or args.deepspeed:
        raise ValueError(
            f"{' and '.join(sharded) or 'FSDP or DeepSpeed'} shards parameters that pruning replaces; use one process, or "
            "plain DistributedDataParallel (torchrun or accelerate launch without sharding)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process run nn.DataParallel, whose replicas have no ParameterDict; launch with "
            f"torchrun --nproc_per_node {args.n_gpu}, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if args.fp16 and not args.max_grad_norm:
        raise ValueError(
            f"fp16 with max_grad_norm={args.max_grad_norm} leaves gradients scaled when the gates move; clip with "
            "max_grad_norm > 0, e.g. 1.0, or use bf16"
        )


class DiffPruningCallback(TrainerCallback, ExportableState):
    """Gating, then magnitude pruning, then fixmask, in one `trainer.train()`.

    Args:
        gating_ratio: gating's share of the run's steps, in (0, 1].
        gating_steps: gating's length in optimizer steps, instead of a share. 0 only trains an adapter that is pruned.
        fixmask_learning_rate: learning rate that fixmask starts with; from there it follows what is left of the
            schedule. None: `FIXMASK_FACTOR` times the run's `learning_rate`.

    Raises:
        ValueError: when training begins, if the model has no diff-pruning adapter, gating is longer than the run, or
            the checkpoint that training resumes from was made with another length of gating.
    """

    FIXMASK_FACTOR = 10.0
    """A sparse diff bears, and needs, a larger learning rate than the whole network; the reference has a factor of 5."""

    def __init__(
        self, gating_ratio: float = 0.5, gating_steps: int | None = None, fixmask_learning_rate: float | None = None
    ) -> None:
        if gating_steps is None and not 0 < gating_ratio <= 1:
            raise ValueError(f"gating_ratio={gating_ratio} is no share of the run; use 0 < gating_ratio <= 1")
        if gating_steps is not None and gating_steps < 0:
            raise ValueError(f"gating_steps={gating_steps} is negative; use 0 or more")
        if fixmask_learning_rate is not None and not fixmask_learning_rate > 0:
            raise ValueError(f"fixmask_learning_rate={fixmask_learning_rate} trains nothing; use a positive number")
        self.gating_ratio = gating_ratio
        self.gating_steps = gating_steps
        self.fixmask_learning_rate = fixmask_learning_rate
        self.transition_step = 0
        """The step at whose end pruning happens; known once training has begun."""
        self._ddp = DDPFinder()
        self._rates: list[Any] = []

    def state(self) -> dict[str, Any]:
        """What the checkpoint's trainer_state.json keeps of the callback."""
        arguments = {
            "gating_ratio": self.gating_ratio,
            "gating_steps": self.gating_steps,
            "fixmask_learning_rate": self.fixmask_learning_rate,
        }
        return {"args": arguments, "attributes": {"transition_step": self.transition_step}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that model, run and checkpoint fit together, before any work is done."""
        model = kwargs["model"]
        tuner = DiffPruningModel.of(model)
        if tuner is None:
            raise ValueError(
                f"DiffPruningCallback found no diff-pruning adapter on the model ({type(model).__name__}); wrap it first: "
                "model = get_peft_model(model, DiffPruningConfig())"
            )
        check_setting(args)
        steps = (
            self.gating_steps if self.gating_steps is not None else max(1, round(self.gating_ratio * state.max_steps))
        )
        if steps > state.max_steps:
            raise ValueError(
                f"gating_steps={steps} is more than the {state.max_steps} steps of the run; lower it, or raise "
                "num_train_epochs or max_steps"
            )
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        before = saved.get("attributes", {}).get("transition_step") if isinstance(saved, dict) else None
        if state.global_step and before and before != steps:
            raise ValueError(
                f"the checkpoint was made with {before} gating steps, this run has {steps}; resume with gating_steps={before}"
            )
        gating = tuner.phase() == GATING
        if gating and state.global_step >= steps:
            raise ValueError(
                f"the adapter is in gating, but the run is at step {state.global_step} and gating ends after {steps}; "
                "use gating_steps > 0, and resume from a checkpoint that holds the adapter"
            )
        if not gating and state.global_step < steps:
            raise ValueError(
                f"the adapter is pruned already, but gating lasts until step {steps}; to go on in fixmask use "
                "DiffPruningCallback(gating_steps=0)"
            )
        if not args.learning_rate > 0:
            raise ValueError(f"learning_rate={args.learning_rate} trains nothing; use a positive number")
        self.transition_step = steps
        self._ddp.watch(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the gates, once an update: after clipping, so that nothing scales the penalty.

        With the automatic penalty the update's learning rate goes over to fixmask's as the expected density falls: the
        fewer parameters carry the task, the farther each has to move. With a fixed lambda it stays as scheduled, as in
        the paper.
        """
        tuner = DiffPruningModel.of(kwargs["model"])
        if tuner is None or tuner.phase() != GATING:
            return
        tuner.gate_step(state.global_step, self.transition_step)
        if tuner.peft_config[tuner.active_adapters[0]].l0_lambda != "auto":
            return
        progress = tuner.sparsification()
        self._rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
            group["lr"] = rate * (self._fixmask_rate(args) / args.learning_rate) ** progress

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the optimizer its scheduled learning rates back."""
        for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end of gating prune, before the step's evaluation and checkpoint."""
        tuner = DiffPruningModel.of(kwargs["model"])
        if tuner is None or state.global_step != self.transition_step or tuner.phase() != GATING:
            return
        summary = tuner.magnitude_prune(optimizer=kwargs["optimizer"])
        self._restart_learning_rate(args, kwargs["optimizer"], kwargs["lr_scheduler"])
        self._ddp.rebuild()
        # A checkpoint from before may look better, but its diff is dense: training must not end by bringing it back.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, summary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching the model."""
        self._ddp.stop()

    def _fixmask_rate(self, args: TrainingArguments) -> float:
        return self.fixmask_learning_rate or self.FIXMASK_FACTOR * args.learning_rate

    def _restart_learning_rate(self, args: TrainingArguments, optimizer: Any, scheduler: Any) -> None:
        """Scale the rest of the schedule so that it starts from fixmask's own learning rate.

        The scheduler saves its base rates, so a resumed run goes on with them.
        """
        rate = self._fixmask_rate(args)
        scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
        for index, group in enumerate(optimizer.param_groups):
            current = float(group["lr"])
            if isinstance(scheduler, LambdaLR) and current > 0:
                factor = rate / current
                scheduler.base_lrs[index] *= factor
                group["initial_lr"] = scheduler.base_lrs[index]
                scheduler._last_lr[index] = rate
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else rate


class DiffPruningLogCallback(TrainerCallback):
    """Adds the adapter's state to every training log. Registered for all Trainers, ahead of the reporters; does nothing
    for a model without a diff-pruning adapter."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add `diffpruning/*` to the log entry and to its copy in `log_history`."""
        tuner = DiffPruningModel.of(kwargs.get("model"))
        logs = kwargs.get("logs")
        if tuner is None or len(tuner.active_adapters) != 1 or logs is None or "loss" not in logs:
            return
        expected = tuner.expected_nonzeros()
        entry = {
            "diffpruning/phase": tuner.phase(),
            "diffpruning/expected_density": expected / tuner.num_base_parameters(),
            "diffpruning/nnz": tuner.num_nonzeros(),
            "diffpruning/l0_penalty": expected,
        }
        logs.update(entry)
        if state.log_history:
            state.log_history[-1].update(entry)
