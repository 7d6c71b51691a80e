"""Compiled loops are called again without torch.compile: for arguments like those before, and for no others."""

import gc
import shutil
import weakref
from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.gates import compile as compiling
from diffpeft.gates.compile import compile_and_run, transpose

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
]


def scaled(out: Tensor, x: Tensor, factor: float, offset: Tensor) -> Tensor:
    out.copy_(x * factor + offset)
    return x.sum()


def add_one(x: Tensor) -> None:
    x.copy_(x + 1)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What torch.compile was asked to look at."""
    calls: list[object] = []
    compile_chain = torch.compile

    def noting(chain: object, **options: object) -> object:
        checked = compile_chain(chain, **options)
        return lambda *arguments: (calls.append(arguments), checked(*arguments))[1]

    monkeypatch.setattr(torch, "compile", noting)
    compiling.compiled.cache_clear()
    yield calls
    compiling.compiled.cache_clear()
    assert not compiling.broken


def run(x: Tensor, factor: float, offset: Tensor) -> Tensor:
    """The chain's result, after a look at what it has written."""
    out = torch.empty_like(x, dtype=torch.float32)
    done, total = compile_and_run(scaled, out, x, factor, offset)
    assert done
    torch.testing.assert_close(out, x.float() * factor + offset, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, x.sum(), rtol=1e-4, atol=1e-4)
    return total


def test_shapes_that_come_again_are_not_looked_at_again(device, checked):
    for _ in range(3):
        for size in (300, 500, 17):
            run(torch.randn(size, device=device), 2.0, torch.randn((), device=device))
    assert len(checked) == 3


def test_other_constants_and_dtypes_and_dimensions_are_looked_at(device, checked):
    one = torch.ones((), device=device)
    for count, (x, factor) in enumerate(
        [
            (torch.randn(300, device=device), 2.0),
            (torch.randn(300, device=device), 3.0),
            (torch.randn(300, device=device).double(), 3.0),
            (torch.randn(15, 20, device=device), 3.0),
            (torch.randn(15, 15, device=device), 3.0),
        ],
        1,
    ):
        run(x, factor, one)
        run(x.clone(), factor, one)
        assert len(checked) == count


def test_shapes_that_will_not_come_again_are_not_kept(device, checked):
    for size in (40, 41, 40):
        x = torch.zeros(size, device=device)
        gone = weakref.ref(x)
        compile_and_run(add_one, x, keep=False)
        del x
        checked[-1] = None
        gc.collect()
        assert gone() is None
    assert len(checked) == 3


def test_what_is_written_counts_as_a_version(device, checked):
    x = torch.zeros(40, device=device)
    for count in range(1, 4):
        before = x._version
        assert compile_and_run(add_one, x.detach()) == (True, None)
        assert x._version > before
        assert bool((x == count).all())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_that_of_the_moment(checked, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        run(torch.randn(1 << 16), 2.0, torch.ones(()))
        assert compiling.compiled.cache_info().currsize == 1
        compiling.compiled(scaled, threads)
        assert compiling.compiled.cache_info().currsize == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 5), (200, 300), (4, 20_000)])
def test_a_transpose_is_torchs_with_a_compiler_and_without(shape, device, monkeypatch):
    x = torch.randn(shape, device=device, requires_grad=True)
    assert torch.equal(transpose(x), x.t())
    assert transpose(x).is_contiguous()
    monkeypatch.setattr(compiling, "broken", [RuntimeError("no compiler")])
    assert torch.equal(transpose(x), x.t())


def test_fixmask_transposes_with_the_compiler_where_a_model_is_large():
    layer = nn.Linear(128, 128)
    model = get_peft_model(nn.Sequential(layer), DiffPruningConfig(target_density=0.005, init_weights=False))
    model.base_model.magnitude_prune()
    inner, x = model.base_model.all_layers()[0], torch.randn(300, 128)
    for fused in (False, True):
        inner.fused = fused
        compiling.compiled.cache_clear()
        compiling.prepare_transpose.cache_clear()
        inner.diffpruning_values["default"]["weight"].grad = None
        output = model(x)
        assert compiling.compiled.cache_info().currsize == fused, "compiled before backward"
        output.square().sum().backward()
        expected = torch.take(2 * (output.detach().t() @ x), inner.sparse("default", "weight").positions)
        torch.testing.assert_close(inner.diffpruning_values["default"]["weight"].grad, expected, rtol=1e-4, atol=1e-4)
        assert compiling.compiled.cache_info().currsize == fused
