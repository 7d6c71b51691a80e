import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from trainers import Rows, arguments, make_trainer, peft_model
from transformers import Trainer, TrainerCallback

from diffpeft import DiffPruningCallback
from diffpeft.gates.update.factored import DiffMoments
from diffpeft.gates.update.in_backward import check_low_memory
from diffpeft.trainer.launch import check_launch


def test_all_three_phases_in_one_train(tiny_bert, tmp_path, caplog):
    trainer = make_trainer(tiny_bert, tmp_path)
    with caplog.at_level(logging.INFO, logger="diffpeft"):
        trainer.train()
    tuner = trainer.model.base_model
    assert tuner.phase() == "fixmask"
    expected = round(0.02 * tuner.num_base_parameters())
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["diffpruning/phase"] for entry in entries] == ["gating"] * 7 + ["fixmask"] * 9
    densities = [entry["diffpruning/expected_density"] for entry in entries[:7]]
    assert densities[0] == densities[1] > 0.9 > densities[3] > densities[6] > 0.015
    assert entries[-1]["diffpruning/nnz"] == expected == int(tuner.l0_penalty())
    (line,) = [record.getMessage() for record in caplog.records if "magnitude pruning" in record.getMessage()]
    assert line.startswith(f"step 8: magnitude pruning kept {expected} of")
    assert "|diff| >=" in line
    assert "tensors left as pretrained" in line
    assert len(line) < 160


def test_what_was_pruned_is_written_above_the_progress_bar(tiny_bert, tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="diffpeft"):
        make_trainer(tiny_bert, tmp_path, disable_tqdm=False).train()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("step 8: magnitude pruning kept")]) == 1
    assert not [record for record in caplog.records if "magnitude pruning" in record.getMessage()]


def test_expected_density_reaches_the_target_before_pruning(tiny_bert, tmp_path):
    seen = []

    class BeforePruning(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(model.base_model.expected_density())

    for steps, rate in ((10, 1e-3), (24, 1e-4), (24, 1e-2)):
        seen.clear()
        callback = DiffPruningCallback(gating_steps=steps)
        make_trainer(tiny_bert, tmp_path, callback, [BeforePruning()], max_steps=steps + 1, learning_rate=rate).train()
        assert seen[steps - 1] == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_fixmask_starts_from_its_own_learning_rate(tiny_bert, tmp_path, scheduler):
    callback = DiffPruningCallback(fixmask_learning_rate=0.02)
    trainer = make_trainer(tiny_bert, tmp_path, callback, lr_scheduler_type=scheduler)
    trainer.train()
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    # The rate logged at a step is the one that the step used.
    assert rates[9] == pytest.approx(0.02)
    assert rates[1] < 0.002 < rates[8] <= 0.02
    if scheduler == "linear":
        assert rates[16] == pytest.approx(0.02 / 8)
    if scheduler.startswith("constant"):
        assert rates[16] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("scheduler", "l0_lambda"), [("linear", "auto"), ("constant", "auto"), ("linear", 1e-2)], ids=str
)
def test_learning_rate_goes_over_to_fixmasks_as_gates_close(tiny_bert, tmp_path, scheduler, l0_lambda):
    used, scheduled = [], []

    class Note(TrainerCallback):
        """After DiffPruningCallback: the rate of the update; at its end, what the scheduler is left with."""

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            used.append((optimizer.param_groups[0]["lr"], model.base_model.density_progress()))

        def on_step_end(self, args, state, control, lr_scheduler=None, optimizer=None, **kwargs):
            scheduled.append(lr_scheduler.get_last_lr()[0])
            assert optimizer.param_groups[0]["lr"] == scheduled[-1]

    callback = DiffPruningCallback(fixmask_learning_rate=0.02)
    config = {"l0_lambda": l0_lambda}
    settings = {"lr_scheduler_type": scheduler, "max_steps": 40}
    trainer = make_trainer(tiny_bert, tmp_path, callback, [Note()], config, **settings)
    trainer.train()
    before = [1e-3, *scheduled]
    for step, (rate, progress) in enumerate(used[:20]):
        factor = 20**progress if l0_lambda == "auto" else 1.0  # a fixed lambda is the paper's method, schedule and all
        assert rate == pytest.approx(before[step] * factor)
    if l0_lambda == "auto":
        assert used[0][1] < 0.01 < 0.95 < used[19][1] <= 1.0
    else:
        assert used[19][1] > 0.0
    assert [rate for rate, _ in used[20:]] == pytest.approx([0.02 * rate / before[20] for rate in before[20:40]])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([rate for rate, _ in used]), "what was used is logged"


