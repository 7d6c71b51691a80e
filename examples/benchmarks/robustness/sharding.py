"""Shards beside replicas: DistributedDataParallel, FSDP2 and DeepSpeed's ZeRO in the stock Trainer, in two processes.

    python examples/benchmarks/robustness/sharding.py --output runs/sharding    # ten minutes, two cores
    pip install deepspeed                                                       # for the rows of ZeRO

Small random models train for sixteen steps: through gating, pruning and fixmask, or in fixmask alone (ZeRO). Each run
is made once more from a checkpoint in gating and one in fixmask. The table shows how far loss and saved values are from
those under DistributedDataParallel, and whether resumed runs end with the same bits. Accelerate turns FSDP and
DeepSpeed on only where there are GPUs; on CPUs this script tells it that there are processes to shard over, and gloo
carries what they send. The other settings of FSDP2 are those of examples/configs/fsdp2.yaml.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import accelerate
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from benchmarks.shared.processes import run_in_processes
from benchmarks.shared.report import markdown
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.files import parameter_shapes, read_adapter
from diffpeft.sparse.diff import Diff

STEPS, GATING, CHECKPOINTS = 16, 8, (4, 12)
KINDS = ("ddp", "fsdp2", "fsdp2-sharded", "zero1", "zero2")
MODELS = {"bert": "BertLayer", "llama": "LlamaDecoderLayer", "llama-tied": "LlamaDecoderLayer"}
"""The models, and the class that each has its units of."""
CONFIG = Path(__file__).parents[2] / "configs" / "fsdp2.yaml"


def make_base(model: str) -> PreTrainedModel:
    """A small random model without dropout; 51 rows and 33 columns do not divide by two."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 51, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if model == "bert":
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        return BertForSequenceClassification(
            BertConfig(**sizes, intermediate_size=33, max_position_embeddings=16, **dropout)
        )
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=33, tie_word_embeddings=model == "llama-tied"))


def shard_on_cpus(kind: str, model: str) -> dict[str, Any]:
    """Make Accelerate shard over CPU processes; return the Trainer's arguments for that."""
    if kind == "ddp":
        return {"use_cpu": True}
    fsdp = kind.startswith("fsdp2")
    wrapped = AcceleratorState if fsdp else PartialState
    plain = wrapped.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if not fsdp:
            ranks = {"num_processes": "WORLD_SIZE", "process_index": "RANK", "local_process_index": "LOCAL_RANK"}
            PartialState._shared_state.update({name: int(os.environ[word]) for name, word in ranks.items()})
        elif self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            settings = yaml.safe_load(CONFIG.read_text())["fsdp_config"]
            state_dict = "SHARDED_STATE_DICT" if kind == "fsdp2-sharded" else settings["fsdp_state_dict_type"]
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=settings["fsdp_version"],
                reshard_after_forward=settings["fsdp_reshard_after_forward"],
                auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
                transformer_cls_names_to_wrap=[MODELS[model]],
                cpu_ram_efficient_loading=settings["fsdp_cpu_ram_efficient_loading"],
                state_dict_type=state_dict,
            )

    wrapped.__init__ = init  # type: ignore[method-assign]
    if fsdp:
        return {"use_cpu": True}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = {"zero_optimization": {"stage": int(kind[-1])}, "zero_allow_untested_optimizer": True}
    automatic = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    return {"deepspeed": {**settings, **automatic}}


