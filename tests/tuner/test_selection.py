"""Positions chosen before training: at the largest squared gradients of a few batches, or at random.

Besides full-precision models: a quantised base, a frozen second adapter, and an optimizer that was made before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from diffpeft import DiffPruningConfig
from diffpeft.config import SELECTIONS

BEFORE_TRAINING = ("gradient", "random")


def wrapped(base, selection, **config):
    return get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", selection=selection, **config))


def loss_of(model):
    return lambda batch: model(**batch).loss


def test_gradients_choose_where_the_squared_gradients_of_the_batches_are_largest(tiny_bert, batch):
    batches = [batch(seed=seed) for seed in range(3)]
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    squares = {name: torch.zeros_like(p) for name, p in base.bert.named_parameters(prefix="bert")}
    for given in batches:
        base.zero_grad()
        base(**given).loss.backward()
        for name, parameter in base.bert.named_parameters(prefix="bert"):
            squares[name] += parameter.grad.square()
    model = wrapped(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(), "gradient")
    summary = model.base_model.select_positions(batches, loss_of(model))
    total = sum(square.numel() for square in squares.values())
    assert summary.kept == round(0.005 * total)
    cut = torch.cat([square.reshape(-1) for square in squares.values()]).sort(descending=True).values
    diff = model.base_model.get_diff()
    chosen = torch.cat([squares[name].reshape(-1)[positions] for name, (positions, _) in diff.items()])
    torch.testing.assert_close(chosen.sort(descending=True).values, cut[: summary.kept])
    assert all(float(values.abs().max()) == 0.0 for _, values in diff.values())


def test_choosing_leaves_nothing_behind_in_the_base(tiny_bert, batch):
    model = wrapped(tiny_bert(), "gradient")
    before = {name: parameter.detach().clone() for name, parameter in tiny_bert().named_parameters()}
    head = next(p for n, p in model.named_parameters() if "modules_to_save" in n)
    head.grad = torch.ones_like(head)
    model.base_model.select_positions([batch()], loss_of(model))
    assert torch.equal(head.grad, torch.ones_like(head))
    for name, parameter in model.base_model.base_parameters():
        assert torch.equal(parameter, before[name])
        assert (parameter.requires_grad, parameter.grad) == (False, None)
        assert not parameter._post_accumulate_grad_hooks


def test_chance_follows_the_seed_and_spreads_over_all_parameters(tiny_bert):
    chosen = []
    for seed in (0, 0, 1):
        model = wrapped(tiny_bert(), "random", target_density=0.1)
        torch.manual_seed(seed)
        model.base_model.select_positions()
        chosen.append(model.base_model.get_diff())
    first, again, other = ({(n, int(i)) for n, (p, _) in diff.items() for i in p} for diff in chosen)
    assert first == again
    assert len(first & other) < 0.2 * len(first)
    numel = model.base_model.adapted_parameters()
    shares = torch.tensor([len(chosen[0][name][0]) / numel[name] for name in numel if numel[name] > 1000])
    torch.testing.assert_close(shares, torch.full_like(shares, 0.1), rtol=0.35, atol=0)


@pytest.mark.parametrize("selection", BEFORE_TRAINING)
def test_until_then_the_model_is_the_base_and_the_diff_takes_no_memory(tiny_bert, batch, tmp_path, selection):
    model = wrapped(tiny_bert(), selection).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, tiny_bert().eval()(**batch()).logits)
    assert model.base_model.phase() == "gating"
    assert sum(p.numel() for n, p in model.named_parameters() if "diffpruning" in n) == 0
    assert (model.base_model.num_nonzeros(), model.base_model.get_diff()) == (0, {})
    model.merge_adapter()
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    again.base_model.select_positions([batch()], loss_of(again))
    assert again.base_model.phase() == "fixmask"


@pytest.mark.parametrize("selection", BEFORE_TRAINING)
def test_an_optimizer_that_was_made_before_trains_the_chosen_values(tiny_bert, batch, selection):
    model = wrapped(tiny_bert(), selection)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.select_positions([batch()], loss_of(model), optimizer=optimizer)
    model(**batch()).loss.backward()
    optimizer.step()
    moved = [values for _, values in model.base_model.get_diff().values()]
    assert sum(int(values.count_nonzero()) for values in moved) > 0.7 * model.base_model.num_nonzeros()  # of words


def test_a_frozen_adapter_counts_in_the_gradients_and_keeps_its_values(tiny_bert, batch):
    model = get_peft_model(
        tiny_bert(), DiffPruningConfig(selection="magnitude", init_weights=False, target_modules=["query"]), "language"
    )
    model.base_model.magnitude_prune()
    before = model.base_model.get_diff("language")
    model.add_adapter("task", DiffPruningConfig(selection="gradient"))
    model.base_model.set_adapter(["language", "task"])
    model.base_model.select_positions([batch()], loss_of(model), adapter_name="task")
    after = model.base_model.get_diff("language")
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)
    assert model.base_model.num_nonzeros("task") > 100


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore::FutureWarning:bitsandbytes")
def test_gradients_choose_on_a_quantised_base_about_as_on_the_plain_one(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).save_pretrained(tmp_path)
    ids = torch.arange(32).reshape(2, 16)
    settings = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}}
    diffs = []
    for quantization in (None, BitsAndBytesConfig(**settings[bits])):
        base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
        config = DiffPruningConfig(selection="gradient", target_modules="all-linear", target_density=0.02)
        model = get_peft_model(base, config)
        model.base_model.select_positions([{"input_ids": ids, "labels": ids}], loss_of(model))
        diffs.append(model.base_model.get_diff())
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    plain, quantized = ({(n, int(i)) for n, (p, _) in diff.items() for i in p} for diff in diffs)
    assert len(plain & quantized) > 0.5 * len(plain)


def test_what_cannot_choose_says_what_to_do(tiny_bert, batch):
    gates, gradient = wrapped(tiny_bert(), "gates"), wrapped(tiny_bert(), "gradient")
    with pytest.raises(ValueError, match=r"selection='gates' .* call magnitude_prune"):
        gates.base_model.select_positions()
    with pytest.raises(ValueError, match=r"selection='gradient' .* call select_positions"):
        gradient.base_model.magnitude_prune()
    with pytest.raises(ValueError, match="pass batches and loss"):
        gradient.base_model.select_positions()
    with pytest.raises(ValueError, match="got no batches"):
        gradient.base_model.select_positions([], loss_of(gradient))
    gradient.base_model.select_positions([batch()], loss_of(gradient))
    with pytest.raises(ValueError, match="pruned already"):
        gradient.base_model.select_positions([batch()], loss_of(gradient))
    with pytest.raises(ValueError, match=r"selection='best' is not known; use one of \('gates'"):
        DiffPruningConfig(selection="best")


PROCESS = """
import json, os, sys
import torch
from peft import get_peft_model
from torch import distributed
from transformers import BertConfig, BertForSequenceClassification
from diffpeft import DiffPruningConfig

