"""A pruned adapter that is read together with the shapes of its base model, in directories or on the Hub."""

from pathlib import Path

import torch

from diffpeft.files import fingerprint
from diffpeft.files.adapter import read_adapter, read_config
from diffpeft.files.checkpoint import LazyTensors, open_checkpoint, skeleton_of
from diffpeft.tools.fetch import ADAPTER_FILES, CONFIG_FILES, MODEL_FILES, fetch


class OpenedAdapter:
    """An adapter's config, diff and heads, and the shapes of its base model's parameters.

    Args:
        adapter: a directory, or a repository on the Hub.
        base: the base model, a directory or a repository; None takes the one that the config names.

    Raises:
        ValueError: an adapter or a base that is not to be had, or that is damaged.
    """

    def __init__(self, adapter: str, base: str | None) -> None:
        self.name, self.directory = adapter, fetch(adapter, ADAPTER_FILES)
        config = read_config(self.directory)
        if base is None and config.base_model_name_or_path is None:
            raise ValueError(f"{adapter} does not tell its base model; give it with --base")
        self.base = str(base or config.base_model_name_or_path)
        shapes = _match_names(_base_shapes(self.base), config.nnz_pattern or {})
        self.config, self.diff, self.heads = read_adapter(self.directory, shapes)
        self.shapes = {name: shape for name, shape in shapes.items() if name not in self.heads}

    @property
    def bytes(self) -> int:
        """Size of the adapter's weights file."""
        return (self.directory / "adapter_model.safetensors").stat().st_size

    def differing_base(self) -> list[str]:
        """Parameters of the base model that are not those that the diff was made from; none on the Hub is read."""
        if not Path(self.base).is_dir() or self.config.base_fingerprint is None:
            return []
        checkpoint = open_checkpoint(self.base)
        names = {name: name if name in checkpoint.parameters else name.partition(".")[2] for name in self.shapes}
        found = {name: base for name, base in names.items() if base in checkpoint.parameters}
        return fingerprint.differing(self.config.base_fingerprint, LazyTensors(checkpoint, found))


def _match_names(shapes: dict[str, torch.Size], nnz: dict[str, int]) -> dict[str, torch.Size]:
    """Shapes by the adapter's names, which begin with the backbone's name where the base is a bare backbone."""
    for name in sorted(nnz.keys() - shapes.keys()):
        prefix, _, rest = name.partition(".")
        if rest in shapes:
            return {f"{prefix}.{key}": shape for key, shape in shapes.items()}
    return shapes


def _base_shapes(base: str) -> dict[str, torch.Size]:
    try:
        directory = fetch(base, CONFIG_FILES)
    except ValueError as error:
        raise ValueError(f"the base model: {error}; give another with --base") from None
    model = None if Path(base).is_dir() else skeleton_of(directory)  # its weights need no download
    if model is None:
        return open_checkpoint(fetch(base, MODEL_FILES)).parameters
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.is_floating_point()}
