import json
import logging
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trainers import Rows, arguments, make_trainer, peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from diffpeft import DiffPruningCallback, last_checkpoint

WEIGHTS, STATE = "adapter_model.safetensors", "trainer_state.json"


def run_to_end(tiny_bert, path, save_steps=2, **kwargs):
    trainer = make_trainer(tiny_bert, path, save_strategy="steps", save_steps=save_steps, **kwargs)
    trainer.train()
    return trainer


def evaluated(metric):
    return {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": metric}


SETTINGS = {
    "plain": {},
    "fixed lambda": {"config": {"l0_lambda": 1e-4}},
    "ungated": {"config": {"selection": "magnitude"}},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 3, "gradient_accumulation_steps": 2},
    "bf16": {"bf16": True, "lr_scheduler_type": "constant"},
    "epochs": {"max_steps": -1, "num_train_epochs": 2},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", **evaluated("loss")},
    "another optimizer": {"optim": "sgd", "learning_rate": 0.1},
    "low memory": {"config": {"low_memory": True}, "weight_decay": 0.1},
    "low memory, accumulated": {"config": {"low_memory": True}, "gradient_accumulation_steps": 2, "bf16": True},
}


def same(whole, resumed):
    """Everything at the end of two runs."""
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    first, second = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert [g["params"] for g in first["param_groups"]] == [g["params"] for g in second["param_groups"]]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        for name, value in state.items():
            other = second["state"][key][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
    times = ("runtime", "per_second", "total_flos", "train_loss")
    logs = [
        [{k: v for k, v in e.items() if not any(t in k for t in times)} for e in trainer.state.log_history]
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def check_resuming(tiny_bert, tmp_path, **options):
    def callback():
        return DiffPruningCallback(fixmask_warmup_steps=3)

    whole = run_to_end(tiny_bert, tmp_path, save_steps=1, callback=callback(), **options)
    assert whole.model.base_model.phase() == "fixmask"
    for step in (3, 8, 9, 12):  # in gating, at the transition, just after it, in fixmask
        resumed = make_trainer(tiny_bert, tmp_path / "other", callback(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        same(whole, resumed)


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_ends_bit_for_bit_where_the_unbroken_run_does(low_memory_tiny_bert, tmp_path, setting):
    check_resuming(low_memory_tiny_bert, tmp_path, **SETTINGS[setting])


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_run_that_has_ended_trains_nothing_when_it_is_resumed(tiny_bert, tmp_path, optim):
    # transformers takes a step more where the last one is not an epoch's last.
    settings = {"max_steps": 13, "optim": optim, "weight_decay": 0.1}
    whole = run_to_end(tiny_bert, tmp_path, save_steps=13, **settings)
    resumed = make_trainer(tiny_bert, tmp_path / "other", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_adapter_of_fewer_bytes_that_trains_on_is_resumed(tiny_bert, tmp_path, dtype):
    model = run_to_end(tiny_bert, tmp_path / "first").model
    model.base_model.cast_values(dtype)
    model.save_pretrained(tmp_path / "cast")

    def trainer(**kwargs):
        model = PeftModel.from_pretrained(tiny_bert(), tmp_path / "cast", is_trainable=True)
        args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=4, **kwargs)
        return Trainer(model, args, train_dataset=Rows(), callbacks=[DiffPruningCallback(gating_steps=0)])

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for other in (resumed.model, PeftModel.from_pretrained(tiny_bert(), tmp_path / "checkpoint-8")):
        mine, theirs = whole.model.base_model.get_diff(), other.base_model.get_diff()
        assert all(torch.equal(a, b) for key in mine for a, b in zip(mine[key], theirs[key], strict=True))


@pytest.fixture
def killed(tiny_bert, tmp_path):
    """A run's checkpoints, of steps 4, 8 and 12, and what makes its Trainer again, perhaps with other arguments."""
    run_to_end(tiny_bert, tmp_path, save_steps=4)

    def again(callback=None, seed=0, **kwargs):
        return make_trainer(lambda: tiny_bert(seed=seed), tmp_path, callback, **kwargs)

    return tmp_path, again


@pytest.mark.parametrize("step", [4, 12])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"callback": DiffPruningCallback(gating_steps=10)}, "made with 8 gating steps, this run has 10"),
        (
            {"callback": DiffPruningCallback(fixmask_learning_rate=0.5)},
            r"made with fixmask_learning_rate=None, this run has 0\.5",
        ),
        ({"callback": DiffPruningCallback(fixmask_warmup_steps=2)}, "made with fixmask_warmup_steps=0, this run has 2"),
        ({"config": {"target_density": 0.03}}, r"made with target_density=0\.02, this run has 0\.03"),
        ({"config": {"l0_lambda": 1e-6}}, r"made with l0_lambda='auto', this run has 1e-06"),
        ({"config": {"low_memory": True}}, "made with low_memory=False, this run has True|does not fit the adapter"),
        ({"config": {"stretch": (-0.1, 1.1)}}, r"made with stretch=\[-1\.5, 1\.5\], this run has \[-0\.1, 1\.1\]"),
        ({"seed": 5}, r"made on another base model: \["),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(killed, step, kwargs, message):
    directory, again = killed
    with pytest.raises(ValueError, match=message):
        again(**kwargs).train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))


@pytest.mark.parametrize("step", [4, 8, 12])
@pytest.mark.parametrize("part", ["diffpruning", "classifier"])
def test_a_damaged_checkpoint_is_refused(killed, step, part):
    directory, again = killed
    file = directory / f"checkpoint-{step}" / WEIGHTS
    tensors = load_file(file)
    for tensor in (tensor for key, tensor in tensors.items() if part in key and tensor.is_floating_point()):
        tensor.view(-1)[0] += 1e-3
        break
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged"):
        again().train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))


