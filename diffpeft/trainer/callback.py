"""The three phases in the stock Trainer, by public methods of the model."""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from diffpeft.gates.forward_pass import ForwardPass
from diffpeft.gates.update.in_backward import InBackward
from diffpeft.model import DiffPruningModel
from diffpeft.trainer import resume
from diffpeft.trainer.begin import check_gating, choose_positions
from diffpeft.trainer.ddp import DDPFinder, common_seed
from diffpeft.trainer.launch import check_launch, is_fsdp, saves_shards
from diffpeft.trainer.learning_rate import USED_RATE_ATTRIBUTE, RateSchedule, rates_of_diff
from diffpeft.trainer.optimizer import OptimizerCheck
from diffpeft.tuner.fsdp import before_sharding

logger = logging.getLogger(__name__)


class DiffPruningCallback(TrainerCallback, ExportableState):
    """Gating, then magnitude pruning, then fixmask, in one `trainer.train()`.

    A run that is resumed from the checkpoint that [`diffpeft.last_checkpoint`] names ends bit for bit where the
    unbroken one does. A run that is stopped in gating is pruned where it stops.

    Args:
        gating_ratio: gating's share of the run's steps, in (0, 1].
        gating_steps: gating's length in optimizer steps, instead of a share. 0: no gating, for an adapter that is
            pruned already.
        fixmask_learning_rate: the highest learning rate of fixmask, to which the rest of the run's schedule is scaled,
            in all parameter groups alike. With the automatic penalty the rate rises to it in gating. None:
            `FIXMASK_FACTOR` times the run's learning rate; with `gating_steps=0` the run's schedule as it is.
        fixmask_warmup_steps: steps over which fixmask's learning rate rises to that, in equal parts; below 1 a share of
            fixmask.

    Raises:
        ValueError: when training begins, if the model has no diff-pruning adapter, the Trainer has two of these
            callbacks or an optimizer of other parameters, gating is longer than the run, or the checkpoint that
            training resumes from is damaged or of another run: its config, base or gating steps.
        FloatingPointError: gradients are NaN or infinite. The model is as it was before the update, except for diffs
            that `low_memory=True` had updated by then.
    """

    FIXMASK_FACTOR = 10.0
    """A sparse diff bears, and needs, a larger learning rate than the whole network; the reference uses 5."""

    MAX_SKIPPED = 64
    """Updates in a row that fp16's gradient scaler may skip: it halves its scale each time, from 2^16."""

    def __init__(
        self,
        gating_ratio: float = 0.5,
        gating_steps: int | None = None,
        fixmask_learning_rate: float | None = None,
        fixmask_warmup_steps: float = 0,
    ) -> None:
        if gating_steps is None and not 0 < gating_ratio <= 1:
            raise ValueError(f"gating_ratio={gating_ratio} is no share of the run; use 0 < gating_ratio <= 1")
        if gating_steps is not None and gating_steps < 0:
            raise ValueError(f"gating_steps={gating_steps} is negative; use 0 or more")
        if fixmask_learning_rate is not None and not fixmask_learning_rate > 0:
            raise ValueError(f"fixmask_learning_rate={fixmask_learning_rate} trains nothing; use a positive number")
        if not 0 <= fixmask_warmup_steps < math.inf:
            raise ValueError(f"fixmask_warmup_steps={fixmask_warmup_steps} is no number of steps; use 0 or more")
        self.gating_ratio, self.gating_steps = gating_ratio, gating_steps
        self.fixmask_learning_rate, self.fixmask_warmup_steps = fixmask_learning_rate, fixmask_warmup_steps
        self.transition_step = 0  # the step at whose end pruning happens, known once training has begun
        self._skipped = 0
        self._tuner: DiffPruningModel | None = None
        self._rates: RateSchedule | None = None
        self._settings: dict[str, Any] = {}
        self._in_backward: InBackward | None = None
        self._ddp = DDPFinder()
        self._optimizer = OptimizerCheck()
        self._noise: tuple[ForwardPass, int] | None = None  # of several processes, with the seed that they share
        self._substep = 0

    def state(self) -> dict[str, Any]:
        """The callback's part of a checkpoint's trainer_state.json, asked for when the adapter is saved."""
        names = ("gating_ratio", "gating_steps", "fixmask_learning_rate", "fixmask_warmup_steps")
        arguments = {name: getattr(self, name) for name in names}
        state: dict[str, Any] = {"args": arguments, "attributes": {"transition_step": self.transition_step}}
        if self._tuner is not None and self._rates is not None:
            adapter = resume.checksum(self._tuner, self._tuner.resolve(None))
            state["saved"] = {**self._settings, "adapter": adapter, "fixmask_factor": self._rates.fixmask_factor}
        return state

    def on_init_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        """Check how the Trainer was launched, before anything is sharded."""
        tuner = DiffPruningModel.of(kwargs["model"])
        if tuner is not None:
            if tuner.phase() == "gating" and tuner.peft_config[tuner.resolve(None)].selection == "random":
                tuner.select_positions()  # while nothing is sharded, and before there is an optimizer
            check_launch(args, tuner.phase() == "gating", self.fixmask_warmup_steps, _is_low_memory(tuner))
            tuner.open_values()
            if is_fsdp():  # its checkpoints need optimizer state of all that trains, and gates have none there
                before_sharding(tuner.layers_of(tuner.resolve(None)), tuner.resolve(None))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Check that model, run and checkpoint fit together, before any work is done."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        tuner = _tuner_of(model, state, self)
        low_memory, before_training = (
            _is_low_memory(tuner),
            not tuner.peft_config[tuner.resolve(None)].chosen_in_training,
        )
        if before_training and tuner.phase() == "gating" and not state.global_step:
            self._show(args, state, choose_positions(tuner, model, args, kwargs["train_dataloader"], optimizer))
        check_launch(args, tuner.phase() == "gating", self.fixmask_warmup_steps, low_memory)
        if is_fsdp():
            tuner.after_sharding()
        steps = max(1, round(self.gating_ratio * state.max_steps)) if self.gating_steps is None else self.gating_steps
        attempted = self._tuner is not None and self._tuner.model is tuner.model
        again = attempted and tuner.phase() == "fixmask" and not state.global_step
        if before_training or again:  # an attempt of this run ended in fixmask, such as one that ran out of memory
            steps = 0
        self.transition_step, self._skipped = steps, 0
        name, factor = tuner.resolve(None), None
        if state.global_step:
            saved = resume.saved_state(state, self)
            resume.check(tuner, name, saved)
            old = saved.get("fixmask_factors") or [None]  # in earlier checkpoints, one for each group
            factor = saved.get("fixmask_factor", old[0])
        check_gating(tuner, steps, state)
        if not args.learning_rate > 0:
            raise ValueError(f"learning_rate={args.learning_rate} trains nothing; use a positive number")
        self._optimizer.watch(optimizer, tuner, name)
        if self._in_backward is not None:  # of an attempt that ended early
            self._in_backward.remove()
        self._in_backward = tuner.update_in_backward(optimizer) if low_memory else None
        own, groups = rates_of_diff(optimizer, tuner.diff_parameters(name), args.learning_rate)
        rate, warmup = self.fixmask_learning_rate or self.FIXMASK_FACTOR * own, self.fixmask_warmup_steps
        self._rates = RateSchedule(own, rate, steps, state.max_steps, warmup, groups, factor)
        chosen = before_training and self.gating_steps != 0
        asked = self.fixmask_learning_rate is not None or chosen or again
        if asked and not steps and not state.global_step:
            self._rates.begin_fixmask(optimizer, _plain(kwargs["lr_scheduler"]))
        self._tuner, self._settings = tuner, resume.settings(tuner, name)
        self._ddp.watch(model)
        own_noise = args.world_size > 1 and tuner.phase() == "gating"
        self._noise = (tuner.all_layers()[0].noise, common_seed()) if own_noise else None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Share noise between processes; set the learning rate of updates that come within the backward pass."""
        self._share_noise(state, 0)
        if self._in_backward is not None and self._tuner is not None and self._rates is not None:
            self._in_backward.rate_factor = self._rates.gating_factor(_density_progress(self._tuner))

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Share other noise in the next batch whose gradients are accumulated."""
        self._share_noise(state, self._substep + 1)

    def _share_noise(self, state: TrainerState, substep: int) -> None:
        self._substep = substep
        if self._noise is not None:
            self._noise[0].share((self._noise[1], state.global_step, substep))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Move the gates, after gradients were clipped, so that nothing scales the penalty; set the learning rate.

        With the automatic penalty the rate goes over to fixmask's as the expected density falls. With a fixed lambda it
        stays as scheduled, as in the paper.
        """
        tuner, optimizer = self._tuner, kwargs["optimizer"]
        if tuner is None or self._rates is None:
            return
        if tuner.is_gated():
            finite = not math.isnan(tuner.gate_step(state.global_step, self.transition_step))
        else:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            finite = not gradients or bool(torch.stack([grad.sum() for grad in gradients]).isfinite().all())
        self._check_finite(finite, args, state)
        progress = _density_progress(tuner) if tuner.phase() == "gating" else None
        setattr(state, USED_RATE_ATTRIBUTE, self._rates.apply(optimizer, state.global_step, progress))

    def _check_finite(self, finite: bool, args: TrainingArguments, state: TrainerState) -> None:
        self._skipped = 0 if finite else self._skipped + 1
        if not finite and (not args.fp16 or self._skipped > self.MAX_SKIPPED):
            ahead = "except for diffs that low_memory=True had updated by then, " if self._in_backward else ""
            raise FloatingPointError(
                f"the gradients of step {state.global_step + 1} are NaN or infinite"
                f"{f', for the {self._skipped}th time in a row' if args.fp16 else ''}; {ahead}the model is as it was "
                "before this update. Look at the loss and the data of this step, lower the learning rate, and resume "
                "from the last checkpoint"
            )

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """Give the optimizer its scheduled learning rates back."""
        if self._rates is not None:
            self._rates.restore(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Prune at the end of gating, before the step's evaluation and checkpoint."""
        tuner = self._tuner
        if tuner is None or self._rates is None or state.global_step > self.transition_step:
            return
        # A metric in gating says little about the pruned diff: it must not choose the best checkpoint, which would be
        # dense, nor stop training early, nor lower the learning rate.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        scheduler = _plain(kwargs["lr_scheduler"])
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler._reset()
        if state.global_step < self.transition_step or tuner.phase() == "fixmask":
            return
        summary = tuner.magnitude_prune(optimizer=kwargs["optimizer"])
        self._in_backward = None
        self._rates.begin_fixmask(kwargs["optimizer"], scheduler)
        self._ddp.rebuild()
        self._show(args, state, f"step {state.global_step}: {summary}")

    def _show(self, args: TrainingArguments, state: TrainerState, line: str) -> None:
        if state.is_world_process_zero:
            (logger.info if args.disable_tqdm else tqdm.write)(line)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Remove the dense checkpoint that `save_strategy="best"` makes of an evaluation in gating.

        To a checkpoint of shards in fixmask, add the adapter itself, of which a model is made to resume it.
        """
        kept = state.best_model_checkpoint
        if self._tuner is not None and self._tuner.phase() == "fixmask" and saves_shards():
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            whole = get_model_state_dict(kwargs["model"], options=options)
            if state.is_world_process_zero:
                folder = f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                kwargs["model"].save_pretrained(folder, state_dict=whole)
        if self._tuner is None or self._tuner.phase() != "gating" or args.save_strategy != SaveStrategy.BEST:
            return
        if kept is not None and state.is_world_process_zero:
            shutil.rmtree(kept, ignore_errors=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Prune what was stopped in gating, and let go of the model."""
        tuner, in_backward, self._tuner, self._in_backward = self._tuner, self._in_backward, None, None
        self._ddp.stop()
        if self._noise is not None:
            self._noise[0].share(None)
        if in_backward is not None:
            in_backward.remove()
        if tuner is not None and tuner.phase() == "gating":
            warnings.warn(
                f"training was stopped at step {state.global_step}, in gating, which lasts until step "
                f"{self.transition_step}: the diff is pruned as it is and has no fixmask. To go on instead, resume "
                "from the last checkpoint",
                stacklevel=2,
            )
            tuner.magnitude_prune()


