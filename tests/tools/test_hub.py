"""Sharing adapters on the Hub, for which a local stand-in answers (tests/helpers/hub.py).

Processes of their own talk to it, because the tests run offline.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub import client, serve
from huggingface_hub import ModelCard, create_repo, upload_folder
from huggingface_hub.constants import HF_HUB_CACHE
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from diffpeft import DiffPruningConfig, push_to_hub
from diffpeft.layer.tensors import VALUES
from diffpeft.tools import cli

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # saving looks for the base on the Hub

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
IDS = torch.arange(24).view(3, 8)
DENSITIES = {"first": 0.02, "second": 0.01}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.tolist()


def with_peft(repo, **where):
    base = AutoModelForSequenceClassification.from_pretrained("user/base")
    return logits(PeftModel.from_pretrained(base, repo, **where))


def with_transformers(repo, **where):
    model = AutoModelForSequenceClassification.from_pretrained("user/base")
    model.load_adapter(repo, adapter_kwargs=where)
    return logits(model)


def with_auto_class(repo, **where):
    return logits(AutoPeftModelForSequenceClassification.from_pretrained(repo, **where))


def with_auto_class_of_transformers(repo, **where):
    return logits(AutoModelForSequenceClassification.from_pretrained(repo, adapter_kwargs=where))


def command_line(*arguments):
    """Exit code, standard output, and the files that are in the cache."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    cached = {file.name for file in Path(HF_HUB_CACHE).rglob("snapshots/*/*")}
    return result.exit_code, result.stdout, cached


LOADERS = [with_peft, with_transformers, with_auto_class, with_auto_class_of_transformers]


def publish(directory):
    """The base; both adapters, one after the other, pushed to one repository and uploaded as a folder to another."""
    AutoModelForSequenceClassification.from_pretrained(directory / "base").push_to_hub("user/base")
    create_repo("user/folder")
    for name in DENSITIES:
        base = AutoModelForSequenceClassification.from_pretrained("user/base")
        model = PeftModel.from_pretrained(base, directory / name)
        model.push_to_hub("user/task")
        push_to_hub(model, "user/card", metrics={"accuracy": DENSITIES[name]})
        upload_folder(repo_id="user/folder", folder_path=directory / name)


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory):
    """A directory with a base and two adapters of it, and the logits of all three."""
    directory = tmp_path_factory.mktemp("made")
    tiny_bert().save_pretrained(directory / "base")
    expected = {"base": logits(tiny_bert())}
    for name, density in DENSITIES.items():
        base = tiny_bert()
        base.name_or_path = base.config._name_or_path = "user/base"
        config = DiffPruningConfig(task_type="SEQ_CLS", target_density=density, init_weights=False)
        model = get_peft_model(base, config)
        model.base_model.magnitude_prune()
        model.save_pretrained(directory / name)
        expected[name] = logits(model)
    assert len({str(values) for values in expected.values()}) == 3
    return directory, expected


@pytest.fixture(scope="module")
def hub(made, tmp_path_factory):
    """The Hub after all that `publish` does."""
    with serve() as hub:
        with client(hub, tmp_path_factory.mktemp("publisher")) as publisher:
            publisher.submit(publish, made[0]).result()
        yield hub


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    """Another process, with an empty cache."""
    with client(hub, tmp_path_factory.mktemp("reader")) as reader:
        yield reader


def test_a_push_uploads_the_adapter_in_one_commit_and_the_next_replaces_it(made, hub):
    _, first, second = hub.repos["user/task"]
    assert first.changed == {WEIGHTS, CONFIG, CARD}
    assert {WEIGHTS, CONFIG} <= second.changed
    assert second.files.keys() == first.files.keys()
    for name, commit in (("first", first), ("second", second)):
        saved = made[0] / name
        assert commit.files[WEIGHTS] == (saved / WEIGHTS).read_bytes()
        config, expected = json.loads(commit.files[CONFIG]), json.loads((saved / CONFIG).read_text())
        assert config["base_model_name_or_path"] == "user/base"
        for field in ("nnz_pattern", "base_fingerprint", "heads_checksum", "target_density", "format_version"):
            assert config[field] == expected[field]


def check_card(text: str, saved: Path, density: str):
    card = ModelCard(text)
    assert card.data.base_model == "user/base"
    assert card.data.library_name == "peft"
    assert {"diffpeft", "diff-pruning"} <= set(card.data.tags)
    assert f"density {density}" in card.text
    assert f"{(saved / WEIGHTS).stat().st_size:,} bytes" in card.text


def test_an_uploaded_directory_brings_its_card_and_the_next_replaces_it(made, hub):
    _, first, second = hub.repos["user/folder"]
    assert first.changed == second.changed == {WEIGHTS, CONFIG, CARD}
    check_card(first.files[CARD].decode(), made[0] / "first", "2.000%")
    check_card(second.files[CARD].decode(), made[0] / "second", "1.000%")


def test_our_push_brings_the_card_with_results_and_the_repositorys_name(made, hub):
    """transformers' own writes a blank card over the one that was saved."""
    _, first, second = hub.repos["user/card"]
    assert first.changed == {WEIGHTS, CONFIG, CARD}
    for commit, name, density in ((first, "first", "2.000%"), (second, "second", "1.000%")):
        text = commit.files[CARD].decode()
        check_card(text, made[0] / name, density)
        assert f"| accuracy | {DENSITIES[name]:.4g} |" in text
        assert '.from_pretrained("user/card")' in text


def test_a_model_without_an_adapter_is_not_pushed(tiny_bert):
    with pytest.raises(ValueError, match="no diff-pruning adapter"):
        push_to_hub(tiny_bert(), "user/nothing")


@pytest.mark.parametrize("load", LOADERS)
def test_a_fresh_process_loads_by_repository(load, made, reader):
    assert reader.submit(load, "user/task").result() == made[1]["second"]


@pytest.mark.parametrize("load", LOADERS)
def test_the_first_commit_still_gives_the_first_adapter(load, made, hub, reader):
    first = hub.repos["user/task"][1].sha
    assert reader.submit(load, "user/task", revision=first).result() == made[1]["first"]


@pytest.mark.parametrize("load", LOADERS)
def test_one_flipped_bit_on_the_server_is_refused(load, hub, reader):
    files = hub.repos["user/task"][-1].files
    weights = bytearray(files[WEIGHTS])
    header = int.from_bytes(weights[:8], "little")
    places = json.loads(weights[8 : 8 + header])
    values = next(place for name, place in places.items() if f".{VALUES}." in name and place["shape"] != [0])
    weights[8 + header + values["data_offsets"][0]] ^= 1
    repo = f"user/damaged-{load.__name__}"
    hub.commit(repo, "damage", {**files, WEIGHTS: bytes(weights)})
    with pytest.raises(ValueError, match="checksum of its positions and values is wrong: the file is damaged"):
        reader.submit(load, repo).result()


@pytest.fixture
def newcomer(hub, tmp_path):
    """A process that has nothing of the Hub yet."""
    with client(hub, tmp_path / "cache") as newcomer:
        yield newcomer


def test_the_command_line_takes_repositories(made, newcomer, tmp_path):
    code, output, cached = newcomer.submit(command_line, "inspect", "user/task", "--json").result()
    total = json.loads(output)["total"]
    nnz = json.loads((made[0] / "second" / CONFIG).read_text())["nnz_pattern"]
    assert (code, total["nonzeros"]) == (0, sum(nnz.values()))
    assert total["bytes"] == (made[0] / "second" / WEIGHTS).stat().st_size
    assert cached == {WEIGHTS, CONFIG, "config.json"}, "of the base only its configuration is needed"
    assert newcomer.submit(command_line, "verify", "user/task", "user/folder").result()[0] == 0
    assert newcomer.submit(command_line, "diff", "user/task", "user/card", "--base", "user/base").result()[0] == 0
    code, _, cached = newcomer.submit(command_line, "merge", "user/task", tmp_path / "merged").result()
    assert (code, "model.safetensors" in cached) == (0, True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(torch.tensor(logits(merged)), torch.tensor(made[1]["second"]), atol=1e-6)
    arguments = "extract", "user/base", tmp_path / "merged", tmp_path / "again", "--task-type", "SEQ_CLS"
    assert newcomer.submit(command_line, *arguments, "--density", 0.5).result()[0] == 0
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["base_model_name_or_path"] == "user/base"
    with pytest.raises(ValueError, match="user/none is no directory, and not to be had from the Hub"):
        newcomer.submit(command_line, "inspect", "user/none").result()
    with pytest.raises(ValueError, match=r"user/base has no adapter_config\.json"):
        newcomer.submit(command_line, "inspect", "user/base").result()


def test_the_revision_of_the_config_is_the_one_that_is_merged(made, hub, newcomer, tmp_path):
    files = hub.repos["user/base"][-1].files
    old = hub.commit("user/moving", "v1", files).sha
    other = bytearray(files["model.safetensors"])
    other[-400:] = bytes(400)
    hub.commit("user/moving", "v2", {"model.safetensors": bytes(other)})
    shutil.copytree(made[0] / "second", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    for revision, code in ((old, 0), (None, 1)):
        told = {**config, "base_model_name_or_path": "user/moving", "revision": revision}
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps(told))
        arguments = "merge", tmp_path / "adapter", tmp_path / f"merged{code}"
        if code:
            with pytest.raises(ValueError, match="made from other weights than user/moving"):
                newcomer.submit(command_line, *arguments).result()
        else:
            assert newcomer.submit(command_line, *arguments).result()[0] == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged0")
    assert torch.allclose(torch.tensor(logits(merged)), torch.tensor(made[1]["second"]), atol=1e-6)
