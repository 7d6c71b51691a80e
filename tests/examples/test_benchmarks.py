"""The benchmarks of time and memory run, on a tiny model; what can be told beforehand of what they find."""

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.shared import models, training
from benchmarks.shared.memory import allocations
from benchmarks.speed import compare, memory, pruning, scaling, serving, step_cost, task_switch

pytestmark = pytest.mark.filterwarnings("ignore")

TIMES = ["--repeats", "1", "--warmup", "0"]
SHORT = ["--model", "tiny", "--batch_size", "2", "--length", "8"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A few thousand parameters, on as many threads as before."""
    monkeypatch.setitem(models.SHAPES, "tiny", (2, 16, 2))
    monkeypatch.setattr(models, "VOCABULARY", 100)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def options(script, monkeypatch, *words):
    """The options, as the script's main parses them."""
    kept = []
    monkeypatch.setattr(script, "begin", lambda found: kept.append(found) or exit())
    with pytest.raises(SystemExit):
        script.main(list(words))
    return kept[0]


def test_step_cost_and_its_picture(tmp_path):
    step_cost.main([*SHORT, *TIMES, "--densities", "0.01", "0.1", "--json", str(tmp_path / "step.json")])
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "full",
        "gating",
        "full",
        "gating-low-memory",
        *2 * list(step_cost.BESIDE_LORA),
    ]
    trainable = {(row["density"], row["method"]): row["trainable"] for row in rows}
    for density in (0.01, 0.1):  # as many parameters, except for the rounding in each layer
        assert trainable[density, "shira"] == trainable[density, "lora"]
        assert trainable[density, "fixmask-linear"] == pytest.approx(trainable[density, "lora"], abs=1)
        assert trainable[density, "supertuning"] == pytest.approx(trainable[density, "lora"], abs=12)
    words = ["--step", str(tmp_path / "step.json"), "--step_densities", str(tmp_path / "step.json")]
    scaling.main([*words, "--output", str(tmp_path / "scaling.png")])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_memory_of_full_fine_tuning(monkeypatch):
    found = memory.tensors("tiny", "full", 0.0, options(memory, monkeypatch, *SHORT))
    parameters = models.count_parameters("tiny")
    assert found["trainable"] == parameters
    # Weights and two moments; batches, counters and the position buffers beside them.
    assert 12 * parameters < found["state"] < 12 * parameters + 40_000
    assert found["peak"] > found["state"] + 4 * parameters
    assert found["backward"] > 0


def test_memory_is_that_of_the_tensors():
    with allocations("cpu") as found:
        kept = torch.zeros(1000)
        torch.zeros(500).exp()
    assert kept.nbytes <= found.left < kept.nbytes + 200
    assert 8000 <= found.peak < 8500


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process(monkeypatch):
    found = memory.process("tiny", "fixmask-linear", 0.1, options(memory, monkeypatch, *SHORT))
    assert found.keys() == {"first", "resident"}


def test_variants_of_gating(monkeypatch):
    monkeypatch.setitem(training.GATING, "gating-unstructured", {"structured": False})
    model = training.make_model("tiny", "gating-unstructured", 0.1, torch.float32, torch.device("cpu"))
    assert model.base_model.phase() == "gating"
    assert not model.peft_config["default"].structured


def test_serving(tmp_path, monkeypatch):
    serving.main(["--model", "tiny", "--batch_sizes", "2", "--length", "8", *TIMES, "--json", str(tmp_path / "a.json")])
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 5 + 2 + 8 + 8


def test_task_switch(tmp_path, monkeypatch):
    monkeypatch.setitem(
        task_switch.MODELS, "tiny", lambda dtype: task_switch.BertModel(models.bert_config("tiny")).to(dtype)
    )
    words = ["--models", "tiny", "--dtypes", "float32", "--repeats", "1", "--json", str(tmp_path / "a.json")]
    task_switch.main(words)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(task_switch.WAYS)
    assert [row["largest_drift_of_the_base"] == 0 for row in rows[1:]] == [True, True]


def test_serving_refuses_wrong_outputs():
    right = torch.ones(4)
    serving.check(right * (1 + 1e-6), right, "rounded")
    for wrong, exactly in ((right * 1.01, False), (right * (1 + 1e-6), True)):
        with pytest.raises(SystemExit, match="wrong output"):
            serving.check(wrong, right, "changed", exactly)


def test_pruning(monkeypatch):
    found = options(pruning, monkeypatch, "--model", "tiny", *TIMES)
    sizes = {**pruning.timed("tiny", found), **pruning.tensors("tiny", found)}
    assert pruning.row("tiny", sizes)["tensors_mb"] > 0


def test_checkouts_are_timed_in_turn(tmp_path):
    root = str(Path(__file__).parents[2])
    words = ["--actions", "gating", "mixed_8x1", "--model", "tiny", "--repeats", "1", "--times", "2"]
    compare.main([root, root, *words, "--json", str(tmp_path / "compare.json")])
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["action"] for row in rows] == ["gating", "gating", "mixed_8x1", "mixed_8x1"]
    assert [row["ratio"] for row in rows][::2] == [1.0, 1.0]
    assert all(row["ms"] > 0 for row in rows)
