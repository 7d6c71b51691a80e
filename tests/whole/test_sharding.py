"""Fixmask under FSDP2 in two processes under gloo, and errors for what cannot be sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from diffpeft import DiffPruningConfig
from diffpeft.sparse.sharded import check_whole
from diffpeft.trainer.launch import check_launch

ROOT = Path(__file__).parents[2]


# torch's own, in what FSDP calls.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*all_gather_into_tensor:FutureWarning", "ignore:.*reduce_scatter_tensor:FutureWarning"
)


def pruned(gated=False, **gates):
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=0.05, init_weights=False, **gates)
    config.selection = "gates" if gated else "magnitude"
    model = get_peft_model(base, config)
    if not gated:
        model.base_model.magnitude_prune()
    return model


@pytest.fixture
def process_group(tmp_path):
    """A process group of this one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_two_processes_train_shards_as_they_train_replicas_and_resume_exactly(tmp_path):
    """The benchmark trains, compares and resumes; it fails where a run did not resume with the same bits."""
    script = ROOT / "examples" / "benchmarks" / "robustness" / "sharding.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    found, values = [], []
    for kind, more in (
        ("ddp", []),
        ("fsdp2", []),
        ("fsdp2", ["--checkpoint", str(tmp_path / "1" / "checkpoint-4")]),
    ):
        folder = tmp_path / str(len(found))
        words = ["--train", kind, "--folder", str(folder), *more]
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[:3000]  # the processes' own words; the launcher's come last
        found.append(json.loads((folder / "found.json").read_text()))
        values.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert [run["type"] for run in found] == ["MULTI_CPU", "FSDP", "FSDP"]
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-5)
    assert found[2]["losses"] == found[1]["losses"]
    for key, tensor in values[0].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(values[1][key], tensor, rtol=1e-4, atol=1e-6)
        assert torch.equal(values[2][key], values[1][key])


def test_what_needs_whole_parameters_says_so(process_group):
    model = fully_shard(pruned(gated=True))
    with pytest.raises(ValueError, match=r"get_diff in gating needs whole parameters, but FSDP has sharded"):
        model.base_model.get_diff()
    fixed = pruned(gated=True, l0_lambda=1e-7)
    with pytest.raises(ValueError, match=r"works with l0_lambda='auto' and low_memory=False, and these are 1e-07 and"):
        fully_shard(fixed).base_model.gate_step(0, 10)
    with pytest.raises(ValueError, match="wrapping a model needs whole parameters"):
        get_peft_model(fully_shard(pruned().unload()), DiffPruningConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="merging needs whole parameters"):
        fully_shard(pruned()).merge_adapter()


def test_a_file_is_opened_before_the_model_is_sharded(process_group, tmp_path):
    made = pruned()
    made.base_model.cast_values("int8")
    made.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    wanted = made.eval()(input_ids=tokens).logits
    late = fully_shard(PeftModel.from_pretrained(made.unload(), tmp_path))
    with pytest.raises(ValueError, match="first use of a file's values needs whole parameters"):
        late.base_model.open_values()
    opened = PeftModel.from_pretrained(pruned().unload(), tmp_path).eval()
    opened.base_model.open_values()
    torch.testing.assert_close(fully_shard(opened)(input_ids=tokens).logits, wanted)


def test_a_state_dict_of_whole_tensors_is_what_is_saved(process_group, tmp_path):
    made = pruned()
    whole = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    fully_shard(made).save_pretrained(tmp_path, state_dict=whole)
    loaded = PeftModel.from_pretrained(pruned().unload(), tmp_path).base_model.get_diff()
    for key, (where, kept) in pruned().base_model.get_diff().items():
        assert torch.equal(loaded[key][0], where)
        assert torch.equal(loaded[key][1], kept)


