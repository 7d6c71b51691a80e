"""Keys of an adapter's file and names in the base model belong together."""

import pytest
import torch

from diffpeft.files.keys import base_model_key, diff_keys, file_key, heads_of, owners, parameter_and_kind


@pytest.mark.parametrize(
    ("name", "wrapped", "values"),
    [
        ("a.b.weight", {"a.b"}, "base_model.model.a.b.diffpruning_values.weight"),
        ("a.b.weight", {"a", "a.b"}, "base_model.model.a.base_layer.b.diffpruning_values.weight"),
        ("scale", {""}, "base_model.model.root_parameters.diffpruning_values.scale"),
    ],
)
def test_a_parameters_keys_lead_back_to_it(name, wrapped, values):
    keys = diff_keys(name, wrapped)
    assert keys == (values, values.replace("_values", "_positions"))
    assert [parameter_and_kind(key) for key in keys] == [(name, "diffpruning_values"), (name, "diffpruning_positions")]


def test_heads_are_what_is_no_diff():
    tensor, key = torch.zeros(1), file_key("a.head.bias", {"a"})
    assert base_model_key(key) == "a.head.bias"
    tensors = {key: tensor, "head.modules_to_save.default.weight": tensor, diff_keys("a.b")[0]: tensor}
    assert heads_of(tensors).keys() == {"a.head.bias", "head.weight"}


def test_the_owner_of_a_models_own_parameter_is_the_model():
    assert owners(["a.b.weight", "a.b.bias", "scale"]) == {"a.b", ""}