def train(options: argparse.Namespace) -> None:
    """Train in one of the processes."""
    kind, folder, checkpoint = options.train, options.folder, options.checkpoint
    launch = shard_on_cpus(kind, options.model)
    base = make_base(options.model)
    task = "SEQ_CLS" if options.model == "bert" else "CAUSAL_LM"
    # Under FSDP2, a checkpoint in fixmask is resumed by a model that was made of it.
    file = None if checkpoint is None else Path(checkpoint) / "adapter_config.json"
    if file is not None and file.exists() and json.loads(file.read_text())["nnz_pattern"] and kind.startswith("fsdp2"):
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    else:
        config = DiffPruningConfig(task_type=task, target_density=0.05, init_weights=not options.fixmask)
        config.selection = "magnitude" if options.fixmask else "gates"
        model = get_peft_model(base, config, low_cpu_mem_usage=kind.startswith("fsdp2") and not options.fixmask)
        if options.fixmask:
            model.base_model.magnitude_prune()
    ids = torch.randint(50, (64, 6))
    rows = [{"input_ids": row, "labels": i % 2 if options.model == "bert" else row} for i, row in enumerate(ids)]
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=CHECKPOINTS[0],
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=options.gradient_checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": options.gradient_checkpointing == "reentrant"},
        average_tokens_across_devices=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **launch,
    )
    callback = DiffPruningCallback(gating_steps=0 if options.fixmask else GATING)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=checkpoint)
    adapter = folder / "adapter"
    if kind == "fsdp2-sharded":
        state = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_world_process_zero():
            trainer.model.save_pretrained(adapter, state_dict=state)
    else:
        trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        kinds = trainer.accelerator.distributed_type, trainer.accelerator.num_processes
        (folder / "found.json").write_text(json.dumps({"losses": losses, "type": kinds[0], "processes": kinds[1]}))
    trainer.accelerator.wait_for_everyone()  # nobody leaves while a gather is still being cleaned up
    trainer.accelerator.end_training()  # or the process that ends last may find the others gone, and abort


def launch(kind: str, model: str, folder: Path, *more: str) -> dict[str, Any]:
    """Train in two processes; return their losses and kind, and the diff that they saved."""
    run_in_processes(2, __file__, "--train", kind, "--model", model, "--folder", str(folder), *more)
    found = json.loads((folder / "found.json").read_text())
    return {**found, "diff": read_adapter(folder / "adapter", parameter_shapes(make_base(model)))[1]}


def difference(diff: Diff, other: Diff) -> tuple[bool, float]:
    """Whether two diffs have the same positions, and if so the largest difference of a value."""
    same = diff.keys() == other.keys() and all(torch.equal(diff[key][0], other[key][0]) for key in diff)
    return same, max(float((diff[key][1] - other[key][1]).abs().max()) for key in diff) if same else float("nan")


def compare(folder: Path, kinds: Sequence[str], models: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Train in all ways; return the rows of the table, and the ways that did not resume exactly."""
    rows, different = [], []
    runs = [(model, False) for model in models] + ([("bert", True)] if "bert" in models else [])
    for model, fixmask in runs:
        plain: dict[str, Any] = {}
        for kind in kinds:
            phases = "fixmask" if fixmask else "all phases"
            if kind.startswith("zero") and (not fixmask or importlib.util.find_spec("deepspeed") is None):
                if fixmask:
                    rows.append([model, phases, kind, "deepspeed is not installed", "", "", ""])
                continue
            place, more = folder / f"{model}-{kind}-{phases[:3]}", ["--fixmask"] if fixmask else []
            unbroken = launch(kind, model, place, *more)
            plain = plain or unbroken
            positions, far = difference(unbroken["diff"], plain["diff"])
            cells = []
            for step in CHECKPOINTS:
                again = launch(
                    kind, model, Path(f"{place}-{step}"), *more, "--checkpoint", f"{place}/checkpoint-{step}"
                )
                same = difference(again["diff"], unbroken["diff"]) == (True, 0.0)
                cells.append("yes" if same else "no")
                different += [] if same else [f"{model} {kind} {step}"]
            how = "as DDP" if positions else "others"
            rows.append([model, phases, kind, f"{unbroken['losses'][-1]:.6f}", how, f"{far:.1e}", *cells])
    return rows, different


def main() -> None:
    """Train in all ways, compare, show and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where sharding.md goes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--train", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), default="bert", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fixmask", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--gradient_checkpointing", choices=("reentrant", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options)
        sys.stdout.flush()
        sys.stderr.flush()
        # gloo's threads may still hold tensors that Python has, and abort the process if they let go of them while the
        # interpreter ends (pytorch/pytorch#179291). All is written, so the process leaves without that.
        os._exit(0)
    with tempfile.TemporaryDirectory() as scratch:
        rows, different = compare(Path(scratch), options.kinds, options.models)
    header = (
        "model",
        "trained",
        "two processes under",
        "loss of the last step",
        "positions",
        "farthest from DDP's values",
        *(f"resumed from step {step}: the same bits" for step in CHECKPOINTS),
    )
    packages = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    print(text := f"{packages}\n\n{markdown(header, rows)}\n")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "sharding.md").write_text(text)
    if different:
        raise SystemExit(f"{different} did not resume exactly")


if __name__ == "__main__":
    main()
