import json

import pytest
import torch
from architectures import ARCHITECTURES, pruned
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from diffpeft import DiffPruningConfig
from diffpeft.files import encoding
from diffpeft.files.adapter import read_adapter, write_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def shapes_of(model):
    return {n: p.shape for n, p in model.named_parameters()}


def heads_of(base, modules):
    return {n: t for n, t in base.state_dict().items() if n.split(".")[0] in (modules or [])}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in ARCHITECTURES), ("clip", "int8")])
def test_every_key_is_the_one_that_peft_writes(name, dtype, tmp_path):
    make = ARCHITECTURES[name].make
    model = pruned(make(), target_density=1.0)
    model.base_model.cast_values(dtype)
    model.save_pretrained(tmp_path / "peft")
    config = model.peft_config["default"]
    heads = heads_of(make(), config.modules_to_save)
    shapes = {n: shape for n, shape in shapes_of(make()).items() if n not in heads}
    write_adapter(tmp_path / "own", config, model.base_model.get_diff(), shapes, heads)
    theirs, ours = load_file(tmp_path / "peft" / WEIGHTS), load_file(tmp_path / "own" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) and theirs[key].dtype == ours[key].dtype for key in theirs)
    mapping = {"auto_mapping": None}
    theirs, ours = (json.loads((tmp_path / d / CONFIG).read_text()) | mapping for d in ("peft", "own"))
    assert theirs == ours
    _, diff, read_heads = read_adapter(tmp_path / "peft", shapes_of(make()))
    assert diff.keys() == model.base_model.get_diff().keys()
    assert read_heads.keys() == heads.keys()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["bert", "vit", "clip", "siglip", "mamba"])
def test_what_is_written_is_read_equal_and_loads(name, dtype, tmp_path):
    make = ARCHITECTURES[name].make
    model = pruned(make())
    exact = model.base_model.get_diff()
    model.base_model.cast_values(dtype)
    expected = model.base_model.get_diff()
    config = model.peft_config["default"]
    heads = {n: torch.randn_like(t) for n, t in heads_of(make(), config.modules_to_save).items()}
    shapes = {n: shape for n, shape in shapes_of(make()).items() if n not in heads}
    write_adapter(tmp_path, config, exact, shapes, heads)
    assert not config.inference_mode
    read, diff, read_heads = read_adapter(tmp_path, shapes)
    assert read.nnz_pattern == config.nnz_pattern
    assert read.inference_mode
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    for other in (diff, loaded.base_model.get_diff()):
        assert other.keys() == expected.keys()
        assert all(torch.equal(a, b) for key in other for a, b in zip(other[key], expected[key], strict=True))
    merged = loaded.merge_and_unload().state_dict()
    assert all(torch.equal(head, read_heads[key]) and torch.equal(head, merged[key]) for key, head in heads.items())
    once = (tmp_path / WEIGHTS).read_bytes()
    write_adapter(tmp_path, read, diff, shapes, heads)
    assert (tmp_path / WEIGHTS).read_bytes() == once


def test_without_shapes_they_come_from_the_base_that_the_config_names(tiny_bert, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = pruned(tiny_bert())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    _, diff, _ = read_adapter(tmp_path / "adapter")
    assert diff.keys() == model.base_model.get_diff().keys()
    damage_config(base_model_name_or_path="some/where")(tmp_path / "adapter")
    with pytest.raises(ValueError, match="'some/where' is no directory here; pass shapes="):
        read_adapter(tmp_path / "adapter")


@pytest.fixture
def saved(tiny_bert, tmp_path):
    pruned(tiny_bert()).save_pretrained(tmp_path)
    return tmp_path


def damage_tensors(change):
    def damage(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors, next(n for n in tensors if "layer.0" in n and "diffpruning_values" in n))
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return damage


def damage_config(**change):
    def damage(directory):
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | change))

    return damage


def positions_of(key):
    return key.replace("_values.", "_positions.")


def with_checksum(tensors, key):
    """The positions that belong to these values, with a checksum that does."""
    name = key.removeprefix("base_model.model.").replace("diffpruning_values.", "")
    return encoding.add_checksum(tensors[positions_of(key)], tensors[key], name)


def put(key, change):
    return lambda tensors, name: tensors.update({key(name): change(tensors[key(name)])})


