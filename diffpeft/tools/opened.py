"""A pruned adapter that is read together with the shapes of its base model, in directories or on the Hub."""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from diffpeft.files import fingerprint
from diffpeft.files.adapter import read_adapter, read_config
from diffpeft.files.checkpoint import LazyTensors, open_checkpoint, skeleton_of

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_FILES = ("config.json",)
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def fetch(source: str, files: Sequence[str]) -> Path:
    """The directory `source`, or one with the files of the Hub's repository of that name, from the cache or downloaded.

    Raises ValueError where it is neither, or a repository without the first of `files`, which are patterns.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        directory = Path(snapshot_download(source, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source} is no directory, and not to be had from the Hub: {reason}") from None
    if not any(directory.glob(files[0])):
        raise ValueError(f"the repository {source} has no {files[0]}; give one that has, or a directory")
    return directory


class OpenedAdapter:
    """An adapter's config, diff and heads, and the shapes of its base model's parameters.

    Args:
        adapter: a directory, or a repository on the Hub; ValueError where it is neither or damaged.
        base: the base model, likewise; None takes the one that the config names.
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
