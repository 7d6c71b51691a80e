"""Every code block of README and docs runs, on small models that stand in for those on the Hub."""

import ast
import configparser
import functools
import re
import shlex
from pathlib import Path

import click
import pytest
from code_blocks import PAGES, ROOT, Block, blocks, run
from hub import client, serve
from stand_ins import publish
from transformers import TrainingArguments
from typer.main import get_command

from diffpeft.tools.cli import app

pytestmark = pytest.mark.slow
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
INLINE = re.compile(r"`((?:python examples/|torchrun |accelerate launch |diffpeft )[^`\n]+)`")


def names(page) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def hub():
    """A hub with the stand-ins."""
    with serve() as hub:
        publish(hub)
        yield hub


@pytest.fixture(scope="session")
def reader(hub, tmp_path_factory):
    """A process that is connected to the hub; one for all pages, as imports take longest."""
    with client(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=names)
def test_the_python_of_a_page_runs(page, reader, tmp_path):
    reader.submit(run, page, tmp_path).result(timeout=600)


def commands(page) -> list[list[str]]:
    """The commands in a page's shell blocks, as words."""
    lines = [line for block in blocks(page, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]


def check_diffpeft(words: list[str], whole: bool) -> None:
    """Fail unless the command exists, takes the options, and, if it is `whole`, these arguments."""
    group = get_command(app)
    if not words or words == ["--help"]:
        return
    assert words[0] in group.commands, f"diffpeft {words[0]} does not exist"
    command = group.commands[words[0]]
    if whole:
        try:
            command.make_context(words[0], words[1:])
        except click.exceptions.ClickException as error:
            pytest.fail(f"diffpeft {shlex.join(words)}: {error.format_message()}")
    options = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in words[1:] if word.startswith("-") and word.split("=")[0] not in {*options, "--help"}]
    assert not unknown, f"diffpeft {words[0]} has no {unknown}"


def sources(script: Path) -> set[Path]:
    """A script, and all of the examples that it imports, from one another too."""
    found, new = set(), {script if script.is_file() else script / "__main__.py"}
    while new:
        found |= new
        names = {
            name for file in new for name in re.findall(r"^(?:from|import) ([\w.]+)", file.read_text(), re.MULTILINE)
        }
        new = {file for name in names for file in (ROOT / "examples").rglob(f"{name.replace('.', '/')}.py")} - found
    return found


@functools.cache
def options_of(script: str) -> set[str]:
    """The options that a script defines; not by --help, which would import torch for each."""
    text = "\n".join(file.read_text() for file in sources(ROOT / script))
    options = set(re.findall(r'"--(\w+)"', text)) | set(re.findall(r"^    (\w+): .*= field\(", text, re.MULTILINE))
    if 'f"--{' in text:  # named in a loop
        options |= set(re.findall(r'"(\w+)"', text))
    return options | {"help"} | (set(TrainingArguments.__dataclass_fields__) if "HfArgumentParser" in text else set())


def check_script(words: list[str]) -> None:
    """Fail unless the script exists and takes the options, and the files of the repository that are named exist."""
    script, *arguments = words
    assert (ROOT / script).exists(), f"{script} does not exist"
    told = {word[2:].split("=")[0] for word in arguments if word.startswith("--")}
    assert told <= options_of(script), f"{script} has no {told - options_of(script)}"


def check(words: list[str], whole: bool) -> None:
    """Check a command by its kind; one that is none of ours is left alone."""
    for word in words:
        if word.startswith(("examples/", "docs/", "tests/")):
            assert (ROOT / word).exists(), f"{word} does not exist"
    if words[0] == "diffpeft":
        check_diffpeft(words[1:], whole)
    script = next(
        (i for i, word in enumerate(words) if re.match(r"(examples|docs)/.*(\.py|/acceptability)$", word)), None
    )
    if script is not None:
        check_script(words[script:])
    if words[:2] == ["pip", "install"]:
        extras = configparser.ConfigParser(interpolation=None)
        extras.read(ROOT / "setup.cfg")
        asked = [one for word in words if (found := re.match(r"\.\[(.+)\]$", word)) for one in found[1].split(",")]
        assert set(asked) <= set(extras["options.extras_require"]), asked


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=names)
def test_the_commands_of_a_page_exist(page):
    for words in commands(page):
        check(words, whole=True)
    for line in INLINE.findall(page.read_text()):
        check(shlex.split(line), whole=False)


def test_a_block_is_found_with_its_line_and_one_may_say_why_it_cannot_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\na = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\nb = 2\n```\n\n"
        "<!-- run first\nc = 3\n-->\n\n```bash\ndiffpeft --help\n```\n"
    )
    assert blocks(page, "python") == [Block(3, "python", "a = 1\n"), Block(12, "python", "c = 3\n")]
    assert commands(page) == [["diffpeft", "--help"]]
    with pytest.raises(AssertionError, match="does not exist"):
        check(["diffpeft", "shrink", "adapter"], whole=True)
    with pytest.raises(AssertionError, match="has no"):
        check(["diffpeft", "inspect", "--nothing"], whole=False)


def test_errors_that_are_explained_are_those_of_the_package():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "diffpeft").rglob("*.py")]
    strings = [
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is str
    ]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    told = [
        message for line in re.findall(r"^### (.*)$", page, re.MULTILINE) for message in re.findall("`(.+?)`", line)
    ]
    parts = [part.strip() for message in told for part in message.split("…") if len(part.strip()) > 3]
    plain = "\n".join(strings).replace("`", "'")
    unknown = [part for part in parts if part not in plain]
    assert len(parts) > 50
    assert not unknown, "messages that the package no longer gives"
