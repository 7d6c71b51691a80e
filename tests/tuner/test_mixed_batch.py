"""Batches whose rows belong to different adapters: what each row gets, and what is refused."""

from contextlib import nullcontext

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diffpeft import DiffPruningConfig

NAMES = ["first", "__base__", "second", "second", "first"]


def adapters(base: nn.Module, names: tuple[str, ...] = ("first", "second"), **config: object) -> nn.Module:
    """`base` with finished adapters of random values, none active by more than name."""
    settings = {"target_density": 0.05, "init_weights": False, **config}
    model = get_peft_model(base, DiffPruningConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, DiffPruningConfig(**settings))
    for name in names:
        model.base_model.magnitude_prune(adapter_name=name)
    return model.eval()


@torch.no_grad()
def alone(model: nn.Module, names: list[str], **inputs: Tensor) -> Tensor:
    """Row by row, each through its own adapter alone."""
    rows = []
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(**own).logits)
        else:
            model.set_adapter(name)
            rows.append(model(**own).logits)
    return torch.cat(rows)


@pytest.fixture
def bert(tiny_bert):
    return adapters(tiny_bert(), task_type="SEQ_CLS")


@pytest.fixture
def inputs(batch):
    return {key: value for key, value in batch(5).items() if key != "labels"}


def test_each_row_gets_its_own_adapter_and_its_own_head(bert, inputs):
    with torch.no_grad():
        for index, head in enumerate(bert.base_model.model.classifier.modules_to_save.values()):
            head.bias.fill_(3.0 * (index + 1))
    expected = alone(bert, NAMES, **inputs)
    actual = bert(**inputs, adapter_names=NAMES).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert float(actual[0].mean().detach()) > 2
    assert abs(float(actual[1].mean().detach())) < 1


def test_the_active_adapter_does_not_matter_and_stays(bert, inputs):
    before = bert(**inputs, adapter_names=NAMES).logits
    bert.set_adapter("second")
    assert torch.equal(bert(**inputs, adapter_names=NAMES).logits, before)
    assert bert.active_adapters == ["second"]
    assert torch.equal(bert(**inputs).logits, bert(**inputs, adapter_names=["second"] * 5).logits)


def test_gating_and_finished_adapters_side_by_side(bert, inputs):
    bert.add_adapter("young", DiffPruningConfig(task_type="SEQ_CLS", init_weights=False))
    names = ["young", "first", "__base__", "young", "second"]
    torch.testing.assert_close(
        bert.eval()(**inputs, adapter_names=names).logits, alone(bert, names, **inputs), atol=1e-5, rtol=1e-4
    )


def test_other_outputs_than_the_first_time(bert, inputs):
    plain = bert(**inputs, adapter_names=NAMES).logits
    output = bert(**inputs, adapter_names=NAMES, output_hidden_states=True)
    torch.testing.assert_close(output.logits, plain)
    bert.set_adapter("first")
    for row in (0, 4):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        for hidden, expected in zip(
            output.hidden_states, bert(**own, output_hidden_states=True).hidden_states, strict=True
        ):
            torch.testing.assert_close(hidden[row], expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bert(**inputs, adapter_names=NAMES).logits, plain)


def encoder_calls(bert):
    calls = []
    bert.base_model.model.bert.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_the_model_runs_once_for_each_adapter_and_rows_get_the_same_bits(bert, batch):
    inputs = {key: value for key, value in batch(12).items() if key != "labels"}
    names, calls = ["first", "__base__", "second"] * 4, encoder_calls(bert)
    actual = bert(**inputs, adapter_names=names).logits
    assert len(calls) == 3
    for start, name in enumerate(names[:3]):
        own = {key: value[start::3] for key, value in inputs.items()}
        assert torch.equal(actual[start::3], bert(**own, adapter_names=[name] * 4).logits)
        with bert.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                bert.set_adapter(name)
            assert torch.equal(actual[start::3], bert(**own).logits)


def test_a_loss_belongs_to_no_row(bert, batch):
    with pytest.raises(NotImplementedError, match="leave labels out"):
        bert(**batch(5), adapter_names=NAMES)
    assert bert(**batch(5), adapter_names=["first"] * 5).loss.ndim == 0


