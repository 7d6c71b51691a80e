"""Models in gating, for tests of what a step does to them."""

import torch
from peft import get_peft_model

from diffpeft import DiffPruningConfig


def make(base, **config):
    """A model in gating, its diff not zero and its gates spread; the same for the same base."""
    model = get_peft_model(base, DiffPruningConfig(**{"task_type": "SEQ_CLS", "target_density": 0.02, **config}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "diffpruning_w." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            if "log_alpha" in name:
                mean = 8 if "group_log_alpha" in name else 1  # of groups that are shut nothing has a gradient
                parameter.copy_((torch.randn(parameter.shape, generator=generator) + mean).to(torch.float16))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()