def _tuner_of(model: Any, state: TrainerState, callback: object) -> DiffPruningModel:
    """The tuner that a callback trains. ValueError where there is none, or the Trainer has two such callbacks."""
    tuner = DiffPruningModel.of(model)
    if tuner is None:
        raise ValueError(
            f"DiffPruningCallback found no diff-pruning adapter on the model ({type(model).__name__}) or in it; "
            "wrap it first: model = get_peft_model(model, DiffPruningConfig())"
        )
    if isinstance(state.stateful_callbacks.get(type(callback).__name__), list):
        raise ValueError("the Trainer has two DiffPruningCallbacks, which would both move the gates; give it one")
    return tuner


def _plain(scheduler: Any) -> Any:
    """A learning rate scheduler without Accelerate's wrapper."""
    return getattr(scheduler, "scheduler", scheduler)


def _is_low_memory(tuner: DiffPruningModel) -> bool:
    """Whether the active adapter is in gating, in the low-memory mode."""
    name = tuner.resolve(None)
    return tuner.is_gated(name) and bool(tuner.peft_config[name].low_memory)


def _density_progress(tuner: DiffPruningModel) -> float:
    """The share of the density's fall that is done, for the learning rate: 0 without the automatic penalty."""
    automatic = tuner.is_gated() and tuner.peft_config[tuner.resolve(None)].l0_lambda == "auto"
    return tuner.density_progress() if automatic else 0.0
