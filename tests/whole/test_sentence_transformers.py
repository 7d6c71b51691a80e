"""sentence-transformers' trainer: an adapter inside a SentenceTransformer, through all phases."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningModel

sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(56))]


@pytest.fixture
def encoder(tmp_path):
    """A small encoder with mean pooling, from files as users have them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "bert")
    return sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")


def test_an_adapter_in_a_sentence_transformer_goes_through_all_phases(encoder, tmp_path):
    rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 1} w{i + 2}"} for i in range(50)]
    encoder.add_adapter(DiffPruningConfig(target_density=0.05))
    before = encoder.encode(["w1 w2"])
    settings = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=16,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=encoder,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        loss=losses.MultipleNegativesRankingLoss(encoder),
        callbacks=[DiffPruningCallback(gating_steps=8)],
    )
    trainer.train()
    tuner = DiffPruningModel.of(encoder)
    assert (tuner.phase(), tuner.num_nonzeros()) == ("fixmask", round(0.05 * tuner.num_base_parameters()))
    after = encoder.encode(["w1 w2"])
    assert abs(before - after).max() > 1e-4
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(again.encode(["w1 w2"]) - after).max() == 0