def test_a_checkpoint_without_our_state_is_refused(killed):
    directory, again = killed
    state = json.loads((directory / "checkpoint-4" / STATE).read_text())
    del state["stateful_callbacks"]["DiffPruningCallback"]
    (directory / "checkpoint-4" / STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="of step 4 has no state of one DiffPruningCallback"):
        again().train(resume_from_checkpoint=str(directory / "checkpoint-4"))


def test_the_last_checkpoint_is_the_last_that_is_whole(killed, caplog):
    directory, again = killed
    assert last_checkpoint(directory) == str(directory / "checkpoint-16")
    shutil.rmtree(directory / "checkpoint-16")
    (directory / "checkpoint-12" / STATE).unlink()
    (directory / "checkpoint-8" / STATE).write_text((directory / "checkpoint-8" / STATE).read_text()[:100])
    (directory / "checkpoint-latest").mkdir()
    with caplog.at_level(logging.WARNING, logger="diffpeft"):
        assert last_checkpoint(directory) == str(directory / "checkpoint-4")
    assert [record.getMessage().split("/")[-1] for record in caplog.records] == [
        f"checkpoint-{step} was not written to its end; it is passed over" for step in (12, 8)
    ]
    trainer = again()
    trainer.train(resume_from_checkpoint=last_checkpoint(directory))
    assert trainer.state.global_step == 16
    shutil.rmtree(directory / "checkpoint-4")
    assert last_checkpoint(directory / "nowhere") is None


def test_early_stopping_waits_for_fixmask_and_the_best_is_within_the_budget(tiny_bert, tmp_path):
    class Worse(EarlyStoppingCallback):
        """Every evaluation is worse than the one before it."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)

    options = {**evaluated("loss"), "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(tiny_bert, tmp_path, extra=[Worse(2)], max_steps=20, save_total_limit=1, **options)
    trainer.train()
    assert trainer.state.global_step == 14, "two evaluations after the transition at 10"
    assert trainer.state.best_global_step == 10
    assert trainer.model.base_model.phase() == "fixmask"
    assert trainer.model.base_model.num_nonzeros() == round(0.02 * trainer.model.base_model.num_base_parameters())


def test_a_resumed_run_ends_with_the_same_best_checkpoint(tiny_bert, tmp_path):
    class BestAtTwelve(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(abs(state.global_step - 12)) if state.global_step >= 8 else 0.0

    options = {**evaluated("loss"), "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    whole = make_trainer(tiny_bert, tmp_path, extra=[BestAtTwelve()], **options)
    whole.train()
    assert whole.state.best_global_step == 12
    for step in (4, 10, 14):
        resumed = make_trainer(tiny_bert, tmp_path / f"from-{step}", extra=[BestAtTwelve()], **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.best_global_step == 12
        mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_new_model_for_every_trial_gets_all_phases(tiny_bert, tmp_path):
    """`hyperparameter_search` keeps the Trainer and its callbacks and makes a new model."""
    first = make_trainer(tiny_bert, tmp_path)
    models = []

    def model_init(trial=None):
        models.append(make_trainer(tiny_bert, tmp_path).model)
        return models[-1]

    trainer = Trainer(
        None, first.args, train_dataset=first.train_dataset, callbacks=[DiffPruningCallback()], model_init=model_init
    )
    for steps in (16, 8, 16):
        trainer.args.max_steps = steps
        trainer.train()
        assert trainer.state.global_step == steps
        assert models[-1].base_model.phase() == "fixmask"
    values = [[p for n, p in m.named_parameters() if "diffpruning_values" in n] for m in (models[-3], models[-1])]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True)), "nothing of a trial is left in the next"


@pytest.mark.parametrize("stopped", [False, True], ids=["whole trials", "trials stopped in gating"])
def test_a_hyperparameter_search_begins_each_trial_in_gating_and_ends_it_within_the_budget(
    tiny_bert, tmp_path, stopped
):
    optuna = pytest.importorskip("optuna")
    begun, models = [], []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            begun.append((model.base_model.phase(), args.learning_rate, model.base_model.num_base_parameters()))

    class Impatient(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return stopped and trial.number == 1 and trial.last_step == 4

    def model_init(trial=None):
        density = trial.suggest_float("target_density", 0.01, 0.03) if trial else 0.02
        models.append(peft_model(tiny_bert, target_density=density))
        return models[-1]

    trainer = Trainer(
        None,
        arguments(tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4),
        train_dataset=Rows(),
        eval_dataset=Rows(16),
        model_init=model_init,
        callbacks=[DiffPruningCallback(), Begin()],
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
            n_trials=3,
            backend="optuna",
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=Impatient(),
        )
    assert [phase for phase, _, _ in begun] == ["gating"] * 3
    assert len({rate for _, rate, _ in begun}) == 3
    assert ["stopped at step 4, in gating" in str(w.message) for w in told].count(True) == stopped
    for model, (_, _, total) in zip(models[-3:], begun, strict=True):
        assert model.base_model.phase() == "fixmask"
        density = model.peft_config["default"].target_density
        assert model.base_model.num_nonzeros() == round(density * total)
    assert set(best.hyperparameters) == {"learning_rate", "target_density"}
    saved = tmp_path / f"run-{best.run_id}" / "checkpoint-16"
    loaded = PeftModel.from_pretrained(tiny_bert(), saved).base_model
    assert loaded.num_nonzeros() == round(best.hyperparameters["target_density"] * loaded.num_base_parameters())
