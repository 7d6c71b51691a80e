"""The configuration: what it refuses, that it survives JSON, and that PEFT knows the method."""

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import pydoc
import re

import pytest
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from transformers import trainer

import diffpeft
from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningModel
from diffpeft.trainer.logs import DiffPruningLogCallback

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value", "shown", "remedy"),
    [
        ("target_density", 0.0, r"target_density=0.0 leaves nothing", r"use 0 < target_density <= 1"),
        ("target_density", -0.1, r"target_density=-0.1 leaves nothing", r"use 0 < target_density <= 1"),
        ("target_density", 1.5, r"target_density=1.5 is no share", r"use 0 < target_density <= 1"),
        ("target_density", NAN, r"target_density=nan is no share", r"use 0 < target_density <= 1"),
        ("stretch", (0.0, 1.5), r"stretch=\(0.0, 1.5\)", r"use l < 0 and r > 1, e.g. \(-1.5, 1.5\)"),
        ("stretch", (-1.5, 1.0), r"stretch=\(-1.5, 1.0\)", r"use l < 0 and r > 1, e.g. \(-1.5, 1.5\)"),
        ("stretch", (NAN, 1.5), r"stretch=\(nan, 1.5\)", r"use l < 0 and r > 1, e.g. \(-1.5, 1.5\)"),
        ("group_penalty", "sum", r"group_penalty='sum'", r"use one of \('product', 'additive'\)"),
        ("l0_lambda", "none", r"l0_lambda='none'", r"use 'auto' or a finite number of at least 0"),
        ("l0_lambda", None, r"l0_lambda=None", r"use 'auto' or a finite number of at least 0"),
        ("target_density", "0.5", r"target_density='0.5' is no number", r"use 0 < target_density <= 1"),
        ("stretch", (-1, 1.2, 3), r"stretch=\(-1, 1.2, 3\) is no pair", r"use l < 0 and r > 1"),
        ("stretch", None, r"stretch=None is no pair", r"use l < 0 and r > 1"),
        ("stretch", (-INF, 1.5), r"stretch=\(-inf, 1.5\) is not finite", r"use l < 0 and r > 1"),
        ("init_log_alpha", NAN, r"init_log_alpha=nan", r"use a finite number"),
        ("l0_lambda", -1e-7, r"l0_lambda=-1e-07", r"use 'auto' or a finite number of at least 0"),
        ("l0_lambda", INF, r"l0_lambda=inf", r"use 'auto' or a finite number of at least 0"),
        ("l0_lambda", NAN, r"l0_lambda=nan", r"use 'auto' or a finite number of at least 0"),
        ("gate_learning_rate", 0.0, r"gate_learning_rate=0.0", r"use a positive number or None"),
        ("gate_learning_rate", -0.1, r"gate_learning_rate=-0.1", r"use a positive number or None"),
        ("gate_learning_rate", INF, r"gate_learning_rate=inf", r"use a positive number or None"),
        ("gate_learning_rate", NAN, r"gate_learning_rate=nan", r"use a positive number or None"),
        ("init_log_alpha", 2e3, r"init_log_alpha=2000.0 is farther", r"use at most 1000"),
        ("value_dtype", "int4", r"value_dtype='int4' is not known", r"use one of .*'int8'"),
        ("layers_pattern", "layer", r"layers_pattern='layer' does nothing without", r"set both or neither"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_value_and_a_remedy(field, value, shown, remedy):
    with pytest.raises(ValueError, match=f"{shown}.*{remedy}"):
        DiffPruningConfig(**{field: value}, low_memory=value == 2e3)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"selection": "magnitude"}, "selection='magnitude' and l0_lambda='auto'"),
        ({"l0_lambda": 1e-7}, "selection='gates' and l0_lambda=1e-07"),
    ],
)
def test_the_low_memory_mode_is_for_gates_under_the_automatic_penalty(fields, shown):
    with pytest.raises(ValueError, match=f"not for {shown}; use selection='gates' and l0_lambda='auto'"):
        DiffPruningConfig(low_memory=True, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_density": 1.0},
        {"target_density": 1},
        {"l0_lambda": 0},
        {"l0_lambda": 1.25e-7, "gate_learning_rate": 0.1, "group_penalty": "additive"},
        {"stretch": (-0.1, 1.1)},
        {"layers_to_transform": [0], "layers_pattern": "layer"},
    ],
    ids=str,
)
def test_the_edges_of_what_makes_sense_are_accepted(fields):
    config = DiffPruningConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("fields", [{"selection": "magnitude"}, {"nnz_pattern": {"dense.weight": 3}}], ids=str)
