"""A quantised base: finished diffs on top of it, and errors for what cannot be."""

import pickle
from copy import deepcopy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from diffpeft import DiffPruningConfig, DiffPruningModel

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore::FutureWarning:bitsandbytes")

SETTINGS = {
    8: {"load_in_8bit": True},
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
}
INPUTS = {"input_ids": torch.arange(16).reshape(2, 8)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model, and an adapter that was finished on it unquantised."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    base.save_pretrained(directory / "base")
    model = get_peft_model(base, DiffPruningConfig(target_density=0.02, init_weights=False))
    model.base_model.magnitude_prune()
    model.save_pretrained(directory / "adapter")
    return directory


@pytest.fixture(params=[8, 4], ids="{}bit".format)
def quantized(request, saved):
    settings = BitsAndBytesConfig(**SETTINGS[request.param])
    return LlamaForCausalLM.from_pretrained(saved / "base", quantization_config=settings)


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(**INPUTS, **kwargs).logits


def test_a_finished_diff_has_its_effect_on_a_quantised_base(quantized, saved):
    plain = LlamaForCausalLM.from_pretrained(saved / "base")
    before = logits(plain)
    model = PeftModel.from_pretrained(plain, saved / "adapter")
    effect = logits(model) - before
    model = PeftModel.from_pretrained(quantized, saved / "adapter")
    with model.disable_adapter():
        quantized_before = logits(model)
    quantized_effect = logits(model) - quantized_before
    rounding = (quantized_before - before).norm()
    assert float((quantized_effect - effect).norm()) < 1.5 * float(rounding)
    assert float(effect.norm()) > 2 * float(rounding)
    assert model.base_model.num_base_parameters() == plain.num_parameters() - model.base_model.num_nonzeros()


def test_values_train_in_fixmask(quantized, saved):
    model = PeftModel.from_pretrained(quantized, saved / "adapter", is_trainable=True).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_rows_of_a_mixed_batch(quantized, saved):
    model = PeftModel.from_pretrained(quantized, saved / "adapter")
    own = logits(model)
    with model.disable_adapter():
        base = logits(model)
    mixed = logits(model, adapter_names=["default", "__base__"])
    near = float((own - base).norm()) / 10  # 8-bit kernels scale by the whole batch
    assert float((mixed[0] - own[0]).norm()) < near
    assert float((mixed[1] - base[1]).norm()) < near


def test_gates_cannot_be_learned(quantized):
    with pytest.raises(ValueError, match="quantised, where gates cannot be learned"):
        get_peft_model(quantized, DiffPruningConfig())


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_leaves_everything_as_it_was(quantized, saved, method):
    model = PeftModel.from_pretrained(quantized, saved / "adapter")
    before = logits(model)
    with pytest.raises(ValueError, match="is quantised: merging"):
        getattr(model, method)()
    assert not any(layer.merged for layer in model.base_model.all_layers())
    assert torch.equal(logits(model), before)


def test_status_names_the_backend(quantized, saved):
    model = PeftModel.from_pretrained(quantized, saved / "adapter")
    backends = {s.quantization_backend for s in model.get_layer_status() if s.name.endswith("q_proj")}
    assert backends in ({"bnb 8bit"}, {"bnb 4bit"})
    assert model.get_model_status().enabled is True


def test_int8_values_on_a_quantised_base(quantized, saved, tmp_path):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(saved / "base"), saved / "adapter")
    model.base_model.cast_values("int8")
    model.save_pretrained(tmp_path)
    expected = model.base_model.get_diff()
    with_peft = PeftModel.from_pretrained(deepcopy(quantized), tmp_path)
    quantized.load_adapter(str(tmp_path))
    assert torch.equal(logits(quantized), logits(with_peft))
    for found in (DiffPruningModel.of(quantized).get_diff(), with_peft.base_model.get_diff()):
        assert all(torch.equal(values, expected[key][1]) for key, (_, values) in found.items())


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_quantised_layer(quantized, saved, copy):
    model = PeftModel.from_pretrained(quantized, saved / "adapter")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    torch.testing.assert_close(copy(layer)(x), layer(x))
