"""Fixtures that the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the workers share the cores, as do the processes that tests start
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

from collections.abc import Callable

import pytest
import torch
from architectures import pruned
from hypothesis import settings
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from diffpeft.gates.update import factored

settings.register_profile("diffpeft", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("diffpeft")

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that tensors can live on here."""
    return request.param


@pytest.fixture(scope="session")
def tiny_bert() -> Callable[..., BertForSequenceClassification]:
    """Makes small BERTs of random weights that follow from `seed`; keywords go to their configuration."""

    def make(seed: int = 0, **config: object) -> BertForSequenceClassification:
        sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        others = {"num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 2}
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**{**sizes, **others, **config}))

    return make


@pytest.fixture
def low_memory_tiny_bert(tiny_bert, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BertForSequenceClassification]:
    """`tiny_bert`, whose matrices are large enough for the low-memory mode."""
    monkeypatch.setattr(factored, "MIN_LARGE_ELEMENTS", 1001)
    return tiny_bert


@pytest.fixture(scope="session")
def batch() -> Callable[..., dict[str, Tensor]]:
    """Makes batches for `tiny_bert` that follow from `seed`."""

    def make(size: int = 4, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "input_ids": torch.randint(100, (size, length), generator=generator),
            "attention_mask": torch.ones(size, length, dtype=torch.int64),
            "labels": torch.randint(2, (size,), generator=generator),
        }

    return make


@pytest.fixture(scope="module")
def saved(tiny_bert: Callable[..., BertForSequenceClassification], tmp_path_factory: pytest.TempPathFactory):
    """A pruned adapter of density 0.02 with a head on disk, and the model that it was saved from."""
    directory = tmp_path_factory.mktemp("adapter")
    model = pruned(tiny_bert(), task_type="SEQ_CLS", target_density=0.02).eval()
    model.save_pretrained(directory)
    return directory, model
