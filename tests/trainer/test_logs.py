import pytest
from trainers import Rows, arguments, make_trainer
from transformers import Trainer, trainer

from diffpeft.trainer import logs


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
