"""Fixmask in two processes: plain DistributedDataParallel beside FSDP2 and DeepSpeed's ZeRO, all in the stock Trainer.

    python examples/benchmarks/robustness/sharding.py --output runs/sharding     # two minutes, two cores
    pip install deepspeed                                                        # for the rows of ZeRO

A pruned diff on a small random BERT trains for eight steps, with a checkpoint after four, and once more from that
checkpoint. The table shows how far the loss and the saved values are from those under DistributedDataParallel, and
whether the resumed run ends with the same bits. Accelerate turns FSDP and DeepSpeed on only where there are GPUs; on
CPUs this script tells it that there are processes to shard over, and gloo carries what they send.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import accelerate
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from benchmarks.shared.processes import run_in_processes
from benchmarks.shared.report import markdown
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig

STEPS, HALF = 8, 4
KINDS = ("ddp", "fsdp2", "zero1", "zero2")
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def shard_on_cpus(kind: str) -> dict[str, Any]:
    """Make Accelerate shard over CPU processes; return the Trainer's arguments for that."""
    if kind == "ddp":
        return {"use_cpu": True}
    wrapped = AcceleratorState if kind == "fsdp2" else PartialState
    plain = wrapped.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if kind != "fsdp2":
            ranks = {"num_processes": "WORLD_SIZE", "process_index": "RANK", "local_process_index": "LOCAL_RANK"}
            PartialState._shared_state.update({name: int(os.environ[word]) for name, word in ranks.items()})
        elif self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT"
            )

    wrapped.__init__ = init  # type: ignore[method-assign]
    if kind == "fsdp2":
        return {"use_cpu": True}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = {"zero_optimization": {"stage": int(kind[-1])}, "zero_allow_untested_optimizer": True}
    automatic = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    return {"deepspeed": {**settings, **automatic}}


def train(kind: str, folder: Path, checkpoint: str | None) -> None:
    """Train in fixmask, in one of the processes."""
    launch = shard_on_cpus(kind)
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=16))
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=0.05, selection="magnitude", init_weights=False)
    model = get_peft_model(base, config)
    model.base_model.magnitude_prune()
    rows = [{"input_ids": torch.randint(50, (6,)), "labels": row % 2} for row in range(64)]
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=HALF,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **launch,
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[DiffPruningCallback(gating_steps=0)])
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "adapter"))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        kinds = trainer.accelerator.distributed_type, trainer.accelerator.num_processes
        (folder / "found.json").write_text(json.dumps({"losses": losses, "type": kinds[0], "processes": kinds[1]}))
    trainer.accelerator.wait_for_everyone()  # nobody leaves while a gather is still being cleaned up
    trainer.accelerator.end_training()  # or the process that ends last may find the others gone, and abort


def launch(kind: str, folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train in two processes; return their losses and kind, and the tensors that they saved."""
    more = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
    run_in_processes(2, __file__, "--train", kind, "--folder", str(folder), *more)
    found = json.loads((folder / "found.json").read_text())
    return {**found, "tensors": load_file(folder / "adapter" / "adapter_model.safetensors")}


def largest_difference(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest difference of a value between two adapters."""
    values = ((tensor, others[key]) for key, tensor in tensors.items() if tensor.is_floating_point())
    return max(float((tensor - other).abs().max()) for tensor, other in values)


def compare(folder: Path) -> tuple[list[list[str]], list[str]]:
    """Train in all ways; return the rows of the table, and the ways that did not resume exactly."""
    rows, different = [], []
    plain: dict[str, Any] = {}
    for kind in KINDS:
        if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            rows.append([kind, "deepspeed is not installed", "", ""])
            continue
        unbroken = launch(kind, folder / kind)
        resumed = launch(kind, folder / f"{kind}-again", folder / kind / f"checkpoint-{HALF}")
        plain = plain or unbroken["tensors"]
        far = largest_difference(unbroken["tensors"], plain)
        same = all(torch.equal(tensor, resumed["tensors"][key]) for key, tensor in unbroken["tensors"].items())
        different += [] if same else [kind]
        name = f"{kind} ({unbroken['type']}, {unbroken['processes']} processes)"
        rows.append([name, f"{unbroken['losses'][-1]:.6f}", f"{far:.1e}", "yes" if same else "no"])
    return rows, different


def main() -> None:
    """Train in all ways, compare, show and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where sharding.md goes")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.folder, options.checkpoint)
        sys.stdout.flush()
        sys.stderr.flush()
        # gloo's threads may still hold tensors that Python has, and abort the process if they let go of them while the
        # interpreter ends (pytorch/pytorch#179291). All is written, so the process leaves without that.
        os._exit(0)
    with tempfile.TemporaryDirectory() as scratch:
        rows, different = compare(Path(scratch))
    header = (
        "two processes under",
        "loss of the last step",
        "farthest from DDP's values",
        "resumed from half: the same bits",
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
