"""The whole way of an adapter with the default config, on every architecture.

`python tests/whole/test_architectures.py` prints a table of it.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from diffpeft import DiffPruningConfig

DENSITY = 0.05
STEPS = 2

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


class Row(NamedTuple):
    """What one architecture's way shows."""

    parameters: int
    covered: int
    tensors: int
    tied: int
    unmerged_against_merged: float
    bits_restored: bool


def floats(output: object) -> list[Tensor]:
    """The floating tensors of an output, by which outputs are compared; caches are left out."""
    output = {key: value for key, value in dict(output).items() if "cache" not in key and "past" not in key}
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, Tensor], **kwargs: object) -> list[Tensor]:
    return floats(model.eval()(**inputs, **kwargs))


def loss_of(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(7)
    return sum((out * torch.randn_like(out)).mean() for out in floats(model(**inputs)))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def is_near(a: list[Tensor], b: list[Tensor]) -> bool:
    assert [x.shape for x in a] == [x.shape for x in b]
    return all(torch.allclose(x, y, atol=1e-4, rtol=1e-4) for x, y in zip(a, b, strict=True))


def base_bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "diffpruning_" not in name and "modules_to_save" not in name
    }


def trained(model: PeftModel, inputs: dict[str, Tensor], unused: frozenset[str] = frozenset()) -> set[str]:
    """Two gating steps, pruning, a fixmask step, all as a training loop of one's own would; returns the parameters that
    the loss reached."""
    tuner, reached = model.base_model, set()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        loss_of(model.train(), inputs).backward()
        for layer in tuner.all_layers():
            for name, w in layer.diffpruning_w["default"].items():
                if w.grad is not None:
                    reached.add(layer.parameter_key(name))
        tuner.gate_step(step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    tuner.magnitude_prune(optimizer=optimizer)
    loss_of(model.train(), inputs).backward()
    optimizer.step()
    optimizer.zero_grad()
    return reached


def way(name: str, directory: Path) -> Row:
    """Take an adapter through its life; assert what must hold at every station."""
    make, inputs_of, unused = ARCHITECTURES[name]
    inputs, base = inputs_of(4), make().requires_grad_(False)  # torch takes other kernels for frozen weights
    plain, bits = run(base, inputs), base_bits(base)
    shapes = {n: p.shape for n, p in base.named_parameters()}
    tied = sum(1 for _ in base.named_parameters(remove_duplicate=False)) - len(shapes)

    model = get_peft_model(base, DiffPruningConfig(target_density=DENSITY))
    tuner = model.base_model
    heads = {n for n in shapes if n.split(".")[0] in (tuner.peft_config["default"].modules_to_save or [])}
    adapted = tuner.adapted_parameters()
    assert adapted == {n: shape.numel() for n, shape in shapes.items() if n not in heads}
    assert difference(run(model, inputs), plain) == 0, "injection changes the output"

    assert trained(model, inputs) == adapted.keys() - unused, "the loss does not reach every parameter"
    total = sum(adapted.values())
    nnz = {key: values.numel() for key, (_, values) in tuner.get_diff().items()}
    assert sum(nnz.values()) == round(DENSITY * total), "the budget is not met exactly"
    assert nnz == tuner.peft_config["default"].nnz_pattern

    unmerged = run(model, inputs)
    assert difference(unmerged, plain) > 1e-5, "training changed nothing"
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(make(), directory)
    assert difference(run(loaded, inputs), unmerged) == 0, "PEFT loads something else"
    native = make()
    info = PeftAdapterMixin.load_adapter(native, str(directory))  # Wav2Vec2's own method of the name is another
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert difference(run(native, inputs), unmerged) == 0, "transformers loads something else"

    model.merge_adapter()
    merged = run(model, inputs)
    model.unmerge_adapter()
    after = base_bits(model.get_base_model())
    restored = all(
        torch.equal(after[n].reshape(-1).view(torch.uint8), bits[n].reshape(-1).view(torch.uint8))
        for n in bits
        if n in after
    )
    assert difference(run(model, inputs), unmerged) == 0
    assert is_near(merged, unmerged), "merged and unmerged differ"
    with model.disable_adapter():
        assert heads or difference(run(model, inputs), plain) == 0

    row = Row(total, sum(adapted[key] for key in adapted), len(adapted), tied, difference(merged, unmerged), restored)
    unloaded = loaded.merge_and_unload()
    assert type(unloaded) is type(base)
    assert list(unloaded.state_dict()) == list(make().state_dict())
    assert is_near(run(unloaded, inputs), unmerged)
    return row


@each_architecture
def test_an_adapters_whole_way(name, tmp_path):
    row = way(name, tmp_path)
    assert row.bits_restored
    assert row.covered == row.parameters


def as_in_training(model: PreTrainedModel, reentrant: bool | None, inplace: bool) -> PreTrainedModel:
    """Switch on what models do in training alone, dropout in place where it writes into a linear layer's output."""
    switches = {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2, "mask_feature_prob": 0.5}
    for name, value in {**switches, "mask_feature_length": 2, "layerdrop": 0.3, "encoder_layerdrop": 0.3}.items():
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = module.p or 0.1
            module.inplace = inplace
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    return model.train()


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable. is deprecated", "ignore:None of the inputs have requires_grad"
)
@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
@each_architecture
def test_everything_that_models_do_in_training_goes_with_a_diff(name, reentrant):
    """Models write into what linear layers and embeddings return: masks over time, dropout and sums in place."""
    make, inputs_of, _ = ARCHITECTURES[name]
    inputs = inputs_of(4)
    for inplace in (True, False):  # many models need what dropout would overwrite
        try:
            loss_of(as_in_training(make(), reentrant, inplace), inputs).backward()
            break
        except (RuntimeError, ValueError) as error:
            reason = str(error)[:80]
    else:
        pytest.skip(f"it does not go without a diff: {reason}")
    model = get_peft_model(as_in_training(make(), reentrant, inplace), DiffPruningConfig(target_density=DENSITY))
    trained(model, inputs)
    assert any(bool(values.any()) for _, values in model.base_model.get_diff().values())


