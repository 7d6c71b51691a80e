"""Values as a layer holds them before and after their first use.

Values that are int8 in a file lack their scale there, and so do those that a loader fills in without telling anybody.
"""

import copy
import json
import pickle
import random

import accelerate
import pytest
import torch
from adapter_files import POOLER, WEIGHTS, copy_of, native, put, values_of
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from diffpeft import DiffPruningConfig, DiffPruningModel
from diffpeft.files import encoding
from diffpeft.files.adapter import read_adapter
from diffpeft.files.encoding import encode

DENSITY = 0.02


@pytest.fixture(scope="module")
def eight(saved, tiny_bert, tmp_path_factory):
    """The directory of an int8 adapter with a head, and a model with it, loaded by PEFT."""
    directory = tmp_path_factory.mktemp("int8")
    model = PeftModel.from_pretrained(tiny_bert(), saved[0])
    model.base_model.cast_values("int8")
    model.save_pretrained(directory)
    assert load_file(directory / WEIGHTS)[POOLER.format("values")].dtype == torch.int8
    return directory, PeftModel.from_pretrained(tiny_bert(), directory).eval()


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch()).logits


FIRST_USES = {
    "forward": lambda m, d: m(torch.arange(8)[None]),
    "forward, gradients": lambda m, d: m(torch.arange(8)[None]).logits.sum().backward(),
    "diff": lambda m, d: DiffPruningModel.of(m).get_diff(),
    "save": lambda m, d: m.save_pretrained(d / "saved"),
    "merge": lambda m, d: [DiffPruningModel.of(m).merge_adapter(), DiffPruningModel.of(m).unmerge_adapter()],
    "cast": lambda m, d: DiffPruningModel.of(m).cast_values("float32"),
    "cast again": lambda m, d: DiffPruningModel.of(m).cast_values("int8"),
    "read a weight": lambda m, d: [m.bert.pooler.dense.weight, m.bert.pooler.dense.bias],
}


@pytest.mark.parametrize("use", FIRST_USES)
def test_whatever_comes_first_finds_values_times_their_scale_once(eight, tiny_bert, batch, tmp_path, use):
    directory, model = eight
    one = native(tiny_bert, directory)
    objects = values_of(one)
    for _ in range(2):
        FIRST_USES[use](one, tmp_path)
    diff, expected = (DiffPruningModel.of(m).get_diff() for m in (one, model))
    assert diff.keys() == expected.keys()
    assert all(torch.equal(a, b) for key in diff for a, b in zip(diff[key], expected[key], strict=True))
    assert torch.equal(logits_of(one, batch), logits_of(model, batch))
    assert all(p is objects[name] for name, p in values_of(one).items()), "an optimizer may hold them"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_first_use_without_gradients_leaves_what_can_train_and_be_loaded_over(
    eight, tiny_bert, batch, tmp_path, mode
):
    directory, model = eight
    expected = logits_of(model, batch)
    one, other = native(tiny_bert, directory, is_trainable=True), PeftModel.from_pretrained(tiny_bert(), directory)
    for using in (one, other.eval()):
        with mode():
            assert torch.equal(using(**batch()).logits, expected)
        assert torch.equal(logits_of(using, batch), expected)
        assert not any(t.is_inference() for t in [*using.parameters(), *using.buffers()])
    optimizer = torch.optim.SGD(list(values_of(one).values()), lr=0.1)
    one(**batch()).loss.backward()
    optimizer.step()
    assert not torch.equal(logits_of(one, batch), expected)
    other.load_adapter(directory, "default")
    assert torch.equal(logits_of(other, batch), expected)


def test_copies_that_were_made_before_the_first_use(eight, tiny_bert, batch):
    directory, model = eight
    one = native(tiny_bert, directory)
    for each in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one, copy.deepcopy(one)):
        assert torch.equal(logits_of(each, batch), logits_of(model, batch))