def test_stretch_does_not_matter_without_gates(fields):
    assert DiffPruningConfig(stretch=(0.0, 1.0), **fields).stretch == (0.0, 1.0)


def test_target_modules_are_a_set_as_in_pefts_own_configs():
    for modules in ({"value", "query"}, ("value", "query"), ["query", "value"]):
        config = DiffPruningConfig(target_modules=modules)
        assert config.target_modules == {"value", "query"}
        assert config.to_dict()["target_modules"] == ["query", "value"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "task_type": "SEQ_CLS",
            "target_modules": {"query", "value"},
            "exclude_modules": ["pooler"],
            "modules_to_save": ["classifier"],
            "layers_to_transform": [0, 1],
            "layers_pattern": "layer",
            "target_density": 0.01,
            "selection": "gates",
            "structured": False,
            "group_penalty": "additive",
            "l0_lambda": 1.25e-7,
            "gate_learning_rate": 0.1,
            "stretch": (-0.1, 1.1),
            "init_log_alpha": 4.0,
            "init_weights": False,
            "nnz_pattern": {"encoder.weight": 7, "norm.bias": 1},
            "value_dtype": "int8",
        },
    ],
    ids=["defaults", "everything set"],
)
@pytest.mark.parametrize("loader", [DiffPruningConfig, PeftConfig])
def test_json_gives_back_the_same_configuration(tmp_path, loader, fields):
    config = DiffPruningConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is DiffPruningConfig
    assert dataclasses.asdict(loaded) == dataclasses.asdict(config)
    assert isinstance(loaded.stretch, tuple)
    assert loaded.peft_type is PeftType.DIFFPRUNING


def test_json_names_the_method(tmp_path):
    DiffPruningConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DIFFPRUNING"


def test_peft_type_is_a_member_like_any_other():
    member = PeftType.DIFFPRUNING
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert member is PeftType("DIFFPRUNING") is PeftType["DIFFPRUNING"] is PeftType.__members__["DIFFPRUNING"]
    assert (member.name, member.value, member.value.lower()) == ("DIFFPRUNING", "DIFFPRUNING", "diffpruning")
    assert member == "DIFFPRUNING"
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(list(PeftType))
    assert member != PeftType.LORA
    assert {PeftType.LORA: 1, member: 2}[PeftType("DIFFPRUNING")] == 2
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "DIFFPRUNING")


def test_peft_type_survives_copying_and_pickling():
    for member in (PeftType.DIFFPRUNING, DiffPruningConfig().peft_type):
        assert copy.copy(member) is copy.deepcopy(member) is PeftType.DIFFPRUNING
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(member, protocol)) is PeftType.DIFFPRUNING


def test_importing_again_changes_nothing():
    members = list(PeftType)
    for module in (diffpeft.tuner.registration, diffpeft):
        importlib.reload(module)
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DIFFPRUNING] is DiffPruningConfig is diffpeft.DiffPruningConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DIFFPRUNING] is DiffPruningModel
    assert trainer.DEFAULT_CALLBACKS.count(DiffPruningLogCallback) == 1


def test_peft_builds_the_tuner_of_the_configuration(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(task_type="SEQ_CLS"))
    assert type(model.base_model) is DiffPruningModel
    assert model.active_peft_config.peft_type is PeftType.DIFFPRUNING
    model(**batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", [DiffPruningConfig, DiffPruningCallback])
def test_help_names_and_describes_every_field(kind):
    shown = " ".join(pydoc.plain(pydoc.render_doc(kind)).replace("|", " ").split())
    if kind is DiffPruningConfig:
        own = {one.name: one.metadata["help"] for one in dataclasses.fields(kind) if "decides_run" in one.metadata}
        assert {"target_modules", "target_density", "selection", "low_memory", "value_dtype"} <= own.keys()
        assert all(f" {name}: {about}" in shown for name, about in own.items())
    else:
        told = shown.partition(" Args: ")[2].partition(" Raises: ")[0]
        names = list(inspect.signature(kind).parameters)
        assert all(re.search(rf"(^| ){name}: \w", told) for name in names), names
