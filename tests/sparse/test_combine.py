"""Combining sparse diffs against PEFT's arithmetic on dense tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from diffpeft.sparse.combine import COMBINATION_TYPES, combine
from diffpeft.sparse.diff import Diff

SIZES = {"a": 40, "b": 7, "c": 100}
THINNING = tuple(name for name in COMBINATION_TYPES if name != "linear")
each_thinning = pytest.mark.parametrize("kind", THINNING)
each_type = pytest.mark.parametrize("kind", COMBINATION_TYPES)
each_method = pytest.mark.parametrize("method", ["total", "frequency"])
pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")

# Sums of these are exact in any order, so that results can be compared to the bit.
eighths = st.integers(-80, 80).map(lambda number: number / 8)
parameters = st.fixed_dictionaries(
    {}, optional={name: st.dictionaries(st.integers(0, size - 1), eighths) for name, size in SIZES.items()}
)
weighted_diffs = st.lists(st.tuples(parameters, eighths), min_size=1, max_size=6)


def from_entries(entries: dict[str, dict[int, float]], device: str) -> Diff:
    return {
        name: (
            torch.tensor(sorted(part), dtype=torch.int64, device=device),
            torch.tensor([part[position] for position in sorted(part)], dtype=torch.float32, device=device),
        )
        for name, part in entries.items()
    }


def drawn(seed: int, device: str = "cpu") -> Diff:
    generator = torch.Generator().manual_seed(seed)
    diff = {}
    for name, size in SIZES.items():
        positions = torch.nonzero(torch.rand(size, generator=generator) < 0.4).squeeze(1)
        diff[name] = (positions.to(device), torch.randn(len(positions), generator=generator).to(device))
    return diff


def dense(diff: Diff) -> Tensor:
    """All parameters, one after the other."""
    parts = []
    for name, size in SIZES.items():
        parts.append(torch.zeros(size))
        if name in diff:
            positions, values = diff[name]
            parts[-1][positions.cpu()] = values.cpu()
    return torch.cat(parts)


def by_peft(kind: str, tensors: list[Tensor], weights: list[float], method: str = "total") -> Tensor:
    """What PEFT makes of tensors that are thinned already."""
    if kind == "linear":
        return merge_utils.task_arithmetic(tensors, torch.tensor(weights))
    options = {"majority_sign_method": method} if kind.endswith("ties") else {}
    return getattr(merge_utils, kind)(tensors, torch.tensor(weights), 1.0, **options)


def at_density_one(kind: str) -> dict[str, float]:
    return {} if kind == "linear" else {"density": 1.0}


def nonzeros(diff: Diff) -> int:
    return sum(len(positions) for positions, _ in diff.values())


def assert_well_formed(diff: Diff, device: str) -> None:
    for positions, values in diff.values():
        assert positions.dtype == torch.int64
        assert values.dtype == torch.float32
        assert positions.device.type == values.device.type == device
        assert len(positions) == len(values) > 0
        assert bool((positions[1:] > positions[:-1]).all())
        assert bool((values != 0).all())


def assert_same(one: Diff, other: Diff) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name][0], other[name][0])
        assert torch.equal(one[name][1], other[name][1])


@each_type
@each_method
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, -1.7, 2.0], [0.0, 0.6, 0.4], [0.7]], ids=str)
def test_equals_peft_on_dense_tensors_to_the_bit(device, kind, method, weights):
    diffs = [drawn(seed, device=device) for seed in range(len(weights))]
    result = combine(diffs, weights, kind, majority_sign_method=method, **at_density_one(kind))
    assert_well_formed(result, device)
    assert torch.equal(dense(result), by_peft(kind, [dense(diff) for diff in diffs], weights, method))


@each_type
@each_method
@given(pairs=weighted_diffs)
def test_equals_peft_whatever_overlaps_balances_or_cancels(device, kind, method, pairs):
    diffs, weights = [from_entries(entries, device) for entries, _ in pairs], [weight for _, weight in pairs]
    result = combine(diffs, weights, kind, majority_sign_method=method, **at_density_one(kind))
    assert_well_formed(result, device)
    assert torch.equal(dense(result), by_peft(kind, [dense(diff) for diff in diffs], weights, method))


@given(weighted_diffs)
def test_linear_is_the_dense_sum_in_the_order_of_first_appearance(device, pairs):
    diffs, weights = [from_entries(entries, device) for entries, _ in pairs], [weight for _, weight in pairs]
    result = combine(diffs, weights)
    expected = sum((weight * dense(diff) for diff, weight in zip(diffs, weights, strict=True)), torch.zeros(147))
    assert torch.equal(dense(result), expected)
    seen = list(dict.fromkeys(name for diff in diffs for name in diff))
    assert list(result) == [name for name in seen if name in result]


@each_type
@given(entries=parameters)
def test_one_diff_of_weight_one_is_left_as_it_is(device, kind, entries):
    diff = from_entries(entries, device)
    result = combine([diff], [1.0], kind, **at_density_one(kind))
    expected = {name: (p[v != 0], v[v != 0]) for name, (p, v) in diff.items() if v.count_nonzero()}
    assert_same(result, expected)


@each_type
@given(pairs=weighted_diffs, limit=st.integers(1, 60))
def test_max_nonzeros_keeps_exactly_the_largest(device, kind, pairs, limit):
    diffs, weights = [from_entries(entries, device) for entries, _ in pairs], [weight for _, weight in pairs]
    everything = combine(diffs, weights, kind, **at_density_one(kind))
    result = combine(diffs, weights, kind, max_nonzeros=limit, **at_density_one(kind))
    assert_well_formed(result, device)
    assert nonzeros(result) == min(limit, nonzeros(everything))
    kept, before = dense(result), dense(everything)
    assert torch.equal(kept, torch.where(kept != 0, before, 0.0))
    assert torch.equal(kept.abs().sort().values[-limit:], before.abs().sort().values[-limit:])


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.005, 0.1, 0.5, 0.93])
def test_magnitude_keeps_the_top_share_of_the_nonzeros_over_all_parameters(device, kind, density):
    diffs, weights = [drawn(seed, device=device) for seed in range(3)], [0.5, 1.5, -1.0]
    diffs[1]["b"][1].mul_(100)  # takes far more than its share, which a cut by parameter would not grant
    thinned = []
    for tensor in map(dense, diffs):
        top = tensor.abs().topk(round(density * int(tensor.count_nonzero()))).indices
        thinned.append(torch.zeros_like(tensor).scatter(0, top, tensor[top]))
    result = combine(diffs, weights, kind, density=density)
    assert_well_formed(result, device)
    assert torch.equal(dense(result), by_peft(kind, thinned, weights))


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.93])
def test_dare_draws_each_nonzero_and_rescales(device, kind, density):
    diffs, weights = [drawn(seed, device=device) for seed in range(3)], [0.5, 1.5, -1.0]
    torch.manual_seed(7)
    thinned = []
    for diff in diffs:
        masked = {name: (p, v.cpu() * torch.full((len(p),), density).bernoulli()) for name, (p, v) in diff.items()}
        thinned.append(dense(masked) / density)
    torch.manual_seed(7)
    result = combine(diffs, weights, kind, density=density)
    assert_well_formed(result, device)
    torch.testing.assert_close(dense(result), by_peft(kind, thinned, weights), rtol=1e-6, atol=0)


def test_dare_keeps_its_share_and_the_expected_sum(device):
    diff = {"w": (torch.arange(100_000, device=device), torch.ones(100_000, device=device))}
    positions, values = combine([diff], [1.0], "dare_linear", density=0.3)["w"]
    assert len(positions) / 100_000 == pytest.approx(0.3, abs=0.01)
    assert values.unique().tolist() == pytest.approx([1 / 0.3])


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_follows_the_seed(device, kind):
    def at(seed: int, on: str = device) -> Diff:
        torch.manual_seed(seed)
        return combine([drawn(0, device=on), drawn(1, device=on)], [1.0, 0.5], kind, density=0.5)

    assert_same(at(3), at(3))
    assert torch.equal(dense(at(3)), dense(at(3, "cpu")))
    assert not torch.equal(dense(at(3)), dense(at(4)))


@each_type
def test_only_dare_below_density_one_draws(kind):
    state = torch.get_rng_state()
    combine([drawn(0), drawn(1)], [1.0, 1.0], kind, **at_density_one(kind))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("method", "expected"), [("total", {0: -3.0, 1: 2.0, 2: 2.0}), ("frequency", {0: 1.5, 1: 2.0, 2: 2.0})]
)
def test_ties_elects_a_sign_and_averages_over_those_that_agree(device, method, expected):
    entries = [{0: 1.0, 1: 2.0}, {0: 2.0, 1: -2.0}, {0: -6.0, 2: 4.0}]
    diffs = [from_entries({"a": part}, device) for part in entries]
    positions, values = combine(diffs, [1.0, 1.0, 0.5], "ties", density=1.0, majority_sign_method=method)["a"]
    assert dict(zip(positions.tolist(), values.tolist(), strict=True)) == expected


def test_what_cancels_is_dropped_with_its_parameter():
    one, other = {"a": {1: 1.0, 2: 2.0}, "b": {0: 3.0}}, {"a": {1: -1.0, 3: 4.0}, "b": {0: -3.0}, "c": {}}
    result = combine([from_entries(one, "cpu"), from_entries(other, "cpu")], [1.0, 1.0])
    assert_same(result, from_entries({"a": {2: 2.0, 3: 4.0}}, "cpu"))


def test_stored_zeros_are_no_part_of_the_density():
    diff = from_entries({"a": {0: 0.0, 1: 1.0, 2: -3.0, 3: 0.0}}, "cpu")
    result = combine([diff], [1.0], "magnitude_prune", density=0.5)
    assert_same(result, from_entries({"a": {2: -3.0}}, "cpu"))


@each_type
def test_diffs_of_nothing_make_nothing(kind):
    empty = from_entries({"a": {}}, "cpu")
    assert combine([{}, empty, {}], [1.0, 1.0, 1.0], kind, max_nonzeros=3, **at_density_one(kind)) == {}


@each_thinning
def test_a_density_that_keeps_nothing_makes_nothing(kind):
    assert combine([drawn(0)], [1.0], kind, density=1e-30) == {}


@each_type
def test_a_parameter_of_any_size_takes_memory_for_its_nonzeros_only(device, kind):
    far = 2**40
    one = {"w": (torch.tensor([0, far - 2], device=device), torch.tensor([1.0, 2.0], device=device))}
    other = {"w": (torch.tensor([5, far - 2, far - 1], device=device), torch.tensor([3.0, 4.0, 5.0], device=device))}
    positions, _ = combine([one, other], [1.0, 1.0], kind, max_nonzeros=100, **at_density_one(kind))["w"]
    assert positions.tolist() == [0, 5, far - 2, far - 1]


@each_type
def test_inputs_are_neither_modified_nor_shared(device, kind):
    diffs, copies = (
        [drawn(0, device=device), drawn(1, device=device)],
        [drawn(0, device=device), drawn(1, device=device)],
    )
    diffs[0]["a"][1].requires_grad_()
    for count in (1, 2):
        result = combine(diffs[:count], [1.0, 2.0][:count], kind, **at_density_one(kind))
        assert not any(values.requires_grad for _, values in result.values())
        for positions, values in result.values():
            positions.zero_()
            values.zero_()
        for diff, copy in zip(diffs, copies, strict=True):
            assert_same(diff, copy)


def test_diffs_of_another_dtype_and_device_are_brought_to_the_first(device):
    half = {name: (p, v.bfloat16()) for name, (p, v) in drawn(1).items()}
    result = combine([drawn(0, device=device), half], [1.0, 1.0])
    assert_well_formed(result, device)
    assert torch.equal(dense(result), dense(drawn(0)) + dense({name: (p, v.float()) for name, (p, v) in half.items()}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"diffs": [], "weights": []}, "0 diffs cannot be combined; give at least 1"),
        ({"weights": [1.0]}, "1 weights do not fit 2 diffs; give one weight a diff"),
        ({"weights": [1.0, float("nan")]}, "weight nan is no finite fp32 number; use finite weights"),
        ({"weights": [-float("inf"), 1.0]}, "weight -inf is no finite fp32 number; use finite weights"),
        ({"weights": [1e39, 1.0]}, r"weight 1e\+39 is no finite fp32 number; use finite weights"),
        ({"combination_type": "svd"}, r"combination_type='svd' is unknown; use one of \('linear', 'ties', .*\)"),
        ({"majority_sign_method": "most"}, r"majority_sign_method='most' is unknown; use one of \('total', .*\)"),
        ({"density": 0.5, "combination_type": "linear"}, "density=0.5 has no meaning for 'linear'.*leave it out"),
        ({"max_nonzeros": 0}, "max_nonzeros=0 is no number of entries to keep; use an integer >= 1 or None"),
        ({"max_nonzeros": -3}, "max_nonzeros=-3 is no number of entries to keep"),
        ({"max_nonzeros": 2.5}, "max_nonzeros=2.5 is no number of entries to keep"),
    ],
    ids=lambda part: None if isinstance(part, dict) else part,
)
def test_arguments_out_of_range_are_refused(changed, message):
    arguments = {"diffs": [drawn(0), drawn(1)], "weights": [1.0, 1.0], "combination_type": "linear"}
    with pytest.raises(ValueError, match=message):
        combine(**{**arguments, **changed})


@each_thinning
@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_densities_out_of_range_are_refused(kind, density):
    with pytest.raises(ValueError, match=f"density={density} is no share of the nonzeros; use 0 < density <= 1"):
        combine([drawn(0)], [1.0], kind, density=density)


@each_thinning
def test_a_missing_density_is_refused(kind):
    with pytest.raises(ValueError, match=f"density=None is too little for '{kind}'; use 0 < density <= 1"):
        combine([drawn(0)], [1.0], kind)


@each_type
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_values_without_an_order_are_refused(device, kind, wrong):
    bad = drawn(1, device=device)
    bad["b"][1][0] = wrong
    with pytest.raises(ValueError, match=f"diff 1 holds {wrong} in b; leave it out or train it again"):
        combine([drawn(0, device=device), bad], [1.0, 0.0], kind, **at_density_one(kind))


def test_results_beyond_fp32_are_refused():
    diff = from_entries({"a": {0: 1e30}}, "cpu")
    with pytest.raises(ValueError, match="the combination of a exceeds the range of fp32; use smaller weights"):
        combine([diff, diff], [1.0, 1e30])
