"""The global cut against sorting."""

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from diffpeft.sparse.top_k import Scores, global_threshold, global_top_k

anything = st.floats(0, float(np.finfo(np.float32).max), width=32)
with_ties = st.sampled_from([0.0, 1e-45, 1e-38, 0.5, float(np.nextafter(np.float32(0.5), np.float32(1))), 2.0])
tensors = st.sampled_from([anything, with_ties]).flatmap(
    lambda elements: st.lists(
        hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, min_side=0, max_side=6), elements=elements), max_size=5
    )
)


def chunks(tensor: Tensor, size: int = 4) -> Scores:
    return lambda: torch.split(tensor.reshape(-1), size)


def by_sorting(tensors: list[Tensor], k: int) -> list[list[int]]:
    """Flat positions of the k largest; of equal ones the first."""
    scores = np.concatenate([tensor.reshape(-1).cpu().numpy() for tensor in tensors])
    chosen = np.sort(np.argsort(-scores.astype(np.float64), kind="stable")[:k])
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(chosen, np.searchsorted(chosen, ends))[:-1]
    return [(part - end + tensor.numel()).tolist() for part, end, tensor in zip(parts, ends, tensors, strict=True)]


@given(tensors, st.data())
def test_kept_are_those_that_sorting_keeps(device, arrays, data):
    tensors = [torch.from_numpy(array.copy()).to(device) for array in arrays]
    total = sum(tensor.numel() for tensor in tensors)
    assume(total)
    k = data.draw(st.integers(1, total))
    kept, threshold = global_top_k([chunks(tensor) for tensor in tensors], k)
    assert [positions.tolist() for positions in kept] == by_sorting(tensors, k)
    assert all(positions.dtype == torch.int64 and positions.device.type == device for positions in kept)
    scores = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    assert threshold.value == scores.sort(descending=True).values[k - 1].item()
    assert threshold.ties == k - int((scores > threshold.value).sum())


@pytest.mark.parametrize("k", [1, 7, 50, 99, 100])
def test_ties_go_to_the_first_tensors_and_positions(k):
    tensors = [torch.ones(30), torch.ones(0), torch.ones(10, 7)]
    kept, _ = global_top_k([chunks(tensor) for tensor in tensors], k)
    assert [positions.tolist() for positions in kept] == [list(range(min(30, k))), [], list(range(max(0, k - 30)))]


def test_scores_are_computed_again_and_read_in_logical_order():
    calls = []

    def transposed() -> list[Tensor]:
        calls.append(None)
        return [torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).t()]

    kept, threshold = global_top_k([transposed], 2)
    assert kept[0].tolist() == [2, 5]  # 5 and 6 in [[1, 3, 5], [2, 4, 6]]
    assert threshold.value == 5.0
    assert len(calls) > 1


def test_no_more_than_a_chunk_is_alive():
    alive = []

    def scores() -> Iterator[Tensor]:
        for index in range(3):
            chunk = torch.full((5,), float(index))
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk
            assert sum(ref() is not None for ref in alive) <= 1

    assert global_top_k([scores], 5)[0][0].tolist() == list(range(10, 15))


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"k={k} of 5 scores cannot be kept; use 1 <= k <= 5"):
        global_threshold([chunks(torch.ones(3)), chunks(torch.ones(2))], k)


@pytest.mark.parametrize("wrong", [float("nan"), -float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("function", [global_threshold, global_top_k])
def test_scores_without_an_order_are_refused(device, function, wrong):
    scores = torch.ones(100, device=device)
    scores[50] = wrong
    with pytest.raises(ValueError, match=r"NaN, infinite or negative.*lower the learning rate"):
        function([chunks(torch.ones(3, device=device)), chunks(scores)], 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_scores_of_another_dtype_are_refused(dtype):
    with pytest.raises(TypeError, match=f"scores are {dtype}.*torch.float32"):
        global_threshold([chunks(torch.ones(3, dtype=dtype))], 1)
