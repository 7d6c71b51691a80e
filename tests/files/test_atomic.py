import json
import os

import pytest
import torch
from architectures import pruned
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from diffpeft import DiffPruningConfig
from diffpeft.files import atomic
from diffpeft.files.adapter import read_adapter, write_adapter
from diffpeft.files.encoding import checksums_of


class Killed(BaseException):
    """What ends a process: no handler after it gets anything done."""


class Mortal:
    """Calls on the file system, of which the one with the number `last` and all after it end in `error`."""

    def __init__(self, monkeypatch, last, error=Killed, forever=True):
        self.calls, self.last, self.error, self.forever = 0, last, error, forever
        monkeypatch.setattr(atomic, "save_file", self.wrap(atomic.save_file))
        for owner, name in ((os, "replace"), (os, "fsync"), (atomic.Path, "unlink"), (atomic.Path, "write_text")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.last or (self.forever and self.calls > self.last):
                if self.calls == self.last and function.__name__ in ("save_file", "write_text"):
                    function(*args, **kwargs)
                    path = args[0] if function.__name__ == "write_text" else args[1]
                    os.truncate(path, os.path.getsize(path) // 2)
                raise self.error("killed")
            return function(*args, **kwargs)

        return call


def with_peft(directory, model):
    model.save_pretrained(directory)


def without_a_model(directory, model):
    config = model.peft_config["default"]
    parameters = {n: p for n, p in model.get_base_model().named_parameters() if "modules_to_save" in n}
    heads = {n.replace(".modules_to_save.default", ""): p for n, p in parameters.items()}
    shapes = {name: torch.Size((numel,)) for name, numel in model.base_model.adapted_parameters().items()}
    write_adapter(directory, config, model.base_model.get_diff(), shapes, heads)


def loaded(make, directory):
    """What the adapter makes of the base, as one tensor; None where PEFT refuses to load it."""
    try:
        model = PeftModel.from_pretrained(make(), directory)
    except ValueError:
        return None
    return torch.cat([p.flatten() for p in model.merge_and_unload().state_dict().values()])


@pytest.fixture
def adapters(tiny_bert):
    """Two adapters on other modules, one with a head and one without: no half of one fits the other."""
    one = pruned(tiny_bert(), target_density=0.1)
    two = pruned(tiny_bert(), target_density=0.01, target_modules=["query", "key"])
    for parameter in one.base_model.model.classifier.modules_to_save.parameters():
        parameter.data.fill_(7.0)
    return one, two


@pytest.mark.parametrize("write", [with_peft, without_a_model])
@pytest.mark.parametrize("order", [1, -1])
def test_a_kill_at_any_moment_leaves_the_old_adapter_or_the_new(
    adapters, tiny_bert, tmp_path, monkeypatch, write, order
):
    old, new = adapters[::order]
    write(tmp_path / "old", old)
    write(tmp_path / "new", new)
    before, after = loaded(tiny_bert, tmp_path / "old"), loaded(tiny_bert, tmp_path / "new")
    assert not torch.equal(before, after)
    seen = []
    for last in range(1, 100):
        directory = tmp_path / f"killed{last}"
        write(directory, old)
        with monkeypatch.context() as patch:
            mortal = Mortal(patch, last)
            try:
                write(directory, new)
            except Killed:
                atomic._staged.clear()  # its process is gone
            else:
                break
        found = loaded(tiny_bert, directory)
        assert found is not None
        seen.append("old" if torch.equal(found, before) else "new")
        assert torch.equal(found, before) or torch.equal(found, after)
        shapes = {n: p.shape for n, p in tiny_bert().named_parameters()}
        read = read_adapter(directory, shapes)[1]
        expected = (old if seen[-1] == "old" else new).base_model.get_diff()
        assert {n: v.numel() for n, (_, v) in read.items()} == {n: v.numel() for n, (_, v) in expected.items()}
        write(directory, old)  # after a kill any other save works, by the same rules
        assert torch.equal(loaded(tiny_bert, directory), before)
        write(directory, new)
        assert torch.equal(loaded(tiny_bert, directory), after)
        assert not [name for name in os.listdir(directory) if name.endswith(".new")]
    assert mortal.calls == last - 1
    assert seen == sorted(seen, reverse=True), "once new, it stays new"
    assert set(seen) == {"old", "new"}


@pytest.mark.parametrize("write", [with_peft, without_a_model])
def test_a_kill_during_the_first_save_leaves_none_or_the_new(adapters, tiny_bert, tmp_path, monkeypatch, write):
    write(tmp_path / "new", adapters[0])
    after = loaded(tiny_bert, tmp_path / "new")
    for last in range(1, 100):
        directory = tmp_path / f"killed{last}"
        with monkeypatch.context() as patch:
            Mortal(patch, last)
            try:
                write(directory, adapters[0])
            except Killed:
                atomic._staged.clear()
            else:
                break
        found = loaded(tiny_bert, directory)
        assert found is None or torch.equal(found, after)
        write(directory, adapters[0])
        assert torch.equal(loaded(tiny_bert, directory), after)
    assert last > 5


@pytest.mark.parametrize("write", [with_peft, without_a_model])
def test_a_failure_before_the_weights_are_in_place_leaves_the_old_adapter(
    adapters, tiny_bert, tmp_path, monkeypatch, write
):
    old, new = adapters
    write(tmp_path, old)
    names, expected = sorted(os.listdir(tmp_path)), loaded(tiny_bert, tmp_path)
    for last in range(1, 6):
        with monkeypatch.context() as patch:
            Mortal(patch, last, error=OSError, forever=False)
            with pytest.raises(OSError, match="killed"):
                write(tmp_path, new)
        assert sorted(os.listdir(tmp_path)) == names
        assert torch.equal(loaded(tiny_bert, tmp_path), expected)


def test_a_config_saved_alone_does_not_bring_in_weights_that_a_failed_process_left(adapters, tiny_bert, tmp_path):
    old, new = adapters
    old.save_pretrained(tmp_path)
    expected = loaded(tiny_bert, tmp_path)
    atomic.stage_weights(tmp_path, {"a.diffpruning_values.b": torch.ones(3)})
    atomic._staged.clear()  # another process, which has ended
    old.peft_config["default"].save_pretrained(str(tmp_path))
    assert torch.equal(loaded(tiny_bert, tmp_path), expected)
    new.save_pretrained(tmp_path)
    assert not torch.equal(loaded(tiny_bert, tmp_path), expected)


def test_adapters_of_other_methods_are_saved_as_ever(tiny_bert, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not isinstance(PeftConfig.from_pretrained(tmp_path), DiffPruningConfig)


def test_files_have_the_permissions_that_the_umask_gives(adapters, tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            adapters[0].save_pretrained(tmp_path / f"{mask}")
        finally:
            os.umask(before)
        for file in (tmp_path / f"{mask}").iterdir():
            assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file.name


@pytest.mark.parametrize("write", [with_peft, without_a_model])
def test_the_checksums_in_the_config_are_those_of_the_file(adapters, tmp_path, write):
    for number, adapter in enumerate(adapters):
        write(tmp_path / f"{number}", adapter)
        told = json.loads((tmp_path / f"{number}" / "adapter_config.json").read_text())
        found = checksums_of(load_file(tmp_path / f"{number}" / "adapter_model.safetensors"))
        assert (told["heads_checksum"], told["diff_checksum"]) == found
        assert (found.heads is None) == bool(number)
