"""The command line, as a user types it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from architectures import ARCHITECTURES, pruned
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from diffpeft import DiffPruningConfig
from diffpeft.files import atomic
from diffpeft.sparse.diff import overlap
from diffpeft.tools import cli


@pytest.fixture(scope="module")
def adapters(tiny_bert, tmp_path_factory):
    """A base model and three adapters of it on disk: one, two, and a copy of one with other values."""
    directory = tmp_path_factory.mktemp("cli")
    tiny_bert().save_pretrained(directory / "base")
    for seed, name in enumerate(("one", "two")):
        base = type(tiny_bert()).from_pretrained(directory / "base")
        torch.manual_seed(seed)
        settings = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "init_weights": False}
        model = get_peft_model(base, DiffPruningConfig(target_density=0.02, **settings))
        model.base_model.magnitude_prune()
        model.save_pretrained(directory / name)
    return directory


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def load(directory, name):
    from transformers import BertForSequenceClassification

    return PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(directory / "base"), directory / name
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_inspect_tells_what_is_in_an_adapter(adapters, dtype):
    model = load(adapters, "one")
    model.base_model.cast_values(dtype)
    model.save_pretrained(adapters / dtype)
    result = run("inspect", adapters / dtype, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    diff = model.base_model.get_diff()
    assert {row["parameter"]: row["nonzeros"] for row in found["rows"]} == {k: v.numel() for k, (_, v) in diff.items()}
    assert found["total"]["nonzeros"] == sum(v.numel() for _, v in diff.values())
    assert found["total"]["norm"] == pytest.approx(float(torch.cat([v for _, v in diff.values()]).norm()))
    tensors = load_file(adapters / dtype / "adapter_model.safetensors")
    payload = sum(t.numel() * t.element_size() for n, t in tensors.items() if "diffpruning" in n)
    assert sum(row["bytes"] for row in found["rows"]) == payload
    assert "query.weight" in run("inspect", adapters / dtype).output
    assert run("verify", adapters / dtype).exit_code == 0


def test_verify_finds_damage_and_says_where(adapters, tmp_path):
    assert run("verify", adapters / "one", adapters / "two").exit_code == 0
    for file in (adapters / "one").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    data[-40] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(data))
    result = run("verify", adapters / "two", tmp_path, "--json")
    assert result.exit_code == 1
    whole, damaged = json.loads(result.stdout)["rows"]
    assert whole["whole"]
    assert not damaged["whole"]
    assert "damaged" in damaged["found"]
    assert "adapter_model.safetensors" in damaged["found"]


def test_verify_tells_another_base_of_the_same_shape(adapters, tiny_bert, tmp_path):
    tiny_bert(seed=5).save_pretrained(tmp_path)
    result = run("verify", adapters / "one", "--base", tmp_path, "--json")
    (row,) = json.loads(result.stdout)["rows"]
    assert (result.exit_code, row["whole"]) == (1, False)
    assert "made from other weights than" in row["found"]


@pytest.mark.parametrize("command", ["merge", "export", "combine"])
def test_a_base_of_other_weights_is_refused_unless_forced(adapters, tiny_bert, tmp_path, command):
    """Tried too: the same base in another dtype, which is right."""
    tiny_bert(seed=5).save_pretrained(tmp_path / "other")
    arguments = {"merge": [tmp_path / "out"], "export": [tmp_path / "out", "--to", "coo"], "combine": []}[command]
    output = ["-o", tmp_path / "out"] if command == "combine" else []
    typed = [command, adapters / "one", *arguments, *output, "--base", tmp_path / "other"]
    assert "made from other weights than" in str(run(*typed).exception)
    assert not (tmp_path / "out").exists()
    assert run(*typed, "--force").exit_code == 0
    tiny_bert().bfloat16().save_pretrained(tmp_path / "rounded")
    rounded = [tmp_path / "rounded" if one == tmp_path / "other" else one for one in typed]
    shutil.rmtree(tmp_path / "out") if command != "export" else (tmp_path / "out").unlink()
    assert run(*rounded).exit_code == 0


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "words": 61},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_embeddings_that_the_file_has_whole_and_a_diff_too(name, config, tmp_path):
    """PEFT copies embeddings into the file. Tried too: a resized vocabulary, which has to reach the merged model."""
    ARCHITECTURES[name].make().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    words = config.pop("words", None)
    if words:
        base.resize_token_embeddings(words)
    model = pruned(base, task_type="CAUSAL_LM", **config)
    for head in [one for one in model.modules() if isinstance(one, ModulesToSaveWrapper)]:
        torch.nn.init.normal_(head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    assert run("verify", tmp_path / "adapter").exit_code == 0
    assert run("inspect", tmp_path / "adapter").exit_code == 0
    if name == "llama_tied" and config["target_modules"] in (["embed_tokens"], ["lm_head"]):
        with pytest.raises(ValueError, match="leaves alone"):
            model.merge_and_unload()
        assert "leaves alone" in str(run("merge", tmp_path / "adapter", tmp_path / "merged").exception)
        return
    result = run("merge", tmp_path / "adapter", tmp_path / "merged")
    assert result.exit_code == 0, result.exception
    assert run("combine", tmp_path / "adapter", "-o", tmp_path / "combined").exit_code == 0
    assert run("merge", tmp_path / "combined", tmp_path / "again").exit_code == 0
    expected = model.merge_and_unload().state_dict()
    for merged in (tmp_path / "merged", tmp_path / "again"):
        loaded = AutoModelForCausalLM.from_pretrained(merged).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_diff_of_an_adapter_and_itself_and_another(adapters):
    same = json.loads(run("diff", adapters / "one", adapters / "one", "--json").stdout)["total"]
    assert (same["jaccard"], same["same sign"]) == (1.0, 1.0)
    assert same["cosine"] == pytest.approx(1.0)
    other = json.loads(run("diff", adapters / "one", adapters / "two", "--json").stdout)["total"]
    a, b = (load(adapters, name).base_model.get_diff() for name in ("one", "two"))
    shared = sum(len(set(a[k][0].tolist()) & set(b[k][0].tolist())) for k in a.keys() & b.keys())
    assert other["shared"] == shared
    assert abs(other["cosine"]) < 0.5


def test_overlap_by_hand():
    a = {"x": (torch.tensor([0, 3, 5]), torch.tensor([1.0, 2.0, -1.0])), "y": (torch.tensor([1]), torch.tensor([4.0]))}
    b = {"x": (torch.tensor([3, 5, 9]), torch.tensor([1.0, 1.0, 1.0])), "z": (torch.tensor([2]), torch.tensor([1.0]))}
    whole, parameters = overlap(a, b)
    assert list(parameters) == ["x", "y", "z"]
    assert whole[:5] == (4, 4, 2, 1, 1.0)
    assert whole.jaccard == 2 / 6
    assert whole.cosine == pytest.approx(1 / (22**0.5 * 2))
    assert overlap({}, {})[0].cosine == 0.0


def test_combine_makes_an_adapter_that_loads(adapters):
    command = ["combine", adapters / "one", adapters / "two", "-o", adapters / "both", "-w", 0.5, "-w", 2]
    assert "heads" in str(run(*command).exception)
    result = run(*command, "--target-density", 0.01, "--heads-from", adapters / "two")
    assert result.exit_code == 0, result.output
    one, two, both = (load(adapters, name).base_model for name in ("one", "two", "both"))
    assert both.num_nonzeros() == round(0.01 * both.num_base_parameters())
    assert both.get_diff().keys() <= one.get_diff().keys() | two.get_diff().keys()
    assert torch.equal(*(m.model.classifier.modules_to_save["default"].weight for m in (both, two)))


def test_an_adapter_is_combined_with_itself(adapters):
    one = adapters / "one"
    assert run("combine", one, one, "-o", adapters / "twice", "--heads-from", one).exit_code == 0
    assert run("combine", one, f"{one}/", "-o", adapters / "twice").exit_code == 0
    refused = run("combine", one, adapters / "two", "-o", adapters / "x", "--heads-from", "three")
    assert "use --heads-from with one of these" in str(refused.exception)


@pytest.mark.parametrize("name", ["run[v2]", "out[/x]", "a[red]b", "is :smile: $x_1$"])
def test_names_are_shown_as_they_are(adapters, tmp_path, name):
    shutil.copytree(adapters / "one", tmp_path / "from" / name)
    (tmp_path / "to" / name).mkdir(parents=True)
    for command in (["inspect"], ["verify"], ["diff", adapters / "two"], ["merge"], ["plot"]):
        target = {"merge": [tmp_path / "to" / name / "new"], "plot": [tmp_path / "to" / name / "picture.png"]}
        result = run(*command, tmp_path / "from" / name, *target.get(command[0], []))
        assert result.exit_code == 0, result.output
        assert name.replace(" ", "") in "".join(result.output.split())


@pytest.mark.parametrize("command", ["combine", "extract", "export", "merge"])
def test_a_full_disk_is_one_line_and_leaves_nothing(adapters, tmp_path, monkeypatch, capsys, command):
    def full(*arguments, **options):
        message = "No space left on device"
        raise OSError(message) if command == "merge" else SafetensorError(message)

    load(adapters, "one").merge_and_unload().save_pretrained(adapters / "tuned")
    monkeypatch.setattr(atomic, "save_file", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    output = tmp_path / "new" / "out"
    arguments = {
        "combine": [adapters / "one", "-o", output],
        "extract": [adapters / "base", adapters / "tuned", output],
        "export": [adapters / "one", output, "--to", "super-tuning", "--leave-out"],
        "merge": [adapters / "one", output],
    }[command]
    monkeypatch.setattr(sys, "argv", ["diffpeft", command, *map(str, arguments)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_extract_from_a_fine_tuned_checkpoint(adapters, batch):
    merged = load(adapters, "one").merge_and_unload()
    merged.save_pretrained(adapters / "tuned")
    result = run("extract", adapters / "base", adapters / "tuned", adapters / "again", "--density", 0.5)
    assert result.exit_code == 0, result.output
    logits = merged.eval()(**batch()).logits
    assert torch.allclose(load(adapters, "again").eval()(**batch()).logits, logits, atol=1e-5)
    command = ["extract", adapters / "base", adapters / "tuned", adapters / "small", "--density", 0.5]
    assert run(*command, "--value-dtype", "int8").exit_code == 0
    stored = load_file(adapters / "small" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "_values." in name} == {torch.int8}
    assert torch.allclose(load(adapters, "small").eval()(**batch()).logits, logits, atol=1e-2)
    assert "value_dtype='int4' is not known" in str(run(*command, "--value-dtype", "int4").exception)


def test_merge_writes_a_checkpoint(adapters, batch):
    result = run("merge", adapters / "one", adapters / "merged")
    assert result.exit_code == 0, result.output
    merged = type(load(adapters, "one").get_base_model()).from_pretrained(adapters / "merged")
    assert torch.allclose(merged.eval()(**batch()).logits, load(adapters, "one").eval()(**batch()).logits, atol=1e-6)


def test_export_to_other_formats(adapters, tmp_path):
    refused = run("export", adapters / "one", tmp_path / "st", "--to", "super-tuning")
    assert refused.exit_code == 0 or "leave_out" in str(refused.exception)
    assert run("export", adapters / "one", tmp_path / "s", "--to", "super-tuning", "--leave-out").exit_code == 0
    assert json.loads((tmp_path / "s" / "adapter_config.json").read_text())["peft_type"] == "SUPERTUNING"
    assert run("export", adapters / "one", tmp_path / "one.coo", "--to", "coo").exit_code == 0
    assert any(name.endswith(".indices") for name in load_file(tmp_path / "one.coo"))
    assert "not known" in str(run("export", adapters / "one", tmp_path / "x", "--to", "tar").exception)


def test_plot_draws_a_picture(adapters, tmp_path):
    assert run("plot", adapters / "one", tmp_path / "one.png").exit_code == 0
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["inspect", "nowhere"], "nowhere is no directory"),
        (["inspect", "{one}", "--base", "nowhere"], "give another with --base"),
        (["combine", "{one}", "-o", "{out}", "-w", "1", "-w", "2"], "one weight a diff"),
        (["extract", "{base}", "{base}", "{out}"], "nothing to extract"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(adapters, tmp_path, arguments, reason):
    places = {name: adapters / name for name in ("one", "two", "base")}
    command = [argument.format(out=tmp_path / "out", **places) for argument in arguments]
    code = "import sys; from diffpeft.tools.cli import main; sys.argv[0] = 'diffpeft'; main()"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *command], capture_output=True, text=True)
    assert result.returncode == 1
    assert reason in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