class Similar(nn.Module):
    """Compares the rows of a batch with each other, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y @ y.t()


@pytest.mark.parametrize("names", [NAMES, ["first", "second"], ["first", "first", "second", "second"]], ids=str)
def test_similarities_between_rows_are_refused(names):
    model = adapters(Similar(), target_density=1.0)
    with pytest.raises(NotImplementedError, match="use one batch for each adapter"):
        model(torch.randn(len(names), 4), adapter_names=names)
    assert model(torch.randn(3, 4), adapter_names=["second"] * 3).shape == (3, 3)


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_as_many_labels_as_an_adapter_has_rows_are_no_similarities(tiny_bert, batch, labels):
    model = adapters(tiny_bert(num_labels=labels), task_type="SEQ_CLS")
    inputs = {key: value for key, value in batch(4).items() if key != "labels"}
    names = ["first", "second"] * 2
    torch.testing.assert_close(
        model(**inputs, adapter_names=names).logits, alone(model, names, **inputs), atol=1e-5, rtol=1e-4
    )


def test_a_forward_pass_runs_without_a_cache_and_refuses_one():
    model = adapters(ARCHITECTURES["gpt2"].make(), target_density=0.2)
    ids = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    names = ["first", "second"] * 2
    assert model(input_ids=ids, adapter_names=names).past_key_values is None
    assert model(input_ids=ids, adapter_names=["first"] * 4).past_key_values.get_seq_length() == 6
    with pytest.raises(NotImplementedError, match="use one batch for each adapter"):
        model(input_ids=ids, adapter_names=names, use_cache=True)
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(NotImplementedError, match="DynamicCache"):
        model(input_ids=ids, adapter_names=names, past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"past_key_values": None}, "past_key_values belongs"),
        ({"attention_mask": torch.ones(4, 7, dtype=torch.int64)}, "attention_mask longer than the 1 tokens"),
        ({"mems": [torch.zeros(6, 4, 16)]}, "list cannot be shared"),
        ({"cache_params": [torch.zeros(4, 16)]}, "list cannot be shared"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_the_next_step_of_a_decode_loop_is_refused(arguments, what):
    """A mixed batch returned no cache, so the last token alone would be all that the model sees.

    Tried too: `StaticCache` by position and by name, `use_mems` and `use_cache`, one adapter's name for all rows.
    """
    model = adapters(ARCHITECTURES["llama"].make(), target_density=0.2)
    with pytest.raises(NotImplementedError, match=f"{what}.* use one batch for each adapter"):
        model(input_ids=torch.full((4, 1), 5), adapter_names=["first", "second"] * 2, **arguments)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_batch_as_large_as_another_dimension(rows):
    """T5's relative positions are (length, length): with as many rows they look like a batch."""
    make, _, _ = ARCHITECTURES["t5"]
    model = adapters(make())
    names = [["first", "second"][row % 2] for row in range(rows)]
    torch.manual_seed(1)
    ids = {"input_ids": torch.randint(2, 50, (rows, 4)), "decoder_input_ids": torch.randint(2, 50, (rows, 4))}
    torch.testing.assert_close(
        model(**ids, adapter_names=names).logits, alone(model, names, **ids), atol=1e-5, rtol=1e-4
    )


class SequenceFirst(nn.Module):
    """Works on (length, rows, features), as some models do inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1)


@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_rows_that_are_not_the_first_dimension(length):
    model = adapters(SequenceFirst(), target_density=1.0)
    x = torch.randn(5, length, 4)
    actual = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[row : row + 1])
        else:
            model.set_adapter(name)
            expected = model(x[row : row + 1])
        torch.testing.assert_close(actual[row : row + 1], expected)


class Routed(nn.Module):
    """Experts that get the tokens meant for them, in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        out = torch.zeros_like(tokens)
        for sign, expert in enumerate(self.experts):
            mine = torch.nonzero((tokens[:, 0] > 0) == bool(sign)).squeeze(1).flip(0)
            out[mine] = expert(tokens[mine])
        return out.reshape(x.shape)


