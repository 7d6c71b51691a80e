"""TRL's trainers: fine-tuning and preference learning of a causal language model."""

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningModel

trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")

# trl 1.16 uses names that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*is deprecated:FutureWarning")

LLAMA = ARCHITECTURES["llama"]


@pytest.fixture(scope="module")
def tokenizer():
    """Words w4 to w59, one token each."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(4, 60))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def texts():
    """Each word follows from the one before it."""
    starts = torch.randint(50, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_list(
        [{"text": " ".join(f"w{4 + (s + 3 * i) % 50}" for i in range(8))} for s in starts]
    )


def preferences():
    rows = [{"prompt": f"w{i + 4} w5", "chosen": " w6 w7", "rejected": " w8 w9"} for i in range(32)]
    return datasets.Dataset.from_list(rows)


def arguments(kind, path, **kwargs):
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    return kind(output_dir=str(path), **{**defaults, **kwargs})


def config(**kwargs):
    return DiffPruningConfig(**{"task_type": "CAUSAL_LM", "target_density": 0.1, **kwargs})


def sft(path, tokenizer, model=None, peft_config=None, **kwargs):
    return trl.SFTTrainer(
        model=LLAMA.make() if model is None else model,
        args=arguments(trl.SFTConfig, path, **kwargs),
        train_dataset=texts(),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[DiffPruningCallback()],
    )


def dpo(path, tokenizer, model, peft_config=None, callback=None, **kwargs):
    return trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, path, **kwargs),
        train_dataset=preferences(),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[callback or DiffPruningCallback()],
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def logits(model):
    with torch.no_grad():
        return model.eval()(**LLAMA.inputs(3))[0].float()


@pytest.mark.parametrize("setting", [{}, {"gradient_checkpointing": False, "bf16": True}], ids=["default", "bf16"])
def test_sft_goes_through_all_phases_and_learns(tmp_path, tokenizer, setting):
    trainer = sft(tmp_path, tokenizer, peft_config=config(exclude_modules=["lm_head"]), **setting)
    assert trainer.args.gradient_checkpointing == setting.get("gradient_checkpointing", True)
    ours = {n: p for n, p in trainer.model.named_parameters() if "diffpruning_" in n}
    assert {(p.dtype, p.requires_grad) for p in ours.values()} == {(torch.float32, True)}
    training = []
    trainer.model.register_forward_pre_hook(lambda module, args: training.append(module.training))
    trainer.train()
    assert all(training)
    assert logged(trainer, "diffpruning/phase") == ["gating"] * 5 + ["fixmask"] * 7
    assert sum(logged(trainer, "loss")[-3:]) / 3 < logged(trainer, "loss")[0] - 0.2
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    tuner = DiffPruningModel.of(trainer.model)
    assert tuner.num_nonzeros() == round(0.1 * tuner.num_base_parameters())
    assert {p.dtype for n, p in trainer.model.named_parameters() if "diffpruning_" in n} == {torch.float32}
    assert list(trainer.model.peft_config) == ["default"]
    trainer.save_model(tmp_path / "saved")
    loaded = logits(PeftModel.from_pretrained(LLAMA.make(), tmp_path / "saved"))
    assert torch.allclose(loaded, logits(trainer.model), atol=0.1 if "bf16" in setting else 0.0)
    assert not torch.allclose(loaded, logits(LLAMA.make()), atol=0.1)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_sft_takes_the_default_config(tmp_path, tokenizer, name):
    sft(tmp_path, tokenizer, ARCHITECTURES[name].make(), config())


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_sft_of_a_model_with_an_added_adapter_trains_the_output_layer_too(tmp_path, tokenizer, name):
    """TRL reads the output layer's weight without running the layer; it gets the one that the adapter makes."""
    model = ARCHITECTURES[name].make()
    model.add_adapter(config())
    trainer = sft(tmp_path, tokenizer, model, max_steps=4)
    owner = "lm_head.weight" if name == "llama" else "model.embed_tokens.weight"
    tuner = DiffPruningModel.of(model)
    assert owner in tuner.adapted_parameters()
    gates = next(p for n, p in model.named_parameters() if f"{owner[:-7]}.diffpruning_log_alpha" in n)
    before = gates.detach().clone()
    trainer.train()
    assert not torch.equal(gates, before)
    assert tuner.phase() == "fixmask"
    trainer.save_model(tmp_path / "saved")
    fresh = ARCHITECTURES[name].make()
    fresh.load_adapter(str(tmp_path / "saved"))
    assert torch.equal(logits(fresh), logits(model))