def test_a_state_dict_means_the_same_before_and_after_the_first_use(eight, tiny_bert, batch):
    directory, _ = eight
    one, other = native(tiny_bert, directory), native(tiny_bert, directory)
    before = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    expected = logits_of(one, batch)
    after = one.state_dict()
    assert {key: t.shape for key, t in before.items()} == {key: t.shape for key, t in after.items()}
    for state, target in ((after, other), (before, one), (before, other), (after, one)):
        target.load_state_dict(state)
        assert torch.equal(logits_of(target, batch), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_values_are_fp32_in_memory_however_they_are_loaded(saved, tiny_bert, batch, tmp_path, dtype):
    model = PeftModel.from_pretrained(tiny_bert(), saved[0]).eval()
    model.base_model.cast_values(dtype)
    model.save_pretrained(tmp_path)
    ways = [PeftModel.from_pretrained(tiny_bert(), tmp_path, low_cpu_mem_usage=low) for low in (False, True)]
    ways.append(get_peft_model(tiny_bert(), DiffPruningConfig(target_density=DENSITY)))
    ways[2].load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    ways[2].set_adapter("other")
    for loaded in (*ways, native(tiny_bert, tmp_path)):
        assert {p.dtype for p in values_of(loaded).values()} == {torch.float32}
        assert torch.equal(logits_of(loaded.eval(), batch), logits_of(model, batch))


def test_a_base_of_two_bytes_gets_the_same_values(eight, tiny_bert, batch):
    directory, model = eight
    one = tiny_bert().bfloat16()
    one.load_adapter(str(directory))
    logits_of(one, batch)
    expected = model.base_model.get_diff()
    assert all(torch.equal(v, expected[key][1]) for key, (_, v) in DiffPruningModel.of(one).get_diff().items())


@pytest.mark.parametrize("trained", ["all", "one parameter"])
def test_values_that_trained_on_are_saved_in_fp32(eight, tiny_bert, batch, tmp_path, trained):
    directory, _ = eight
    for load in (PeftModel.from_pretrained, lambda model, path, **options: native(tiny_bert, path, **options)):
        model = load(tiny_bert(), directory, is_trainable=True).eval()
        mine = dict(values_of(model))
        optimizer = torch.optim.AdamW(list(mine.values())[: 1 if trained != "all" else None], lr=1e-3)
        model(**batch()).loss.backward()
        optimizer.step()
        shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
        for name in ("one", "two"):
            model.save_pretrained(tmp_path / name)
        assert {name: buffer.shape for name, buffer in model.named_buffers()} == shapes, "DDP sends buffers around"
        assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
        assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["value_dtype"] == "float32"
        for loaded in (PeftModel.from_pretrained(tiny_bert(), tmp_path / "one"), native(tiny_bert, tmp_path / "one")):
            assert torch.equal(logits_of(loaded.eval(), batch), logits_of(model, batch))
        tuner = DiffPruningModel.of(model)
        tuner.cast_values("int8")
        model.save_pretrained(tmp_path / "cast")
        assert torch.equal(logits_of(native(tiny_bert, tmp_path / "cast"), batch), logits_of(model, batch))


@pytest.mark.parametrize("dtypes", [("int8", "float32"), ("float32", "int8"), ("int8", "int8")], ids=str)
def test_a_file_over_an_adapter_of_another_dtype(saved, tiny_bert, batch, tmp_path, dtypes):
    model = PeftModel.from_pretrained(tiny_bert(), saved[0]).eval()
    expected = {}
    for dtype in ("float32", "int8"):
        model.base_model.cast_values(dtype)
        model.save_pretrained(tmp_path / dtype)
        expected[dtype] = logits_of(model, batch)
    model.load_adapter(tmp_path / dtypes[0], "default")
    for dtype in dtypes[::-1]:
        model.load_adapter(tmp_path / dtype, "default")
        assert torch.equal(logits_of(model.eval(), batch), expected[dtype])
        assert model.peft_config["default"].value_dtype == dtype


def test_values_of_several_dtypes_in_one_file_are_refused(eight, tiny_bert, tmp_path):
    file = copy_of(eight[0], tmp_path)
    where, values = eight[1].base_model.get_diff()["bert.pooler.dense.weight"]
    put(file, *encode(where, values, 32 * 32, "float32", "bert.pooler.dense.weight")[::-1])
    with pytest.raises(ValueError, match=r"values of \['float32', 'int8'\]"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


def readers(tiny_bert, batch):
    """Everything that reads a directory's adapter, and the diff that it finds."""
    shapes = {name: parameter.shape for name, parameter in tiny_bert().named_parameters()}
    return [
        lambda path: PeftModel.from_pretrained(tiny_bert(), path).base_model.get_diff(),
        lambda path: read_adapter(path, shapes)[1],
        lambda path: DiffPruningModel.of(native(tiny_bert, path)).get_diff(),
        lambda path: logits_of(native(tiny_bert, path), batch),
    ]


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_a_flipped_bit_in_a_scale_is_refused(eight, tiny_bert, batch, tmp_path, bit):
    file = copy_of(eight[0], tmp_path)
    tensors = load_file(file)
    tensors[POOLER.format("positions")][encoding.CHECKSUM_BYTES + bit // 8] ^= 1 << (bit % 8)
    save_file(tensors, file, metadata={"format": "pt"})
    for read in readers(tiny_bert, batch):
        with pytest.raises(ValueError, match=r"pooler\.dense\.weight.*checksum"):
            read(tmp_path)


@pytest.mark.parametrize("number", [0.0, -0.5, torch.nan, torch.inf])
def test_a_scale_that_is_none_is_refused_under_a_right_checksum(eight, tiny_bert, batch, tmp_path, number):
    file = copy_of(eight[0], tmp_path)
    where, _ = eight[1].base_model.get_diff()["bert.pooler.dense.weight"]
    values = load_file(file)[POOLER.format("values")]
    packed = encoding.pack(where, 32 * 32, torch.tensor([number]))
    put(file, encoding.add_checksum(packed, values, "bert.pooler.dense.weight"), values)
    for read in readers(tiny_bert, batch):
        with pytest.raises(ValueError, match=r"pooler\.dense\.weight.*its scale is .*, not positive and finite"):
            read(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_an_int8_file_with_a_flipped_bit_is_refused_or_means_the_same(eight, tiny_bert, batch, tmp_path, seed):
    directory, model = eight
    file = copy_of(directory, tmp_path)
    data = bytearray(file.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << (seed % 8)
    file.write_bytes(bytes(data))
    try:
        loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    except Exception:  # safetensors, PEFT and we each have errors of our own
        return
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_numbers_that_were_changed_before_their_first_use_are_refused(eight, tiny_bert, batch):
    model = native(tiny_bert, eight[0])
    with torch.no_grad():
        values_of(model)["bert.pooler.dense.diffpruning_values.default.weight"].mul_(1.001)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight.* not those of a file in int8"):
        logits_of(model, batch)


def test_merging_int8_values_is_exact_and_reverted_exactly(eight, tiny_bert, batch):
    directory, model = eight
    for one in (PeftModel.from_pretrained(tiny_bert(), directory).eval(), native(tiny_bert, directory)):
        tuner = DiffPruningModel.of(one)
        plain = {name: p.clone() for name, p in tuner.base_parameters()}
        tuner.merge_adapter()
        expected = model.base_model.get_diff()
        for name, parameter in tuner.base_parameters():
            if name in expected:
                where, values = expected[name]
                theta = plain[name].flatten()
                assert torch.equal(parameter.flatten(), theta.index_copy(0, where, theta[where] + values))
        assert torch.equal(logits_of(one, batch), logits_of(model, batch))
        tuner.unmerge_adapter()
        assert all(torch.equal(p, plain[name]) for name, p in tuner.base_parameters())
        assert torch.equal(logits_of(one, batch), logits_of(model, batch))


def test_rows_of_a_mixed_batch_of_two_dtypes(eight, saved, tiny_bert, batch, tmp_path):
    directory, _ = eight
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    model = PeftModel.from_pretrained(tiny_bert(), directory, "eight")
    model.load_adapter(saved[0], "whole")
    model.eval()
    names = ["eight", "__base__", "whole", "eight"]
    mixed = model(**inputs, adapter_names=names).logits
    for name in ("eight", "whole"):
        model.set_adapter(name)
        rows = [row for row, other in enumerate(names) if other == name]
        torch.testing.assert_close(mixed[rows], model(**inputs).logits[rows], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_what_first_runs_compiled(eight, tiny_bert, batch, load):
    directory, model = eight
    expected = logits_of(model, batch)
    torch.compiler.reset()
    one = native(tiny_bert, directory) if load == "transformers" else PeftModel.from_pretrained(tiny_bert(), directory)
    compiled = torch.compile(one.eval(), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(logits_of(compiled, batch), expected)
    assert torch.equal(logits_of(one, batch), expected)
    assert torch.equal(logits_of(compiled, batch), expected)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_what_first_trains_compiled_trains_values_times_their_scale(eight, tiny_bert, batch, load):
    directory, _ = eight
    torch.compiler.reset()
    if load == "peft":
        one = PeftModel.from_pretrained(tiny_bert(), directory, is_trainable=True).eval()
    else:
        one = native(tiny_bert, directory, is_trainable=True)
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    if load == "transformers":
        with pytest.raises(RuntimeError, match="run the model once uncompiled first"):
            compiled(**batch())
        logits_of(one, batch)
    compiled(**batch()).loss.backward()
    gradients = {name: p.grad for name, p in values_of(one).items()}
    one.zero_grad()
    one(**batch()).loss.backward()
    assert all(torch.equal(p.grad, gradients[name]) for name, p in values_of(one).items())
    torch.compiler.reset()


def test_a_model_that_is_offloaded_before_its_first_use_is_right_or_says_what_to_do(eight, tiny_bert, batch):
    directory, model = eight
    expected = logits_of(model, batch)
    used = native(tiny_bert, directory)
    logits_of(used, batch)
    for one in (PeftModel.from_pretrained(tiny_bert(), directory).eval(), used):
        accelerate.cpu_offload(one, execution_device="cpu")
        for _ in range(2):
            assert torch.equal(logits_of(one, batch), expected)
    one = native(tiny_bert, directory)
    accelerate.cpu_offload(one, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded before their first use; run the model once"):
        logits_of(one, batch)


@pytest.mark.parametrize("name", ["llama_tied", "clip", "mamba", "t5"])
def test_int8_in_models_that_tie_own_and_read_parameters(name, tmp_path):
    make, inputs_of, _ = ARCHITECTURES[name]
    model = get_peft_model(make(), DiffPruningConfig(target_density=0.05, init_weights=False)).eval()
    model.base_model.magnitude_prune()
    model.base_model.cast_values("int8")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs_of(3))[0]
        one = make()
        one.load_adapter(str(tmp_path))
        for each in (PeftModel.from_pretrained(make(), tmp_path), one):
            assert torch.equal(each.eval()(**inputs_of(3))[0], expected)
