"""A sparse diff in other formats: PEFT's Super-Tuning and SHiRA, COO, a merged checkpoint, patches for vLLM."""

from diffpeft.tools.export.checkpoint import to_checkpoint, to_weight_patches
from diffpeft.tools.export.coo import from_coo, to_coo
from diffpeft.tools.export.peft import from_shira, from_super_tuning, to_super_tuning

__all__ = ["from_coo", "from_shira", "from_super_tuning", "to_checkpoint", "to_coo", "to_super_tuning"]
__all__ += ["to_weight_patches"]