def test_dpo_goes_through_all_phases_with_the_base_as_reference(tmp_path, tokenizer):
    trainer = dpo(tmp_path, tokenizer, LLAMA.make(), config(exclude_modules=["lm_head"]))
    trainer.train()
    # Policy and reference are the same model at first, and their log-ratio is zero.
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    assert logged(trainer, "loss")[-1] < 0.6
    assert logged(trainer, "diffpruning/phase") == ["gating"] * 5 + ["fixmask"] * 7
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(LLAMA.make()))


def test_dpo_of_a_model_with_an_adapter_has_its_copy_as_reference(tmp_path, tokenizer):
    model = get_peft_model(LLAMA.make(), config(exclude_modules=["lm_head"]))
    for parameter in (p for n, p in model.named_parameters() if "diffpruning_w" in n):
        nn.init.normal_(parameter, std=0.1)
    expected = logits(model)
    trainer = dpo(tmp_path, tokenizer, model, None, DiffPruningCallback(gating_steps=2), max_steps=4)
    trainer.train()
    assert DiffPruningModel.of(model).phase("default") == "fixmask"
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:gating lasts")
def test_dpo_of_a_model_with_a_finished_adapter_has_its_copy_as_reference(tmp_path, tokenizer):
    """TRL copies parameters to its reference adapter, and positions are buffers; the first pass finds them."""
    model = get_peft_model(LLAMA.make(), config(init_weights=False, exclude_modules=["lm_head"]))
    model.base_model.magnitude_prune()
    expected = logits(model)
    trainer = dpo(tmp_path, tokenizer, model, None, DiffPruningCallback(gating_steps=0), max_steps=4)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    assert not torch.equal(logits(model), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def kto_rows():
    return datasets.Dataset.from_list(
        [{"prompt": f"w{i + 4} w5", "completion": f" w{6 + i % 2}", "label": i % 2 == 0} for i in range(32)]
    )


def prompts():
    return datasets.Dataset.from_list([{"prompt": f"w{i + 4} w5"} for i in range(32)])


def reward(completions, **kwargs):
    return [float(len(set(text.split()))) for text in completions]


def trainer_of(kind, path, tokenizer, model):
    """A trainer of TRL with twelve steps, six of gating."""
    names = {
        "KTO": (trl.KTOTrainer, trl.KTOConfig, kto_rows, {}),
        "GRPO": (
            trl.GRPOTrainer,
            trl.GRPOConfig,
            prompts,
            {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "per_device_train_batch_size": 4},
        ),
        "RLOO": (
            trl.RLOOTrainer,
            trl.RLOOConfig,
            prompts,
            {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 4},
        ),
        "Reward": (trl.RewardTrainer, trl.RewardConfig, preferences, {}),
    }
    made, settings, rows, own = names[kind]
    further = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
    return made(
        model=model,
        args=arguments(settings, path, **own),
        train_dataset=rows(),
        processing_class=tokenizer,
        callbacks=[DiffPruningCallback(gating_steps=0 if model.base_model.phase() == "fixmask" else 8)],
        **further,
    )


@pytest.mark.parametrize("finished", [False, True], ids=["fresh", "finished"])
@pytest.mark.parametrize("kind", ["KTO", "GRPO", "RLOO", "Reward"])
def test_other_trainers_go_through_all_phases_or_train_a_finished_adapter_on(tmp_path, tokenizer, kind, finished):
    if kind == "Reward":
        base = LlamaForSequenceClassification(LlamaConfig(**{**LLAMA.make().config.to_dict(), "num_labels": 1}))
        model = get_peft_model(base, config(task_type="SEQ_CLS", init_weights=not finished))
    else:
        model = get_peft_model(LLAMA.make(), config(init_weights=not finished, exclude_modules=["lm_head"]))
    if finished:
        model.base_model.magnitude_prune()
    trainer = trainer_of(kind, tmp_path, tokenizer, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "diffpruning_values.default" in n}
    trainer.train()
    tuner = DiffPruningModel.of(trainer.model)
    assert tuner.phase("default") == "fixmask"
    assert tuner.num_nonzeros("default") == round(0.1 * tuner.num_base_parameters())
    after = {n: p for n, p in model.named_parameters() if "diffpruning_values.default" in n}
    assert after
    assert not finished or any(not torch.equal(before[name], after[name]) for name in before)
