import pytest
from safetensors.torch import load_file
from trainers import Rows, arguments, make_trainer
from transformers import Trainer


def test_reporters_get_the_adapters_state(tiny_bert, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(tiny_bert, tmp_path, max_steps=4, report_to="tensorboard")
    trainer.train()
    written = accumulator.EventAccumulator(str(tmp_path / "logs"))
    written.Reload()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("expected_density", "nnz", "l0_penalty", "adapter_bytes"):
        found = {event.step: event.value for event in written.Scalars(f"train/diffpruning/{name}")}
        assert found == pytest.approx({entry["step"]: entry[f"diffpruning/{name}"] for entry in entries})
    phases = [event.tensor_proto.string_val[0] for event in written.Tensors("train/diffpruning/phase/text_summary")]
    assert phases == [b"gating", b"fixmask", b"fixmask", b"fixmask"]
    rates = {event.step: event.value for event in written.Scalars("train/learning_rate")}
    assert rates == pytest.approx({entry["step"]: entry["learning_rate"] for entry in entries})


def test_the_logged_penalty_is_the_configs_form(tiny_bert, tmp_path):
    config = {"l0_lambda": 1e-7, "group_penalty": "additive"}
    trainer = make_trainer(tiny_bert, tmp_path, max_steps=4, config=config)
    groups = sum(1 for name, _ in trainer.model.named_parameters() if "group_log_alpha" in name)
    trainer.train()
    entry = trainer.state.log_history[0]
    tuner = trainer.model.base_model
    expected = entry["diffpruning/expected_density"] * tuner.num_base_parameters()
    assert entry["diffpruning/l0_penalty"] > expected + 0.9 * groups


def test_logs_of_other_models_are_left_alone(tiny_bert, tmp_path):
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path, max_steps=2), train_dataset=Rows())
    trainer.train()
    assert not any("diffpruning" in key for entry in trainer.state.log_history for key in entry)


def test_the_bar_shows_phase_density_and_size(tiny_bert, tmp_path, capsys):
    trainer = make_trainer(tiny_bert, tmp_path, disable_tqdm=False)
    trainer.train()
    shown = capsys.readouterr().err
    assert "gating: " in shown
    assert "fixmask: " in shown
    assert "density 2.00%, 0.0 MB" in shown
    assert "16/16" in shown


def test_the_bar_of_other_models_is_left_alone(tiny_bert, tmp_path, capsys):
    Trainer(tiny_bert(), arguments(tmp_path, max_steps=2, disable_tqdm=False), train_dataset=Rows()).train()
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "gating" not in shown


def test_bytes_are_those_of_the_file(tiny_bert, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path)
    tuner = trainer.model.base_model
    before = tuner.adapter_bytes()
    assert before > 4 * 0.95 * tuner.num_base_parameters()
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    size = sum(t.numel() * t.element_size() for key, t in tensors.items() if "diffpruning" in key)
    assert tuner.adapter_bytes() == size == trainer.state.log_history[-2]["diffpruning/adapter_bytes"]