CONTRASTIVE = ("clip", "siglip")


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_rows_that_are_compared_with_each_other_cannot_have_adapters_of_their_own(name):
    make, inputs_of, _ = ARCHITECTURES[name]
    model = get_peft_model(make(), DiffPruningConfig(init_weights=False)).eval()
    with pytest.raises(NotImplementedError, match="use one batch for each adapter"):
        model(**inputs_of(4), adapter_names=["default", "__base__", "default", "default"])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in CONTRASTIVE])
def test_rows_of_a_mixed_batch_equal_their_own_adapters_outputs(name, tmp_path):
    make, inputs_of, _ = ARCHITECTURES[name]
    inputs = inputs_of(5)
    model = get_peft_model(make(), DiffPruningConfig(target_density=DENSITY))
    trained(model, inputs_of(4))
    model.add_adapter("other", DiffPruningConfig(target_density=DENSITY, init_weights=False))
    names = ["default", "__base__", "other", "default", "other"]
    mixed = run(model, inputs, adapter_names=names)
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = run(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = run(model, inputs)
    assert difference(alone["default"], alone["other"]) > 1e-5
    for i, tensor in enumerate(mixed):
        dim = row_dim(name, tensor, i)
        if dim is None:
            continue
        for row, adapter in enumerate(names):
            expected = alone[adapter][i].select(dim, row)
            torch.testing.assert_close(tensor.select(dim, row), expected, atol=2e-5, rtol=1e-4)


def row_dim(name: str, tensor: Tensor, index: int) -> int | None:
    """XLNet's memories have the batch second."""
    return 1 if name == "xlnet" and tensor.ndim == 3 else 0


if __name__ == "__main__":
    print("| architecture | base parameters | covered | tensors | tied | unmerged against merged | bits restored |")
    print("|---|---|---|---|---|---|---|")
    for architecture in sys.argv[1:] or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as scratch:
            found = way(architecture, Path(scratch))
        print(
            f"| {architecture} | {found.parameters:,} | {found.covered / found.parameters:.0%} | {found.tensors} | "
            f"{found.tied} | {found.unmerged_against_merged:.1e} | {'all' if found.bits_restored else 'NOT ALL'} |"
        )