@pytest.mark.parametrize("seed", range(8))
def test_tokens_that_are_not_in_the_order_of_the_rows(seed):
    """Some seeds give each expert as many tokens as it would have if they were."""
    model = adapters(Routed(), target_density=1.0)
    x = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(seed))
    actual = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        own = model(x[row : row + 1], adapter_names=[name])
        torch.testing.assert_close(actual[row : row + 1], own)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_generation(name, beams):
    model = adapters(ARCHITECTURES[name].make(), target_density=0.2)
    torch.manual_seed(2)
    ids = torch.randint(3, 50, (5, 6))
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    actual = model.generate(**inputs, **settings, adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = model.generate(**own, **settings, adapter_names=[adapter])
        assert actual[row].tolist() == expected[0].tolist()
    assert not any("forward" in vars(module) for module in model.modules()), "nothing stays replaced"


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding_window", "hybrid", "offloaded", None])
@pytest.mark.parametrize("name", ["llama", "t5", "gemma3", "mamba"])
def test_generation_with_any_cache(name, cache):
    model = adapters(ARCHITECTURES[name].make(), target_density=0.2)
    ids = torch.randint(3, 50, (5, 6), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"cache_implementation": cache} if cache else {"use_cache": False}
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    actual = model.generate(input_ids=ids, **settings, adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        own = model.generate(input_ids=ids[row : row + 1], **settings, adapter_names=[adapter])
        assert actual[row].tolist() == own[0].tolist()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_sequences_that_end_early_are_padded_and_scores_come_along(name):
    model = adapters(ARCHITECTURES[name].make(), target_density=0.5)
    ids = torch.randint(3, 50, (6, 5), generator=torch.Generator().manual_seed(3))
    names = ["first", "second", "__base__"] * 2
    free = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, adapter_names=names)
    eos = int(free[1, -4])  # so that some rows end before others
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": eos, "pad_token_id": 1}
    told = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    actual = model.generate(input_ids=ids, **settings, **told, adapter_names=names)
    assert torch.equal(actual.sequences, model.generate(input_ids=ids, **settings, adapter_names=names))
    for start, adapter in enumerate(names[:3]):
        own = model.generate(input_ids=ids[start::3], **settings, **told, adapter_names=[adapter] * 2)
        width = own.sequences.shape[1]
        assert torch.equal(actual.sequences[start::3, :width], own.sequences)
        assert bool((actual.sequences[start::3, width:] == 1).all())
        for kind in ("scores", "logits"):
            for mine, theirs in zip(actual[kind], own[kind], strict=False):
                assert torch.equal(mine[start::3], theirs)
            assert all(not mine[start::3].any() for mine in actual[kind][len(own[kind]) :])
    with pytest.raises(NotImplementedError, match="hidden_states"):
        model.generate(input_ids=ids, **settings, **told, output_hidden_states=True, adapter_names=names)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["first", "second"], "got 2 and 5 respectively"),
        (["first"] * 6, "got 6 and 5 respectively"),
        (["first", "first", "first", "first", "c"], "non-existing adapter.*: c"),
        ("aaaaa", "must be a list"),
        ([], "must be a list"),
        ([0, 1, 2, 3, 4], "must be a list"),
    ],
)
def test_names_that_do_not_fit(bert, inputs, names, reason):
    with pytest.raises(ValueError, match=reason):
        bert(**inputs, adapter_names=names)


def test_states_in_which_rows_cannot_differ(bert, inputs):
    with pytest.raises(ValueError, match="when the model is in training mode"):
        bert.train()(**inputs, adapter_names=NAMES)
    bert.eval()
    bert.merge_adapter()
    with pytest.raises(ValueError, match="there are merged adapters, please call `unmerge_adapter` first"):
        bert(**inputs, adapter_names=NAMES)
    bert.unmerge_adapter()
    bert.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="disabled"):
        bert(**inputs, adapter_names=NAMES)
    bert.base_model.enable_adapter_layers()
    with bert.disable_adapter():  # PEFT itself does not look at the names then
        base = bert(**inputs).logits
        assert torch.equal(bert(**inputs, adapter_names=NAMES).logits, base)
    assert bert(**inputs, adapter_names=NAMES).logits.shape == (5, 2)


def test_an_error_on_the_way_leaves_the_model_as_it_was(bert, inputs):
    before = bert(**inputs).logits
    with pytest.raises(IndexError):
        bert(input_ids=inputs["input_ids"] + 1000, adapter_names=NAMES)
    assert not any("forward" in vars(module) for module in bert.modules())
    assert torch.equal(bert(**inputs).logits, before)


def test_rows_equal_loras_where_both_can(tiny_bert, inputs):
    """The same call on LoRA: names, order and "__base__" mean the same."""
    lora = get_peft_model(
        tiny_bert(), LoraConfig(target_modules=["query"], init_lora_weights=False), adapter_name="first"
    )
    lora.add_adapter("second", LoraConfig(target_modules=["query"], init_lora_weights=False))
    ours = adapters(tiny_bert(), target_modules=["query"], target_density=0.01)
    for model in (lora.eval(), ours):
        mixed = model(**inputs, adapter_names=NAMES).logits
        torch.testing.assert_close(mixed, alone(model, NAMES, **inputs), atol=1e-5, rtol=1e-4)