DAMAGE = {
    "values missing": (damage_tensors(lambda t, n: t.pop(n)), r"layer\.0.* has no values"),
    "positions missing": (damage_tensors(lambda t, n: t.pop(positions_of(n))), r"layer\.0.* has no positions"),
    "both missing": (
        damage_tensors(lambda t, n: (t.pop(n), t.pop(positions_of(n)))),
        r"layer\.0.* has 0 values, but adapter_config.json says",
    ),
    "packed size": (damage_tensors(put(positions_of, lambda t: t[:-1].clone())), r"layer\.0.*bytes cannot hold"),
    "no positions": (damage_tensors(put(positions_of, lambda t: t.fill_(255))), r"layer\.0.*positions"),
    "NaN": (damage_tensors(put(str, lambda t: t.fill_(torch.nan))), r"layer\.0.*checksum"),
    "NaN, right checksum": (
        damage_tensors(lambda t, n: (t[n].fill_(torch.nan), t.update({positions_of(n): with_checksum(t, n)}))),
        r"layer\.0.*NaN",
    ),
    "other dtype": (damage_tensors(put(str, lambda t: t.to(torch.int16))), r"layer\.0.*is torch.int16 of"),
    "no scale": (damage_tensors(put(str, lambda t: t.to(torch.int8))), r"layer\.0.*checksum"),
    "no scale, right checksum": (
        damage_tensors(
            lambda t, n: (put(str, lambda v: v.to(torch.int8))(t, n), t.update({positions_of(n): with_checksum(t, n)}))
        ),
        r"layer\.0.*torch.int8 with 0 scales",
    ),
    "NaN in a head": (
        damage_tensors(lambda t, n: t["base_model.model.classifier.weight"].fill_(torch.nan)),
        "classifier.weight has NaN",
    ),
    "other shape": (damage_tensors(put(str, lambda t: t[:, None].clone())), r"layer\.0.*not float32 or .* of \(k,\)"),
    "count": (damage_config(nnz_pattern={"bert.pooler.dense.weight": 3}), "but adapter_config.json says"),
    "gating config": (damage_config(nnz_pattern=None), "still in gating"),
    "other method": (damage_config(peft_type="LORA"), "peft_type is 'LORA', not 'DIFFPRUNING'"),
    "no config": (lambda d: (d / CONFIG).unlink(), "adapter_config.json is missing"),
    "half a config": (lambda d: (d / CONFIG).write_text("{"), "adapter_config.json is damaged"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "half the weights": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]),
        "adapter_model.safetensors is damaged",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_input_is_refused_with_the_file_and_the_tensor(what, saved, tiny_bert):
    damage, message = DAMAGE[what]
    damage(saved)
    with pytest.raises(ValueError, match=message) as error:
        read_adapter(saved, shapes_of(tiny_bert()))
    assert str(saved) in str(error.value)


def test_shapes_of_another_model_are_refused(saved, tiny_bert):
    with pytest.raises(ValueError, match="is no parameter of the base model"):
        read_adapter(saved, {})
    with pytest.raises(ValueError, match="the file is damaged or belongs to another model"):
        read_adapter(saved, shapes_of(tiny_bert(hidden_size=64)))


def test_an_adapter_in_gating_is_refused(tiny_bert, tmp_path):
    get_peft_model(tiny_bert(), DiffPruningConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gating; .* magnitude_prune"):
        read_adapter(tmp_path, shapes_of(tiny_bert()))
    damage_config(nnz_pattern={})(tmp_path)
    with pytest.raises(ValueError, match=r"gating|says"):
        read_adapter(tmp_path, shapes_of(tiny_bert()))


WRONG = {
    "unknown": ({"b": ([0], [1.0])}, {}, "none of the 1 parameters in shapes"),
    "numbers": ({"a.b": ([0, 1], [1.0])}, {}, r"a\.b: positions are \(2,\), values \(1,\)"),
    "order": ({"a.b": ([1, 0], [1.0, 1.0])}, {}, r"a\.b: positions are not strictly increasing"),
    "range": ({"a.b": ([9], [1.0])}, {}, r"a\.b: positions reach from 9 to 9"),
    "infinite": ({"a.b": ([0], [float("inf")])}, {}, r"a\.b has NaN or infinite"),
    "head": ({"a.b": ([0], [1.0])}, {"h.w": torch.tensor([torch.nan])}, r"head h\.w has NaN"),
    "empty": ({"a.b": ([], [])}, {}, "nothing to write"),
}


def test_values_beyond_their_dtype_are_not_written(tmp_path):
    diff, config = {"a.b": (torch.tensor([0]), torch.tensor([1e6]))}, DiffPruningConfig(value_dtype="float16")
    with pytest.raises(ValueError, match=r"a\.b: its values are NaN or infinite in float16.*too narrow"):
        write_adapter(tmp_path, config, diff, {"a.b": torch.Size((3,))})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_adapter_is_not_written(what, tmp_path):
    diff, heads, message = WRONG[what]
    diff = {n: (torch.tensor(p, dtype=torch.int64), torch.tensor(v)) for n, (p, v) in diff.items()}
    with pytest.raises(ValueError, match=message):
        write_adapter(tmp_path, DiffPruningConfig(), diff, {"a.b": torch.Size((3,))}, heads)
    assert not any(tmp_path.iterdir())
