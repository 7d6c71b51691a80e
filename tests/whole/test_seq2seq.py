"""Seq2SeqTrainer: an encoder-decoder through all three phases, evaluated by what it generates."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig

tokenizers = pytest.importorskip("tokenizers")

PAD, END, WORDS = 0, 1, 20


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=PAD, dropout_rate=0.0))


def rows(count):
    """Answer with the first token, twice."""
    words = torch.randint(2, WORDS, (count, 3), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": [*row, END], "labels": [row[0], row[0], END]} for row in words]


def right(prediction):
    return {"right": float((prediction.predictions[:, 1:3] == prediction.label_ids[:, :2]).all(1).mean())}


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, "</s>": END, **{f"w{i}": i for i in range(2, WORDS)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


def test_what_is_generated_gets_right_and_stays_so_from_the_file(tokenizer, tmp_path):
    model = get_peft_model(t5(), DiffPruningConfig(task_type="SEQ_2_SEQ_LM", target_density=0.2))
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=160,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=80,
        predict_with_generate=True,
        generation_max_length=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data, collator = rows(256), DataCollatorForSeq2Seq(tokenizer)
    trainer = Seq2SeqTrainer(
        model, args, collator, data, data[:64], tokenizer, compute_metrics=right, callbacks=[DiffPruningCallback()]
    )
    before = trainer.evaluate()["eval_right"]
    trainer.train()
    after = trainer.evaluate()["eval_right"]
    assert model.base_model.phase() == "fixmask"
    assert before < 0.1
    assert after > 0.9
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(t5(), tmp_path / "adapter")
    ids = torch.tensor([row["input_ids"] for row in data[:64]])
    answers = [one.eval().generate(input_ids=ids, max_length=4) for one in (model, loaded, loaded.merge_and_unload())]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
