"""One seed a parameter and pass of the model, replays of a pass, and one thread at a time."""

import pickle
import threading
from copy import deepcopy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffpeft import DiffPruningConfig
from diffpeft.gates.forward_pass import ForwardPass


class Twice(nn.Module):
    """Uses one linear layer twice, and an embedding whose weight is the output layer's."""

    def __init__(self, checkpointed: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.shared = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.checkpointed, self.reentrant = checkpointed, reentrant
        self.weights: list[torch.Tensor] = []

    def block(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.shared.weight
        self.weights.append(weight.detach().clone())
        return torch.tanh(torch.nn.functional.dropout(self.shared(x), 0.1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        self.weights = [self.embed.weight.detach().clone(), self.out.weight.detach().clone()]
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=self.reentrant) if self.checkpointed else self.block(x)
        return self.out(x)


def twice(**kwargs: bool) -> nn.Module:
    torch.manual_seed(0)
    config = DiffPruningConfig(target_density=0.1, init_weights=False, init_log_alpha=0.0)
    return get_peft_model(Twice(**kwargs), config).train()


IDS = torch.arange(7)[None]


def test_a_pass_has_one_gate_a_parameter_however_often_it_is_used():
    model = twice()
    model(IDS)
    embed, out, first, second = model.base_model.model.weights
    assert torch.equal(embed, out)
    assert torch.equal(first, second)
    model(IDS)
    again = model.base_model.model.weights
    assert not (torch.equal(again[0], embed) and torch.equal(again[2], first))


def gradients(model: nn.Module, passes: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    # Several passes before one backward: the replays belong to different ones.
    sum(model(IDS).square().sum() for _ in range(passes)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_gradient_checkpointing_replays_the_same_gates(monkeypatch, passes, reentrant, together):
    if not together:  # small parameters are made one by one, as those that are replayed are
        monkeypatch.setattr("diffpeft.layer.run.MAX_SMALL_ELEMENTS", 0)
    expected = gradients(twice(), passes)
    actual = gradients(twice(checkpointed=True, reentrant=reentrant), passes)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        if together and passes > 1:  # autograd adds up the passes in another order
            torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(actual[name], gradient), name


def test_only_so_many_repeated_uses_are_remembered(monkeypatch):
    monkeypatch.setattr("diffpeft.gates.forward_pass.MAX_ALIASES", 2)
    noise = ForwardPass()
    noise._begin(nn.Module(), ())
    with torch.no_grad():
        for _ in range(5):
            noise.seed("a")
    assert len(noise._aliases) == 2
    for _ in range(2):
        noise.seed("b")
    assert len(noise._aliases) == 2  # nothing replays these


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_has_passes_of_its_own(copy):
    model = twice()
    copied = copy(model)
    expected, actual = gradients(model), gradients(copied)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    model.base_model.model.shared.noise._begin(model, ())
    assert copied.base_model.model.shared.noise._first is None


def test_unloading_takes_the_hooks_off():
    model = twice()
    base = model.unload()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("pruned", [True, False])
def test_threads_that_run_one_model_at_once_are_told_and_leave_it_as_it_was(tiny_bert, batch, pruned):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(target_density=0.1, init_weights=False)).eval()
    if pruned:
        model.base_model.magnitude_prune()
    with torch.no_grad():
        expected = model(**batch()).logits
    start, outputs, errors = threading.Barrier(8), [], []

    def request():
        start.wait()
        for _ in range(10):
            try:
                with torch.no_grad():
                    outputs.append(model(**batch()).logits)
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=request) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) + len(errors) == 80
    assert outputs
    assert errors
    assert all("two threads run this model at once" in error for error in errors)
    # What a matrix product rounds depends on how many threads it finds free.
    assert max(float((logits - expected).abs().max()) for logits in outputs) < 1e-6
    assert torch.equal(model(**batch()).logits, expected)
