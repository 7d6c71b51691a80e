"""The task head, trained whole, not gated (arXiv 2012.07463, section 2): which modules it is, and whether it is whole."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from diffpeft.config import DiffPruningConfig
from diffpeft.files import seal
from diffpeft.files.seal import PART


def fresh_head(model: nn.Module) -> list[str]:
    """Names of the modules beside the pretrained backbone of a task model, e.g. ["classifier"].

    A model that generates has no fresh head: its output layer is pretrained. Modules without parameters are left out, as
    are models that do not tell where their backbone is.
    """
    if not isinstance(model, PreTrainedModel) or model.can_generate() or model.get_output_embeddings() is not None:
        return []
    prefix = model.base_model_prefix
    children = dict(model.named_children())
    if prefix not in children:
        return []
    return [name for name, child in children.items() if name != prefix and any(True for _ in child.parameters())]


class FileCheck:
    """Compares an adapter with the checksums of its config in the next forward pass of the model, once.

    PEFT's loading compares the file itself, which settles it. transformers' `load_adapter` shows nobody the file, and casts
    heads to the dtype of the model: of heads that it has rounded nothing can be said.

    Args:
        config: of the adapter. Its `heads_checksum` and `diff_checksum` are None once they were compared.
        adapter_name: the adapter.
    """

    def __init__(self, config: DiffPruningConfig, adapter_name: str) -> None:
        self.config = config
        self.adapter_name = adapter_name

    def watch(self, model: nn.Module) -> None:
        """Compare when `model` runs."""
        model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Raise ValueError if the adapter is not that of the file."""
        if torch.compiler.is_compiling():
            return
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook is self]:
            model._forward_pre_hooks.pop(key)
        heads_checksum, diff_checksum = self.config.heads_checksum, self.config.diff_checksum
        self.config.heads_checksum = self.config.diff_checksum = None
        if heads_checksum is not None:
            self._check_heads(model, heads_checksum)
        packed = {n: b for n, b in model.named_buffers() if f"{PART}positions.{self.adapter_name}." in n}
        # What was used before, or brought to a device only while it runs, is left to the check of each parameter.
        as_loaded = bool(packed) and not any(buffer.is_meta or not seal.is_sealed(buffer) for buffer in packed.values())
        if diff_checksum is not None and as_loaded and seal.checksum_of_diff(packed) != diff_checksum:
            raise ValueError(
                f"the diff of adapter {self.adapter_name!r} is not that of its config: it is damaged, or the two are of "
                "different adapters; load it with PeftModel.from_pretrained, which says where"
            )

    def _check_heads(self, model: nn.Module, expected: int) -> None:
        heads = {
            f"{name}.{key}": tensor
            for name, wrapper in model.named_modules()
            if isinstance(wrapper, ModulesToSaveWrapper) and self.adapter_name in wrapper.modules_to_save
            for key, tensor in wrapper.modules_to_save[self.adapter_name].state_dict().items()
        }
        if any(tensor.is_meta for tensor in heads.values()):  # offloaded since they were loaded
            return
        broken = sorted(name for name, head in heads.items() if not bool(head.isfinite().all()))
        if broken:
            raise ValueError(
                f"{broken} of adapter {self.adapter_name!r} are NaN or infinite: its training has diverged"
            )
        if {t.dtype for t in heads.values() if t.is_floating_point()} != {torch.float32}:
            return
        as_stored = [
            {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in heads.items()}
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        if expected not in (seal.checksum_of_heads(tensors) for tensors in as_stored):
            raise ValueError(
                f"the heads of adapter {self.adapter_name!r}, {sorted(heads)[:3]}, are not those of its file: the file is "
                "damaged, or they were changed after loading; load it with PeftModel.from_pretrained, or before you change "
                f"them set peft_config[{self.adapter_name!r}].heads_checksum = None"
            )