LAMBDA = 1e-3


def penalty_share(trainer):
    """The gradient that reached each gate's moments in the first update, over lambda times the penalty's own.

    The diff is zero then, so the task does not pull.
    """
    gates = {name: p for name, p in trainer.model.named_parameters() if "log_alpha" in name}
    wanted = torch.autograd.grad(trainer.model.base_model.l0_penalty(), list(gates.values()))
    reached = {}

    class Note(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not state.global_step:
                reached.update({n: 10 * b for n, b in model.named_buffers() if "exp_avg." in n})

    trainer.add_callback(Note())
    trainer.train()
    shares = [reached[n.replace("log_alpha", "exp_avg")] / (LAMBDA * w) for n, w in zip(gates, wanted, strict=True)]
    return torch.cat([share.reshape(-1) for share in shares])


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
        {"max_grad_norm": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_penalty_does_not_depend_on_how_the_loss_is_scaled(tiny_bert, tmp_path, setting, task_type):
    config = {"l0_lambda": LAMBDA, "task_type": task_type}
    trainer = make_trainer(tiny_bert, tmp_path, config=config, max_steps=2, **setting)
    trainer.train_dataset = Rows(128)
    share = penalty_share(trainer)
    assert torch.allclose(share, torch.ones_like(share), atol=1e-5)


def own_loss(outputs, labels, num_items_in_batch=None):
    return 100 * torch.nn.functional.cross_entropy(outputs["logits"], labels)


def test_penalty_does_not_depend_on_a_loss_of_ones_own(tiny_bert, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, config={"l0_lambda": LAMBDA}, max_steps=2)
    trainer.compute_loss_func = own_loss
    share = penalty_share(trainer)
    assert torch.allclose(share, torch.ones_like(share), atol=1e-5)


def test_penalty_does_not_depend_on_a_gradient_scaler(tiny_bert, batch):
    """fp16 in a loop of one's own: `unscale_`, `gate_step`, `step`. The task pulls too, and its pull is unscaled."""
    reached = {}
    for l0_lambda, scale in ((0.0, None), (0.0, 2.0**16), (LAMBDA, 2.0**16)):
        model = peft_model(tiny_bert, l0_lambda=l0_lambda, init_weights=False).train()
        wanted = torch.autograd.grad(
            model.base_model.l0_penalty(), [p for n, p in model.named_parameters() if "log_alpha" in n]
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.float16, enabled=scale is not None):
            loss = model(**batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        model.base_model.gate_step(0, 10)
        scaler.step(optimizer)
        moments = dict(model.named_buffers())
        names = [n.replace("log_alpha", "exp_avg") for n, _ in model.named_parameters() if "log_alpha" in n]
        reached[l0_lambda, scale] = torch.cat([10 * moments[name].reshape(-1) for name in names])
    task, scaled = reached[0.0, None], reached[0.0, 2.0**16]
    assert 0 < (scaled - task).norm() < 0.1 * task.norm()
    share = (reached[LAMBDA, 2.0**16] - scaled) / (LAMBDA * torch.cat([w.reshape(-1) for w in wanted]))
    assert torch.allclose(share, torch.ones_like(share), atol=1e-3)


def test_the_dense_best_checkpoint_does_not_come_back(tiny_bert, tmp_path):
    class Spoil(TrainerCallback):
        """Makes every evaluation in fixmask look worse than those in gating."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] += 100.0 if state.global_step > 8 else 0.0

    trainer = make_trainer(
        tiny_bert,
        tmp_path,
        extra=[Spoil()],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.model.base_model.phase() == "fixmask"
    assert int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1]) >= 8


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: DiffPruningCallback(gating_steps=17), "gating_steps=17 is more than the 16 steps"),
        (lambda: DiffPruningCallback(gating_steps=0), "gating ends after 0"),
        (lambda: DiffPruningCallback(gating_ratio=0.0), "gating_ratio=0.0 is no share"),
        (lambda: DiffPruningCallback(gating_ratio=1.1), "gating_ratio=1.1 is no share"),
        (lambda: DiffPruningCallback(gating_steps=-1), "gating_steps=-1 is negative"),
        (lambda: DiffPruningCallback(fixmask_learning_rate=0.0), "trains nothing"),
        (lambda: DiffPruningCallback(fixmask_warmup_steps=-1), "fixmask_warmup_steps=-1 is no number of steps"),
    ],
)
def test_wrong_settings_are_told_before_any_work(tiny_bert, tmp_path, callback, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_bert, tmp_path, callback()).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_n_gpu": 2}, "DataParallel cannot run diffs; .* --nproc_per_node 2"),
        ({"fp16": True, "max_grad_norm": 0.0}, r"fp16 with max_grad_norm=0.0 leaves gradients scaled"),
    ],
)
def test_settings_that_would_train_wrongly_are_refused(tiny_bert, tmp_path, change, message):
    trainer = make_trainer(tiny_bert, tmp_path)
    for name, value in change.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        check_launch(trainer.args, gating=True, warmup=0)


def test_a_learning_rate_of_zero_is_refused(tiny_bert, tmp_path):
    with pytest.raises(ValueError, match=r"learning_rate=0.0 trains nothing"):
        make_trainer(tiny_bert, tmp_path, learning_rate=0.0).train()


def test_a_model_without_the_adapter_is_refused(tiny_bert, tmp_path):
    trainer = Trainer(
        model=tiny_bert(), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[DiffPruningCallback()]
    )
    with pytest.raises(ValueError, match=r"no diff-pruning adapter on the model .* wrap it first"):
        trainer.train()


def test_a_pruned_adapter_goes_on_in_fixmask_only_when_told(tiny_bert, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, max_steps=4)
    trainer.model.base_model.magnitude_prune()
    with pytest.raises(ValueError, match=r"pruned already.*gating_steps=0"):
        trainer.train()
    fixmask = Trainer(
        model=trainer.model,
        args=arguments(tmp_path, max_steps=4),
        train_dataset=Rows(),
        callbacks=[DiffPruningCallback(gating_steps=0)],
    )
    fixmask.train()
    assert all(math.isfinite(e["loss"]) for e in fixmask.state.log_history if "loss" in e)


def test_gating_to_the_last_step_still_prunes(tiny_bert, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, DiffPruningCallback(gating_ratio=1.0), max_steps=4)
    trainer.train()
    assert trainer.model.base_model.phase() == "fixmask"


@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (0.5, 4), (0, 0)])
def test_fixmask_warms_up(tiny_bert, tmp_path, warmup, steps):
    callback = DiffPruningCallback(fixmask_learning_rate=0.02, fixmask_warmup_steps=warmup)
    trainer = make_trainer(tiny_bert, tmp_path, callback, lr_scheduler_type="constant")
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e][8:]
    assert rates == pytest.approx([0.02 * min(1.0, (i + 1) / max(1, steps)) for i in range(8)])


def test_a_plateau_in_gating_is_none(tiny_bert, tmp_path):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    options = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 1, "factor": 0.5}}
    callback = DiffPruningCallback(fixmask_learning_rate=0.02)
    trainer = make_trainer(
        tiny_bert, tmp_path, callback, [Worse()], lr_scheduler_type="reduce_lr_on_plateau", **options
    )
    trainer.train()
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    assert rates[1] == pytest.approx(1e-3, rel=0.02)
    assert rates[9] == pytest.approx(0.02), "it has not fallen in gating"
    assert rates[16] < 0.02 / 4, "it falls in fixmask"


@pytest.mark.parametrize("step", [3, 12])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_that_are_not_finite_end_training_before_they_do_harm(tiny_bert, tmp_path, step, gated):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == step - 1:
                self.before = {n: t.clone() for n, t in model.state_dict().items()}
                model.base_model.model.bert.pooler.register_forward_hook(lambda m, i, o: o * torch.nan)

    spoil = Spoil()
    trainer = make_trainer(tiny_bert, tmp_path, extra=[spoil], config={"selection": "gates" if gated else "magnitude"})
    with pytest.raises(
        FloatingPointError, match=f"the gradients of step {step} are NaN or infinite; the model is as it"
    ):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(spoil.before[name].nan_to_num(), after[name].nan_to_num()) for name in after)
    assert not any(t.isnan().any() for t in after.values() if t.is_floating_point())


def test_the_gradient_scaler_may_skip_updates_but_not_for_ever():
    callback, args, state = DiffPruningCallback(), SimpleNamespace(fp16=True), SimpleNamespace(global_step=7)
    for _ in range(callback.MAX_SKIPPED):
        callback._check_finite(False, args, state)
    callback._check_finite(True, args, state)
    for _ in range(callback.MAX_SKIPPED):
        callback._check_finite(False, args, state)
    with pytest.raises(FloatingPointError, match="for the 65th time in a row"):
        callback._check_finite(False, args, state)


def test_a_run_that_is_stopped_in_gating_ends_within_the_budget(tiny_bert, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tiny_bert, tmp_path, extra=[Stop()])
    with pytest.warns(UserWarning, match="stopped at step 3, in gating, which lasts until step 8"):
        trainer.train()
    tuner = trainer.model.base_model
    assert tuner.phase() == "fixmask"
    assert tuner.num_nonzeros() == round(0.02 * tuner.num_base_parameters())


# Low memory


def test_the_low_memory_mode_reaches_the_density_and_makes_no_state_for_large_diffs(low_memory_tiny_bert, tmp_path):
    seen, states = [], []

    class BeforePruning(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen.append(model.base_model.expected_density())
            gating = {
                id(p): name for name, p in model.named_parameters() if "diffpruning_w." in name or "alpha" in name
            }
            states.append({gating[id(p)] for p in optimizer.state if id(p) in gating})

    for steps in (10, 24):
        seen.clear()
        callback = DiffPruningCallback(gating_steps=steps)
        settings = {"max_steps": steps + 4, "config": {"low_memory": True}}
        trainer = make_trainer(low_memory_tiny_bert, tmp_path, callback, [BeforePruning()], **settings)
        trainer.train()
        assert seen[steps - 1] == pytest.approx(0.02, rel=0.1)
        assert trainer.model.base_model.phase() == "fixmask"
        assert trainer.model.base_model.num_nonzeros() == round(0.02 * trainer.model.base_model.num_base_parameters())
    assert states[0]
    assert not any("alpha" in name or "query.diffpruning_w.default.weight" in name for name in states[0])


def test_the_low_memory_mode_updates_at_the_rate_of_the_optimizer_as_the_step_begins(
    low_memory_tiny_bert, tmp_path, monkeypatch
):
    used, wanted = [], []
    step = DiffMoments.step

    def note(self, w, grad, rate, decay):
        used.append((rate, decay))
        return step(self, w, grad, rate, decay)

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            progress = model.base_model.density_progress()
            wanted.append(optimizer.param_groups[0]["lr"] * 20**progress)

    monkeypatch.setattr(DiffMoments, "step", note)
    callback = DiffPruningCallback(gating_steps=12, fixmask_learning_rate=0.02)
    settings = {"max_steps": 13, "weight_decay": 0.01, "gradient_accumulation_steps": 2, "config": {"low_memory": True}}
    trainer = make_trainer(low_memory_tiny_bert, tmp_path, callback, [Note()], **settings)
    trainer.train()
    each = len(used) // 12
    assert each == 15
    for index in range(12):
        rates = [rate for rate, _ in used[index * each : (index + 1) * each]]
        assert rates == pytest.approx([wanted[index]] * each)
    assert {decay for _, decay in used} == {0.01}
    assert wanted[11] > 3 * wanted[0] / 12


def test_the_low_memory_mode_says_what_a_gradient_that_is_not_finite_has_left(low_memory_tiny_bert, tmp_path):
    trainer = make_trainer(low_memory_tiny_bert, tmp_path, config={"low_memory": True})
    w = next(p for name, p in trainer.model.named_parameters() if "query.diffpruning_w.default.weight" in name)
    w.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(
        FloatingPointError, match="step 1 are NaN or infinite; except for diffs that low_memory=True had"
    ):
        trainer.train()
    assert not w.any()


def test_a_run_of_the_low_memory_mode_that_is_stopped_is_pruned(low_memory_tiny_bert, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer(low_memory_tiny_bert, tmp_path, extra=[Stop()], config={"low_memory": True})
    with pytest.warns(UserWarning, match="stopped at step 1, in gating"):
        trainer.train()
    assert trainer.model.base_model.phase() == "fixmask"


def test_what_the_low_memory_mode_cannot_train_with_is_refused(low_memory_tiny_bert, tmp_path, monkeypatch):
    config = {"low_memory": True}
    with pytest.raises(ValueError, match=r"not Adam's in SGD; use an optimizer with betas, e.g. optim='adamw_torch'"):
        make_trainer(low_memory_tiny_bert, tmp_path, config=config, optim="sgd").train()
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"_mixed_precision": "fp16"})
    with pytest.raises(ValueError, match=r"before fp16's scaler could unscale them; use bf16, or low_memory=False"):
        check_low_memory()
