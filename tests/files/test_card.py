"""The model card that comes with an adapter."""

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model

from diffpeft import DiffPruningConfig
from diffpeft.files.card import update_card

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks for the base on the hub


@pytest.fixture
def model(tiny_bert):
    base = tiny_bert()
    base.name_or_path = base.config._name_or_path = "someone/tiny-bert"
    model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02, init_weights=False))
    model.base_model.magnitude_prune()
    return model


def test_saving_writes_a_card(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/tiny-bert"
    assert card.data.library_name == "peft"
    assert {"diffpeft", "diff-pruning"} <= set(card.data.tags)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    nonzeros = model.base_model.num_nonzeros()
    for text in (f"{nonzeros:,} of its parameters", "density 2.000%", f"{size:,} bytes", "import diffpeft"):
        assert text in card.text
    assert "`bert.encoder.layer.*.attention.self.query.weight`" in card.text
    assert "AutoPeftModelForSequenceClassification.from_pretrained" in card.text


def test_what_a_user_wrote_stays_and_metrics_are_kept(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    config = model.peft_config["default"].to_dict()
    update_card(tmp_path, config, {"accuracy": 0.8675, "f1": 0.9})
    path.write_text(path.read_text() + "\nMy own words.\n")
    model.save_pretrained(tmp_path)
    text = path.read_text()
    assert text.count("<!-- diffpeft: begin -->") == 1
    assert text.count("My own words.") == 1
    assert text.count("| accuracy | 0.8675 |") == 1
    update_card(tmp_path, config, {"loss": 0.5})
    assert "accuracy |" not in path.read_text()
    assert ModelCard.load(path).data.tags.count("diffpeft") == 1


def test_a_checkpoint_in_gating_says_so(tiny_bert, tmp_path):
    get_peft_model(tiny_bert(), DiffPruningConfig()).save_pretrained(tmp_path)
    assert "still in gating" in (tmp_path / "README.md").read_text()


def test_a_directory_is_no_base_model_for_others(tiny_bert, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    get_peft_model(base, DiffPruningConfig()).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.get("base_model") is None
    assert not any("base_model:" in tag for tag in card.data.tags)
