import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import Rows, arguments, make_trainer
from transformers import Trainer, trainer

from diffpeft.trainer import logs

ROOT = Path(__file__).parents[2]


def test_reporters_get_the_adapters_state(tiny_bert, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(tiny_bert, tmp_path, max_steps=4, report_to="tensorboard")
    trainer.train()
    written = accumulator.EventAccumulator(str(tmp_path / "logs"))
    written.Reload()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    ours = [{key.removeprefix("diffpruning/") for key in entry if "diffpruning/" in key} for entry in entries]
    assert ours == [{"phase", "expected_density", "nnz"}] + [{"phase", "nnz"}] * 3
    for name, count in (("expected_density", 1), ("nnz", 4)):
        found = {event.step: event.value for event in written.Scalars(f"train/diffpruning/{name}")}
        assert found == pytest.approx({entry["step"]: entry[f"diffpruning/{name}"] for entry in entries[:count]})
    phases = [event.tensor_proto.string_val[0] for event in written.Tensors("train/diffpruning/phase/text_summary")]
    assert phases == [b"gating", b"fixmask", b"fixmask", b"fixmask"]
    rates = {event.step: event.value for event in written.Scalars("train/learning_rate")}
    assert rates == pytest.approx({entry["step"]: entry["learning_rate"] for entry in entries})


def test_logs_of_other_models_are_left_alone(tiny_bert, tmp_path):
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path, max_steps=2), train_dataset=Rows())
    trainer.train()
    assert not any("diffpruning" in key for entry in trainer.state.log_history for key in entry)


def test_installing_again_changes_nothing():
    logs.install()
    assert trainer.DEFAULT_CALLBACKS.count(logs.DiffPruningLogCallback) == 1
    assert trainer.DEFAULT_PROGRESS_CALLBACK is trainer.ProgressCallback, "the progress bar is transformers' own"


def test_the_trainer_is_imported_when_a_name_first_needs_it():
    script = """
import sys, diffpeft
assert "transformers.trainer" not in sys.modules and "diffpeft.tools.extract" not in sys.modules
from diffpeft import DiffPruningCallback
from transformers import trainer
assert [callback.__name__ for callback in trainer.DEFAULT_CALLBACKS][-1] == "DiffPruningLogCallback"
assert dir(diffpeft) == sorted(diffpeft.__all__) and all(hasattr(diffpeft, name) for name in diffpeft.__all__)
assert not hasattr(diffpeft, "no_such_name")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
