"""Which modules of a model are a fresh task head: trained whole, not gated (arXiv 2012.07463, section 2)."""

from torch import nn
from transformers import PreTrainedModel


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
