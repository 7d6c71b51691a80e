"""The sample that lambda is solved for on: where it is taken, and that all forms of gates give the same."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpeft import gate_groups, kernels, pull
from diffpeft.deferred import DeferredGates
from diffpeft.gate_groups import Gates, Group
from diffpeft.noise import new_seed, parts

STRETCH = (-1.5, 1.5)
sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@given(sizes, st.integers(1, 70))
def test_what_is_taken_is_one_in_so_many_from_where_it_says(numels, stride):
    tensors = [1000.0 * index + torch.arange(numel) for index, numel in enumerate(numels)]
    taken = pull.some(tensors, stride)
    places, owner = pull._places_of_some(tuple(numels), stride, torch.device("cpu"))
    assert len(taken) == len(places) == len(owner)
    assert torch.equal(taken, torch.stack([tensors[o][p] for o, p in zip(owner, places, strict=True)]))
    for index, numel in enumerate(numels):
        own = places[owner == index]
        assert bool((own.diff() > 0).all())
        assert abs(len(own) - numel / stride) <= pull.LINE
        assert len(own) >= 1
        assert numel - int(own[-1]) < 2 * pull.LINE * stride  # from all over the tensor


def test_memory_layout_does_not_matter():
    tensor = torch.randn(2, 3, 20, 30)
    assert torch.equal(
        pull.some([tensor.contiguous(memory_format=torch.channels_last)], 7), pull.some([tensor.reshape(-1)], 7)
    )


def test_deferred_gradients_are_sampled_as_stored_ones(device, monkeypatch):
    monkeypatch.setattr(gate_groups, "SMALL", 500)
    stored, deferred = [], []
    for shape in ((40, 50), (30,), (25, 80), (400,)):
        log_alpha, grad, w, exp_avg = (torch.randn(shape, device=device) for _ in range(4))
        seed = parts(new_seed(), torch.device(device))
        by_w, by_log_alpha, total = kernels.gradients(
            grad, w, log_alpha, torch.ones((), device=device), seed, STRETCH, None
        )
        plain = Gates(log_alpha, by_log_alpha, exp_avg, exp_avg.square())
        large = log_alpha.numel() > 500
        own = DeferredGates(log_alpha, exp_avg, exp_avg.square(), w, by_w, seed, None, total, STRETCH)
        stored.append(Group(plain, None))
        deferred.append(Group(own if large else plain, None))
    small = [
        torch.cat([column.reshape(-1) for column in pair]) for pair in zip(stored[1][0], stored[3][0], strict=True)
    ]
    columns = [pull._sampled(groups, small, 7, STRETCH, False) for groups in (stored, deferred)]
    torch.testing.assert_close(columns[1], columns[0], rtol=1e-5, atol=1e-7)
    assert set(columns[0][-1].tolist()) == {0, 1, 2, 3}
