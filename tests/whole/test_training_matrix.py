"""Every optimizer and schedule that TrainingArguments offers: it trains through all phases, or is refused before.

What is not installed here, or trains no plain model on a CPU, is skipped with its reason. Rates never exceed what was
asked.
"""

import math

import pytest
import torch
from trainers import Rows, arguments, make_trainer, peft_model
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from diffpeft import DiffPruningCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU", "ignore:This implementation of AdamW is deprecated"
)
RATE = 1e-3
SETTINGS = {
    SchedulerType.COSINE_WITH_RESTARTS: {"num_cycles": 3},
    SchedulerType.COSINE_WITH_MIN_LR: {"min_lr_rate": 0.1},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr_rate": 0.1},
    SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": 4},
}
REFUSED = "_layerwise", "lomo"


class Rates(TrainerCallback):
    """Notes the rate of each update."""

    def __init__(self):
        self.used = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.used.append(kwargs["optimizer"].param_groups[0]["lr"])


def run(tiny_bert, path, **settings):
    """Train eight steps of gating and eight of fixmask; the trainer and the rates that were used."""
    rates = Rates()
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    callback = DiffPruningCallback(gating_steps=8)
    made = make_trainer(tiny_bert, path, callback, [rates], learning_rate=RATE / 10, **evaluation, **settings)
    made.train()
    return made, rates.used


def check(made, used):
    tuner = made.model.base_model
    assert (tuner.phase(), tuner.num_nonzeros()) == ("fixmask", round(0.02 * tuner.num_base_parameters()))
    diff = tuner.get_diff()
    assert all(bool(values.isfinite().all()) for _, values in diff.values())
    assert sum(int(values.count_nonzero()) for _, values in diff.values()) > 0
    assert len(used) == 16
    assert max(used) <= RATE * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optimizer_trains_through_all_phases_or_is_refused_before(tiny_bert, tmp_path, name):
    if any(part in name for part in REFUSED):
        with pytest.raises(ValueError, match="steps before gates do"):
            run(tiny_bert, tmp_path, optim=name)
        return
    extra = {"optim_target_modules": ["dense"]} if "galore" in name or "apollo" in name else {}
    try:  # on a model without an adapter
        settings = arguments(tmp_path, optim=name, max_steps=2, **extra)
        Trainer(tiny_bert(), settings, train_dataset=Rows()).train()
    except Exception as error:
        pytest.skip(f"{name} is not to be had here: {str(error).splitlines()[0][:100]}")
    check(*run(tiny_bert, tmp_path, optim=name, **extra))


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 4, 12], ids="warm-up {}".format)
@pytest.mark.parametrize("name", [name.value for name in SchedulerType])
def test_every_schedule_trains_within_the_rates_that_were_asked(tiny_bert, tmp_path, name, warmup):
    settings = SETTINGS.get(SchedulerType(name), {})
    made, used = run(tiny_bert, tmp_path, lr_scheduler_type=name, warmup_steps=warmup, lr_scheduler_kwargs=settings)
    check(made, used)
    assert all(math.isfinite(rate) and rate >= 0 for rate in used)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine_with_restarts"])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_bf16_trains_like_fp32(tiny_bert, tmp_path, name, schedule):
    check(*run(tiny_bert, tmp_path, optim=name, lr_scheduler_type=schedule, bf16=True))


@pytest.mark.parametrize("phase", ["gating", "fixmask"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad", "RMSprop", "Adafactor"])
def test_a_step_that_a_gradient_scaler_skips_moves_nothing(tiny_bert, batch, phase, kind):
    model = peft_model(tiny_bert).train()
    tuner = model.base_model
    if phase == "fixmask":
        tuner.magnitude_prune()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, kind)(trained, lr=1e-2)
    for scale, moves in ((3e38, False), (1.0, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = [parameter.detach().clone() for parameter in trained]
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if phase == "gating":
            assert math.isnan(tuner.gate_step(4, 8)) is not moves
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(a, b) for a, b in zip(before, trained, strict=True)]
        assert any(moved) is moves
