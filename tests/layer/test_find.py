"""The wrapped modules of a model."""

import pytest
from peft import get_peft_model

from diffpeft import DiffPruningConfig, DiffPruningLayer
from diffpeft.layer.find import layers_in, outer_modules


@pytest.fixture
def model(tiny_bert):
    """With an adapter in fixmask and one in gating."""
    config = DiffPruningConfig(task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(tiny_bert(), config, adapter_name="first")
    model.add_adapter("gating", config)
    model.base_model.magnitude_prune(adapter_name="first")
    return model


def testouter_modules_are_all_but_the_containers_in_order(model):
    inner = {m for layer in model.modules() if isinstance(layer, DiffPruningLayer) for m in layer.modules()}
    base = {m for layer in model.modules() if isinstance(layer, DiffPruningLayer) for m in layer.base_layer.modules()}
    layers = {layer for layer in model.modules() if isinstance(layer, DiffPruningLayer)}
    expected = [(n, m) for n, m in model.named_modules() if m not in inner or m in base or m in layers]
    assert list(outer_modules(model)) == expected
    assert layers_in(model, DiffPruningLayer) == [m for _, m in expected if isinstance(m, DiffPruningLayer)]
