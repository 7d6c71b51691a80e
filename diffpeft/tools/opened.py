"""A pruned adapter that is read together with the shapes of its base model, in directories or on the Hub."""

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import check_target_module_exists

from diffpeft.files import fingerprint
from diffpeft.files.adapter import read_adapter, read_config
from diffpeft.files.checkpoint import Checkpoint, open_checkpoint, stored_tensors
from diffpeft.files.keys import heads_of
from diffpeft.files.skeleton import adapted_model, floating_shapes, true_heads

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_FILES = ("config.json",)
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
PICKLED_FILES = ("*.bin",)


def fetch(source: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The directory `source`, or one with the files of the Hub's repository of that name, from the cache or downloaded.

    Raises ValueError where it is neither, or a repository without the first of `files`, which are patterns.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        directory = Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source} is no directory, and not to be had from the Hub: {reason}") from None
    if not any(directory.glob(files[0])):
        raise ValueError(f"the repository {source} has no {files[0]}; give one that has, or a directory")
    return directory


def fetch_model(source: str, revision: str | None = None) -> Path:
    """A base model's directory with all its files, as of [`fetch`]; pickled weights only where there are no others."""
    directory = fetch(source, MODEL_FILES, revision)
    found = any(directory.glob("*.safetensors")) or Path(source).is_dir()
    return directory if found else fetch(source, (*MODEL_FILES, *PICKLED_FILES), revision)


class OpenedAdapter:
    """An adapter, and its base model without weights.

    `whole` has all tensors that the adapter's file has whole: `heads`, and PEFT's copies of embeddings, to which the
    diff is added. `shapes` has those of the base's parameters outside of the heads.

    Args:
        adapter: a directory, or a repository on the Hub; ValueError where it is neither or damaged.
        base: the base model, likewise; None takes the one that the config names, in its revision.
    """

    def __init__(self, adapter: str, base: str | None) -> None:
        self.name, self.directory = adapter, fetch(adapter, ADAPTER_FILES)
        config = read_config(self.directory)
        if base is None and config.base_model_name_or_path is None:
            raise ValueError(f"{adapter} does not tell its base model; give it with --base")
        self.base = str(base or config.base_model_name_or_path)
        self._revision = config.revision if self.base == config.base_model_name_or_path else None
        try:
            directory = fetch(self.base, CONFIG_FILES, self._revision)
        except ValueError as error:
            raise ValueError(f"the base model: {error}; give another with --base") from None
        file = self.directory / ADAPTER_FILES[1]
        stored = {one.key: one.like for one in stored_tensors(file)} if file.is_file() else {}
        whole = {name: like.shape for name, like in heads_of(stored).items()}
        self.model = adapted_model(directory, config, config.nnz_pattern or {}, whole)
        if self.model is None:
            shapes = self.checkpoint.parameters
        else:
            if Path(self.base).is_dir():
                self.checkpoint  # noqa: B018 - it unties the model where the files do
            shapes = floating_shapes(self.model, config.nnz_pattern or {})
        self.config, self.diff, self.whole = read_adapter(self.directory, shapes)
        self.heads = {name: self.whole[name] for name in true_heads(self.whole, config)}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in self.heads}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base model's tensors; those on the Hub are downloaded."""
        return open_checkpoint(fetch_model(self.base, self._revision), self.model)

    def check_mergeable(self) -> None:
        """Raise ValueError where a merged diff would change another module, which has the same parameter, too."""
        for name in self.diff:
            for twin in self.checkpoint.aliases.get(name, ()):
                config, module = copy.copy(self.config), twin.rpartition(".")[0]
                config.target_modules = config.target_modules or [module.rpartition(".")[2]]
                if twin != name and not check_target_module_exists(config, module):
                    raise ValueError(f"{name} is also {twin}, which {self.name} leaves alone; use it unmerged")

    def check_base(self) -> None:
        """Raise ValueError for a base model of other weights than the diff was made from; downloads none."""
        if "checkpoint" not in self.__dict__ and not Path(self.base).is_dir():
            return
        told = [name for name in self.config.base_fingerprint or {} if name not in self.whole]
        here = {name for name in told if self.checkpoint.units_of(name)}
        other = [] if self.model is None else [name for name in told if name not in here]
        other += fingerprint.differing(self.config.base_fingerprint or {}, here, self.checkpoint.load)
        if other:
            raise ValueError(
                f"{self.name} was made from other weights than {self.base}: {len(other)} parameters differ or "
                f"are not there, {other[:3]}; give its own base with --base, or go on with --force"
            )