def arguments(**changes):
    return SimpleNamespace(
        **{
            "n_gpu": 1,
            "optim": "adamw_torch",
            "fp16": False,
            "max_grad_norm": 1.0,
            "fsdp": None,
            "torch_compile": False,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("state", "gating", "warmup", "message"),
    [
        ({"fsdp_version": 1}, False, 0, "FSDP version 1 flattens parameters; set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, False, 0, "fsdp_cpu_ram_efficient_loading: false"),
        ({"dtype": torch.bfloat16}, True, 0, r"gather gates in torch.bfloat16, .* set bf16=False .* dtype=torch.bfl"),
        ({"zero_stage": 3}, False, 0, "ZeRO stage 3 takes base weights away"),
        ({"zero_stage": 2}, True, 0, "gating does not work under DEEPSPEED"),
        ({"zero_stage": 2}, False, 0.1, "cannot do fixmask_warmup_steps=0.1"),
        ({"megatron": True}, False, 0, "MEGATRON_LM splits the parameters"),
    ],
)
def test_launches_that_would_train_wrongly_are_refused(monkeypatch, state, gating, warmup, message):
    monkeypatch.setattr("diffpeft.trainer.launch.AcceleratorState", launched(**state))
    with pytest.raises(ValueError, match=message):
        check_launch(arguments(), gating, warmup)


@pytest.mark.parametrize("state", [{}, {"state_dict_type": "SHARDED_STATE_DICT"}, {"zero_stage": 1}, {"zero_stage": 2}])
def test_fixmask_may_be_sharded_and_gating_under_fsdp(monkeypatch, state):
    monkeypatch.setattr("diffpeft.trainer.launch.AcceleratorState", launched(**state))
    check_launch(arguments(), "zero_stage" not in state, 0)


def launched(zero_stage=None, megatron=False, **fsdp):
    """Accelerate's state after a launch with FSDP2 or what else is asked for."""
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}
    plugin |= {"mixed_precision_policy": SimpleNamespace(param_dtype=fsdp.pop("dtype", None)), **fsdp}
    kind = DistributedType.MEGATRON_LM if megatron else DistributedType.FSDP
    if zero_stage is not None:
        kind = DistributedType.DEEPSPEED
    state = SimpleNamespace(
        distributed_type=kind,
        fsdp_plugin=SimpleNamespace(**plugin),
        deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage),
    )
    return type("AcceleratorState", (), {"_shared_state": {"distributed_type": kind}, "__new__": lambda cls: state})


def test_whole_tensors_pass():
    check_whole(nn.Linear(2, 2).parameters(), "this")


class Scaled(nn.Module):
    """A parameter of its own, as CLIP's logit scale, and a module."""

    def __init__(self, module):
        super().__init__()
        self.embed, self.module = nn.Embedding(10, 8), module
        self.scale = nn.Parameter(torch.ones(8))
        self.looks_up = isinstance(module, nn.Embedding)

    def forward(self, ids):
        hidden = self.embed(ids)
        return (self.module(ids) + hidden if self.looks_up else self.module(hidden)) * self.scale


@pytest.mark.filterwarnings("ignore:.*NO_SHARD", "ignore:.*FSDP:FutureWarning", "ignore:.*FullySharded:FutureWarning")
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("gating", [True, False], ids=["gating", "fixmask"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(8, 8), lambda: nn.Embedding(10, 8), lambda: nn.LayerNorm(8), lambda: Conv1D(8, 8)],
    ids=["linear", "embedding", "norm", "conv1d"],
)
def test_tensors_that_fsdp1_sets_on_a_module_hide_no_diff(process_group, make, gating, mode):
    """With the model's own parameters too, in the output and in the gradients of the adapter."""
    torch.manual_seed(0)
    model = get_peft_model(Scaled(make()), DiffPruningConfig(target_density=0.3, init_weights=False))
    if not gating:
        model.base_model.magnitude_prune()
    model.train(mode == "train")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for sharded in (False, True):
        wrapped = model
        if sharded:
            wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        torch.manual_seed(1)
        with torch.set_grad_enabled(mode != "no_grad"):
            output = wrapped(torch.arange(6).view(2, 3))
        if mode != "no_grad":
            output.square().sum().backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        found.append({"output": output.detach().clone(), **gradients})
        wrapped.zero_grad()
    torch.testing.assert_close(found[1], found[0])
    assert mode == "no_grad" or any(gradient.any() for name, gradient in found[0].items() if name != "output")
