"""Noise of the gates: its range, and what it follows from."""

import pytest
import torch
from torch import nn

from diffpeft.gates.forward_pass import ForwardPass
from diffpeft.gates.noise import NOISE_MARGIN, new_seed, seed_words, uniform


def draw(count: int, device: str, seed: torch.Tensor | None = None) -> torch.Tensor:
    seed = new_seed() if seed is None else seed
    return uniform(seed_words(seed, torch.device(device)), torch.arange(count, dtype=torch.int32, device=device))


def test_noise_lies_within_its_margin_and_is_uniform(device):
    noise = draw(100_000, device)
    assert noise.dtype == torch.float32
    assert noise.device.type == device
    assert float(noise.min()) >= NOISE_MARGIN * 0.999
    assert float(noise.max()) <= 1 - NOISE_MARGIN * 0.999
    shares = torch.histc(noise, bins=10, min=0, max=1) / len(noise)
    torch.testing.assert_close(shares, torch.full_like(shares, 0.1), rtol=0, atol=5e-3)


@pytest.mark.parametrize("apart", ["positions", "seeds", "low parts", "high parts", "names"])
def test_noise_at_neighbouring_positions_and_seeds_is_independent(apart):
    seed, count = new_seed(), 1 << 18
    if apart == "positions":
        first, second = draw(count + 1, "cpu", seed).unfold(0, count, 1)
    elif apart == "names":  # of one pass
        noise = ForwardPass()
        noise._begin(nn.Module(), ())
        first, second = (draw(count, "cpu", noise.seed(("layer.0", "default", name))) for name in ("weight", "bias"))
    else:
        step = {"seeds": 7919, "low parts": 1, "high parts": 1 << 32}[apart]
        first, second = draw(count, "cpu", seed), draw(count, "cpu", seed + step)
    ranks = [torch.bucketize(noise, torch.linspace(0, 1, 9)[1:-1]) for noise in (first, second)]
    pairs = torch.bincount(8 * ranks[0] + ranks[1], minlength=64).double()
    expected = count / 64
    assert float(((pairs - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5  # chi-squared, five deviations


@pytest.mark.parametrize("count", [0, 1, 7])
def test_noise_has_as_many_numbers_as_asked_for(device, count):
    assert draw(count, device).shape == (count,)


def test_noise_follows_from_its_seed_and_that_from_torchs_generator(device):
    torch.manual_seed(3)
    first, second = new_seed(), new_seed()
    torch.manual_seed(3)
    assert torch.equal(new_seed(), first)
    assert torch.equal(draw(50, device, first), draw(50, device, first.clone()))
    assert torch.equal(draw(50, device, first).cpu(), draw(50, "cpu", first)), "the device does not matter"
    assert not torch.isclose(draw(50, device, first), draw(50, device, second)).any()


def test_seeds_go_on_from_a_restored_generator():
    new_seed()
    state = torch.get_rng_state()
    expected = new_seed()
    torch.set_rng_state(state)
    assert torch.equal(new_seed(), expected)
