import logging
import math

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.callback import check_setting


class Rows(Dataset):
    """Sequences labelled by their first token, which a small model learns in a few steps."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(100, (count, 6), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": int(self.ids[index, 0] >= 50)}


def arguments(path, **kwargs):
    defaults = {
        "max_steps": 16,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(path), **{**defaults, **kwargs})


def peft_model(tiny_bert, **config):
    torch.manual_seed(3)
    defaults = {"task_type": "SEQ_CLS", "target_density": 0.02}
    return get_peft_model(tiny_bert(), DiffPruningConfig(**{**defaults, **config}))


def make_trainer(tiny_bert, path, callback=None, extra=(), config=None, **kwargs):
    callbacks = [callback or DiffPruningCallback(), *extra]
    return Trainer(
        model=peft_model(tiny_bert, **(config or {})),
        args=arguments(path, **kwargs),
        train_dataset=Rows(),
        eval_dataset=Rows(16),
        callbacks=callbacks,
    )


def test_all_three_phases_in_one_train(tiny_bert, tmp_path, caplog):
    trainer = make_trainer(tiny_bert, tmp_path)
    with caplog.at_level(logging.INFO, logger="diffpeft"):
        trainer.train()
    tuner = trainer.model.base_model
    assert tuner.phase() == "fixmask"
    expected = round(0.02 * tuner.num_base_parameters())
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["diffpruning/phase"] for entry in entries] == ["gating"] * 7 + ["fixmask"] * 9
    densities = [entry["diffpruning/expected_density"] for entry in entries]
    assert densities[0] == densities[1] > 0.9 > densities[3] > densities[6] > 0.015
    assert entries[-1]["diffpruning/nnz"] == expected == int(tuner.l0_penalty())
    assert entries[0]["diffpruning/l0_penalty"] > expected
    lines = [record.getMessage() for record in caplog.records if "magnitude pruning kept" in record.getMessage()]
    assert len(lines) == 1
    assert f"step 8: magnitude pruning kept {expected} of" in lines[0]
    assert "|diff| >=" in lines[0]
    assert "groups left as pretrained" in lines[0]


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


def test_reporters_get_the_adapters_state(tiny_bert, tmp_path):
    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            written.setdefault(name, []).append((step, value))

        def add_text(self, *args, **kwargs):
            pass

        add_hparams = flush = close = add_text

    class Reporter(TensorBoardCallback):
        def __init__(self):
            super().__init__(tb_writer=Writer())

    trainer = make_trainer(tiny_bert, tmp_path, max_steps=4)
    # Where `report_to` puts a reporter: after the default callbacks, before the user's.
    callbacks = trainer.callback_handler.callbacks
    position = next(i for i, c in enumerate(callbacks) if isinstance(c, DiffPruningCallback))
    callbacks.insert(position, Reporter())
    trainer.train()
    steps = [step for step, _ in written["train/diffpruning/expected_density"]]
    assert steps == [1, 2, 3, 4]


def test_logs_of_other_models_are_left_alone(tiny_bert, tmp_path):
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path, max_steps=2), train_dataset=Rows())
    trainer.train()
    assert not any("diffpruning" in key for entry in trainer.state.log_history for key in entry)


def run_to_end(tiny_bert, path, **kwargs):
    trainer = make_trainer(tiny_bert, path, save_strategy="steps", save_steps=2, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [4, 8, 12])
@pytest.mark.parametrize("l0_lambda", ["auto", 1e-4])
def test_resume_ends_bit_for_bit_where_the_unbroken_run_does(tiny_bert, tmp_path, step, l0_lambda):
    whole = run_to_end(tiny_bert, tmp_path, config={"l0_lambda": l0_lambda})
    resumed = make_trainer(tiny_bert, tmp_path, config={"l0_lambda": l0_lambda})
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.model.base_model.phase() == "fixmask"
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    first, second = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert [len(g["params"]) for g in first["param_groups"]] == [len(g["params"]) for g in second["param_groups"]]
    for key, state in first["state"].items():
        assert all(torch.equal(state[name], second["state"][key][name]) for name in state)
    assert [e.get("loss") for e in whole.state.log_history] == [e.get("loss") for e in resumed.state.log_history]
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (whole, resumed)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_fixmask_starts_from_its_own_learning_rate(tiny_bert, tmp_path, scheduler):
    callback = DiffPruningCallback(fixmask_learning_rate=0.02)
    trainer = make_trainer(tiny_bert, tmp_path, callback, lr_scheduler_type=scheduler)
    trainer.train()
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    # The rate logged at a step is the one that the step used.
    assert rates[9] == pytest.approx(0.02)
    assert rates[8] <= 1e-3
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
            used.append((optimizer.param_groups[0]["lr"], model.base_model.sparsification()))

        def on_step_end(self, args, state, control, lr_scheduler=None, optimizer=None, **kwargs):
            scheduled.append(lr_scheduler.get_last_lr()[0])
            assert optimizer.param_groups[0]["lr"] == scheduled[-1]

    callback = DiffPruningCallback(fixmask_learning_rate=0.02)
    config = {"l0_lambda": l0_lambda}
    trainer = make_trainer(tiny_bert, tmp_path, callback, [Note()], config, lr_scheduler_type=scheduler)
    trainer.train()
    before = [1e-3, *scheduled]
    for step, (rate, progress) in enumerate(used[:8]):
        factor = 20**progress if l0_lambda == "auto" else 1.0  # a fixed lambda is the paper's method, schedule and all
        assert rate == pytest.approx(before[step] * factor)
    if l0_lambda == "auto":
        assert used[0][1] < 0.01 < 0.85 < used[7][1] <= 1.0
    else:
        assert used[7][1] > 0.0
    assert [rate for rate, _ in used[8:]] == pytest.approx(before[8:16])


@pytest.mark.parametrize("setting", [{}, {"gradient_accumulation_steps": 4}, {"label_smoothing_factor": 0.1}])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_penalty_does_not_depend_on_how_the_loss_is_scaled(tiny_bert, tmp_path, setting, task_type):
    """With a lambda that outweighs the task, every gate moves by the same known amount in every setting."""
    config = {"l0_lambda": 1e6, "task_type": task_type}
    trainer = make_trainer(tiny_bert, tmp_path, config=config, max_steps=3, **setting)
    trainer.train_dataset = Rows(128)
    steps = []

    class Note(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            gates = [p for n, p in model.named_parameters() if "log_alpha" in n]
            if gates:
                steps.append(torch.cat([p.detach().reshape(-1) for p in gates]))

    trainer.add_callback(Note())
    trainer.train()
    assert torch.allclose(steps[0], torch.full_like(steps[0], 4.9), atol=1e-3)


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
    ],
)
def test_wrong_settings_are_told_before_any_work(tiny_bert, tmp_path, callback, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_bert, tmp_path, callback()).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_n_gpu": 2}, "2 GPUs in one process run nn.DataParallel"),
        ({"fp16": True, "max_grad_norm": 0.0}, r"fp16 with max_grad_norm=0.0 leaves gradients scaled"),
    ],
)
def test_settings_that_would_train_wrongly_are_refused(tiny_bert, tmp_path, change, message):
    trainer = make_trainer(tiny_bert, tmp_path)
    for name, value in change.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        check_setting(trainer.args)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_is_refused(tiny_bert, tmp_path, monkeypatch, kind):
    trainer = make_trainer(tiny_bert, tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=f"{kind} shards parameters that pruning replaces"):
        trainer.train()


def test_a_learning_rate_of_nought_is_refused(tiny_bert, tmp_path):
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


def test_resuming_with_another_length_of_gating_is_refused(tiny_bert, tmp_path):
    run_to_end(tiny_bert, tmp_path)
    other = make_trainer(tiny_bert, tmp_path, DiffPruningCallback(gating_steps=10))
    with pytest.raises(ValueError, match="made with 8 gating steps, this run has 10"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_gating_to_the_last_step_still_prunes(tiny_bert, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, DiffPruningCallback(gating_ratio=1.0), max_steps=4)
    trainer.train()
    assert trainer.model.base_model.phase() == "fixmask"
