"""`torch.compile` of a training step: one graph, and the plain step's numbers."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from diffpeft import DiffPruningConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles


class Net(nn.Module):
    """An embedding that may be tied to the output layer, and a scale of the model's own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.inner = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 11)
        if tied:
            self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.norm(self.embed(ids))))) * self.scale


@pytest.fixture
def compiler():
    """Compiles without breaks in the graph; kernels are left as they are, so that numbers can be equal to the bit."""
    torch.compiler.reset()
    yield lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


def adapted(phase: str, tied: bool = True) -> PeftModel:
    model = get_peft_model(Net(tied), DiffPruningConfig(target_density=0.3, init_weights=False, init_log_alpha=0.5))
    if phase == "fixmask":
        model.base_model.magnitude_prune()
    return model


def step(model: nn.Module, run: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    run(torch.arange(11)[None]).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("phase", ["gating", "fixmask"])
def test_a_compiled_step_is_one_graph_and_gives_the_plain_gradients(compiler, phase, mode):
    # The compiler drops draws of seeds that a tied parameter does not need, and all later ones move up.
    model = adapted(phase, tied=(phase, mode) != ("gating", "train")).train(mode == "train")
    compiled = compiler(model)
    for _ in range(2):
        actual, expected = step(model, compiled), step(model, model)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(actual[name], gradient), name


def test_gates_are_sampled_anew_in_every_compiled_step(compiler):
    model = adapted("gating").train()
    compiled, ids = compiler(model), torch.arange(11)[None]
    assert not torch.equal(compiled(ids), compiled(ids))


def test_a_compiled_model_follows_its_adapter(compiler, tmp_path):
    """What is compiled for one set of positions must not be used for another."""
    model, ids = adapted("fixmask"), torch.arange(11)[None]
    other = adapted("gating")
    with torch.no_grad():
        for layer in other.base_model.all_layers():
            for w in layer.diffpruning_w["default"].values():
                w.copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(9)))
    other.base_model.magnitude_prune()
    other.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    compiled = compiler(model)
    compiled(ids)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(compiled(ids), loaded(ids))
    model.load_adapter(tmp_path, "other")
    assert torch.equal(compiler(loaded)(ids), loaded(ids)), "compiled before positions were ever decoded"
    with model.disable_adapter():
        assert torch.equal(compiled(ids), Net()(ids))
