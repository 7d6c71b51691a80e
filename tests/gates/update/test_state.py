"""The gates of several tensors as one: which of them a sample takes, and what they count."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpeft.gates.update.state import LINE_ELEMENTS, GateSet, Group, JoinedGates, StoredGates, every

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


def numbered(numel: int, index: int) -> StoredGates:
    """Gates that tell tensor and position."""
    return StoredGates(*(1000.0 * index + torch.arange(float(numel)) for _ in range(4)))


@given(sizes, st.integers(1, 70), st.booleans())
def test_a_sample_is_one_in_so_many_from_all_over_each_tensor(numels, stride, joined):
    gates = [numbered(numel, index) for index, numel in enumerate(numels)]
    if joined:
        sample = JoinedGates(gates).sample(1)
        assert torch.equal(sample.log_alpha, torch.cat([one.log_alpha for one in gates]))
    else:
        sample = GateSet([Group(one, None) for one in gates]).sample(1)
    assert torch.equal(sample.log_alpha, sample.exp_avg_sq)
    for index, numel in enumerate(numels):
        assert int((sample.owner == index).sum()) == numel
        assert torch.equal(sample.log_alpha[sample.owner == index], gates[index].log_alpha)
        own = every(gates[index].log_alpha, stride) - 1000.0 * index
        assert bool((own.diff() > 0).all())
        assert abs(len(own) - numel / stride) <= LINE_ELEMENTS
        assert len(own) >= 1
        assert numel - int(own[-1]) < 2 * LINE_ELEMENTS * stride  # from all over the tensor


def test_memory_layout_does_not_matter():
    tensor = torch.randn(2, 3, 20, 30)
    assert torch.equal(every(tensor.contiguous(memory_format=torch.channels_last), 7), every(tensor.reshape(-1), 7))