rank, processes, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
if processes > 1:
    distributed.init_process_group("gloo")
ids = torch.arange(48).reshape(4, 12)
batches = [{"input_ids": row[None], "labels": torch.tensor([index % 2])} for index, row in enumerate(ids)]
found = {}
for selection in ("gradient", "random"):
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=16)).eval()
    model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", target_density=0.05, selection=selection))
    torch.manual_seed(rank)
    model.base_model.select_positions(batches[rank::processes], lambda batch: model(**batch).loss)
    found[selection] = {name: positions.tolist() for name, (positions, _) in model.base_model.get_diff().items()}
with open(f"{folder}/{processes}-{rank}.json", "w") as file:
    json.dump(found, file)
if processes > 1:
    distributed.destroy_process_group()
"""


def test_processes_with_batches_of_their_own_choose_as_one_process_with_all_of_them(tmp_path):
    script = tmp_path / "choose.py"
    script.write_text(PROCESS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = {"env": environment, "check": True, "timeout": 300}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes in ("1", "2"):
        subprocess.run([*launch, processes, str(script), str(tmp_path)], **run)
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second == one


@pytest.mark.parametrize("gated", [True, False])
def test_files_that_say_gated_still_load(tiny_bert, tmp_path, gated):
    wrapped(tiny_bert(), "gates" if gated else "magnitude").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    text = file.read_text()
    selection = SELECTIONS[0 if gated else 1]
    file.write_text(text.replace(f'"selection": "{selection}"', f'"gated": {str(gated).lower()}'))
    assert PeftModel.from_pretrained(tiny_bert(), tmp_path).peft_config["default"].selection == selection
