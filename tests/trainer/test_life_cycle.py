"""A Trainer's life around the three phases: runs that begin again, retries, optimizers that stay, callbacks amiss.

Each also tried with LoRA, which trains on in all of these. Right before: early stopping; a search with a new model for
every trial; load_best_model_at_end in fixmask; a second train() that resumes a fixmask checkpoint on the same Trainer.
"""

import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from trainers import Rows, arguments, make_trainer, peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningModel


def trainer(tiny_bert, path, steps=8, extra=(), **kwargs):
    return make_trainer(tiny_bert, path, DiffPruningCallback(gating_steps=steps), extra, **kwargs)


class Raises(TrainerCallback):
    """Raises an error at one step, once."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize(
    ("step", "by"),
    [(3, "peft"), (8, "peft"), (12, "peft"), (12, "transformers")],
    ids=["gating", "transition", "fixmask", "fixmask in a model without PEFT's class"],
)
def test_a_retry_with_a_smaller_batch_ends_pruned_in_every_phase(tiny_bert, tmp_path, step, by):
    """Before, a retry after an out-of-memory error in fixmask failed, and the run was lost."""
    model = peft_model(tiny_bert)
    if by == "transformers":
        model = tiny_bert()
        model.add_adapter(DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    callbacks = [DiffPruningCallback(gating_steps=8), Raises(step, RuntimeError("CUDA out of memory."))]
    settings = arguments(tmp_path, auto_find_batch_size=True)
    made = Trainer(model, settings, train_dataset=Rows(), callbacks=callbacks)
    made.train()
    assert made.state.global_step == 16
    tuner = DiffPruningModel.of(model)
    assert (tuner.phase(), tuner.num_nonzeros()) == ("fixmask", round(0.02 * tuner.num_base_parameters()))
    used = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
    assert 5e-3 < max(used) <= 1e-2 * (1 + 1e-6)


@pytest.mark.parametrize("step", [4, 12], ids=["gating", "fixmask"])
def test_after_an_interrupt_the_same_trainer_resumes_or_says_why_not(tiny_bert, tmp_path, step):
    """Before, a gating checkpoint on a Trainer that had pruned was an obscure error of torch."""
    made = trainer(tiny_bert, tmp_path, extra=[Raises(14, KeyboardInterrupt())], save_strategy="steps", save_steps=4)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    if step == 4:
        with pytest.raises(ValueError, match=r"the optimizer does not hold .* make a new Trainer for this run"):
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        made = trainer(tiny_bert, tmp_path)
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert (made.state.global_step, made.model.base_model.phase()) == (16, "fixmask")


def test_a_second_adapter_needs_a_new_trainer_and_says_so_at_once(tiny_bert, tmp_path):
    """Before, the error came at the end of gating."""
    made = trainer(tiny_bert, tmp_path)
    made.train()
    made.model.add_adapter("second", DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    made.model.set_adapter("second")
    with pytest.raises(ValueError, match=r"of adapter 'second', .* make a new Trainer"):
        made.train()
    again = Trainer(made.model, arguments(tmp_path), train_dataset=Rows(), callbacks=[DiffPruningCallback()])
    again.train()
    assert made.model.base_model.phase("second") == "fixmask"


@pytest.mark.parametrize("asked", [1e-3, None])
def test_groups_with_rates_of_their_own_keep_their_ratio(tiny_bert, tmp_path, asked):
    """Before, all groups had the same rate from the transition on. Without a rate it is ten times the diff's own."""
    model = peft_model(tiny_bert)
    heads = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]
    optimizer = torch.optim.AdamW([{"params": heads, "lr": 1e-2}, {"params": others, "lr": 1e-4}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    used = []

    class Notes(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            used.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    callbacks = [DiffPruningCallback(gating_steps=8, fixmask_learning_rate=asked), Notes()]
    settings = arguments(tmp_path, learning_rate=1e-5)
    pair = (optimizer, schedule)
    Trainer(model, settings, train_dataset=Rows(), callbacks=callbacks, optimizers=pair).train()
    assert used[0] == pytest.approx([1e-2, 1e-4], rel=0.02)
    assert used[8] == used[-1] == pytest.approx([1e-1, 1e-3])


def test_a_given_rate_holds_for_a_run_of_fixmask_alone(tiny_bert, tmp_path):
    """Before, it was ignored without a word."""
    for rate, highest in ((None, 1e-3), (3e-3, 3e-3)):
        model = peft_model(tiny_bert, init_weights=False)
        model.base_model.magnitude_prune()
        callback = DiffPruningCallback(gating_steps=0, fixmask_learning_rate=rate)
        made = Trainer(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
        made.train()
        used = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
        assert max(used) == pytest.approx(highest)


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_step_within_backward_are_refused_at_once(tiny_bert, tmp_path, name):
    """Before, gates got no gradient of the task, and learning rates had no effect."""
    with pytest.raises(ValueError, match=f"optim='{name}' steps before gates do"):
        trainer(tiny_bert, tmp_path, optim=name)


def test_two_callbacks_are_refused(tiny_bert, tmp_path):
    """Before, learning rates were multiplied by 100."""
    made = trainer(tiny_bert, tmp_path, extra=[DiffPruningCallback()])
    with pytest.raises(ValueError, match="two DiffPruningCallbacks"):
        made.train()


def test_a_run_without_the_callback_is_told_when_it_is_saved(tiny_bert, tmp_path):
    made = Trainer(peft_model(tiny_bert), arguments(tmp_path), train_dataset=Rows())
    made.save_model(tmp_path / "untrained")
    made.train()
    with pytest.warns(UserWarning, match="saved in gating, dense, without a step of its gates; add DiffPruningCall"):
        made.save_model()
    made = trainer(tiny_bert, tmp_path, save_strategy="steps", save_steps=4)
    made.train()  # a checkpoint in gating is no mistake


def test_a_loop_that_never_steps_the_gates_is_told_once(tiny_bert, batch, monkeypatch):
    monkeypatch.setattr("diffpeft.gates.forward_pass.MAX_IDLE_PASSES", 3)
    model = peft_model(tiny_bert).train()
    for _ in range(2):
        model(**batch())
    with pytest.warns(UserWarning, match="3 training passes have sampled gates without a gate_step"):
        model(**batch())
    model(**batch())
    model = peft_model(tiny_bert).train()
    model(**batch()).loss.backward()
    model.base_model.gate_step(0, 8)
    with torch.no_grad():
        model(**batch())
    for _ in range(4):
        model(**batch())


def test_gating_that_is_too_short_for_its_schedule_is_told(tiny_bert, tmp_path):
    made = trainer(tiny_bert, tmp_path, steps=4)
    with pytest.warns(UserWarning, match="gating lasts 4 steps, in which gates cannot come near target_density"):
        made.train()
    fixed = trainer(tiny_bert, tmp_path, steps=4, config={"l0_lambda": 1e-7})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed.train()


def test_the_best_checkpoint_is_a_pruned_one(tiny_bert, tmp_path):
    """Before, save_strategy="best" kept a dense checkpoint at each evaluation in gating."""
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    made = trainer(tiny_bert, tmp_path, extra=[EarlyStoppingCallback(3)], **best)
    made.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept
    assert all(int(name.rpartition("-")[2]) >= 8 for name in kept)
    for name in kept:
        assert PeftModel.from_pretrained(tiny_bert(), tmp_path / name).base_model.phase() == "fixmask"
    assert isinstance(made.model, nn.Module)


@pytest.mark.parametrize("selection", ["gradient", "random"])
def test_positions_chosen_before_training_are_chosen_in_the_stock_trainer(tiny_bert, tmp_path, selection):
    made = trainer(tiny_bert, tmp_path, config={"selection": selection}, save_strategy="steps", save_steps=8)
    made.train()
    tuner = made.model.base_model
    assert (tuner.phase(), tuner.num_nonzeros()) == ("fixmask", round(0.02 * tuner.num_base_parameters()))
    used = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
    assert max(used) == used[0] == pytest.approx(1e-2)
    assert all(entry["diffpruning/phase"] == "fixmask" for entry in made.state.log_history if "loss" in entry)
    again = trainer(tiny_bert, tmp_path, config={"selection": selection})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    first, second = (one.model.base_model.get_diff() for one in (made, again))
    assert all(torch.equal(first[name][1], second[name][1]) for name in first)


def test_gradients_of_a_loss_of_ones_own_are_asked_for_before_the_trainer(tiny_bert, tmp_path):
    model = peft_model(tiny_bert, selection="gradient")
    rows = [{"input_ids": torch.arange(6)} for _ in range(16)]
    made = Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=[DiffPruningCallback()])
    with pytest.raises(ValueError, match="no loss of its own to take gradients of; before the Trainer is made, call"):
        made.train()


def test_choosing_by_gradients_leaves_no_gradient_for_the_first_step(tiny_bert, tmp_path):
    """Parameters outside of the adapted model, such as a head around it, train in the same optimizer."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = peft_model(tiny_bert, selection="gradient"), nn.Parameter(torch.ones(()))

        def forward(self, input_ids, labels):
            return {"loss": self.scale * self.inner(input_ids, labels=labels).loss}

    seen = []

    class Notes(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(model.scale.grad)

    model = Around()
    callbacks = [DiffPruningCallback(), Notes()]
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=Rows(), callbacks=callbacks).train()
    assert seen == [None]
