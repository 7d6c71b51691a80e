"""Checks of how the Trainer was launched (docs/distributed.md): FSDP, DeepSpeed, DataParallel, fp16.

The k values of a pruned adapter are ordinary parameters, whatever shards them. Gating is different: gates move by a
rule that looks at all of them, and pruning replaces parameters, which is made for FSDP2's shards and for no others.
"""

from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from diffpeft.gates.update.in_backward import check_low_memory

STEP_IN_BACKWARD = ("lomo", "adalomo")
"""Optimizers of the Trainer that update in the backward pass, beside those whose names end in "_layerwise"."""


def check_launch(args: TrainingArguments, gating: bool, warmup: float, low_memory: bool = False) -> None:
    """Raise ValueError for ways to launch the Trainer in which gates or values would train wrongly.

    It matters whether gates are learned, perhaps in the low-memory mode, and whether fixmask has a warm-up of its own.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name in STEP_IN_BACKWARD or name.endswith("_layerwise"):
        raise ValueError(f"optim={name!r} steps before gates do; use adamw_torch or DiffPruningConfig(low_memory=True)")
    if low_memory:
        check_low_memory()
    if args.n_gpu > 1:
        raise ValueError(f"nn.DataParallel cannot run diffs; launch with torchrun --nproc_per_node {args.n_gpu}")
    if args.fp16 and not args.max_grad_norm:
        raise ValueError(f"fp16 with max_grad_norm={args.max_grad_norm} leaves gradients scaled; clip, or use bf16")
    # Accelerate alone knows what came of its config, the environment and the Trainer's arguments.
    if not AcceleratorState._shared_state:
        return
    state: Any = AcceleratorState()
    kind = state.distributed_type
    if kind == DistributedType.FSDP:
        _check_fsdp(state.fsdp_plugin, gating)
        if gating and args.torch_compile:
            raise ValueError("gating under FSDP2 cannot be compiled; set torch_compile=False")
    elif kind == DistributedType.DEEPSPEED:
        stage = state.deepspeed_plugin.zero_stage
        if stage > 2:
            raise ValueError(f"ZeRO stage {stage} takes base weights away between modules; use stage 1 or 2, or FSDP2")
        if warmup:
            raise ValueError(f"DeepSpeed cannot do fixmask_warmup_steps={warmup}; use warmup_steps of the arguments")
    elif kind == DistributedType.MEGATRON_LM or (kind == DistributedType.XLA and args.fsdp):
        raise ValueError(f"{kind.value} splits the parameters that diffs change; use DistributedDataParallel or FSDP2")
    else:
        return
    if gating and kind != DistributedType.FSDP:
        raise ValueError(f"gating does not work under {kind.value}, which shards what it needs whole")


def is_fsdp() -> bool:
    """Whether Accelerate shards models by FSDP."""
    return bool(AcceleratorState._shared_state) and AcceleratorState().distributed_type == DistributedType.FSDP


def saves_shards() -> bool:
    """Whether FSDP's checkpoints hold shards in place of whole tensors."""
    return is_fsdp() and "SHARDED_STATE_DICT" in str(AcceleratorState().fsdp_plugin.state_dict_type)


def _check_fsdp(plugin: Any, gating: bool) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP version {plugin.fsdp_version} flattens parameters; set fsdp_version: 2")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("positions are buffers, which are lost; set fsdp_cpu_ram_efficient_loading: false")
    dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    if gating and dtype not in (None, torch.float32):
        raise ValueError(
            f"mixed precision under FSDP2 would gather gates in {dtype}, in which they hardly move; set bf16=False (or "
            'mixed_precision: "no"), and load the base model with dtype=torch.bfloat16'
        )
