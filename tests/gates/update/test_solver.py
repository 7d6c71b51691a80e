"""The sample that lambda is solved for on: where it is taken."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpeft.gates.update import solver as pull

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
