from safetensors.torch import load_file
from trainers import Rows, arguments, make_trainer
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from diffpeft import DiffPruningCallback


def test_reporters_get_the_adapters_state(tiny_bert, tmp_path):
    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            written.setdefault(name, []).append((step, value))

        def add_text(self, *args, **kwargs):
            pass

        add_hparams = flush = close = add_text

    class Reporter(TensorBoardCallback):
        def __init__(self):
            super().__init__(tb_writer=Writer())

    trainer = make_trainer(tiny_bert, tmp_path, max_steps=4)
    # Where `report_to` puts a reporter: after the default callbacks, before the user's.
    callbacks = trainer.callback_handler.callbacks
    position = next(i for i, c in enumerate(callbacks) if isinstance(c, DiffPruningCallback))
    callbacks.insert(position, Reporter())
    trainer.train()
    steps = [step for step, _ in written["train/diffpruning/expected_density"]]
    assert steps == [1, 2, 3, 4]


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
