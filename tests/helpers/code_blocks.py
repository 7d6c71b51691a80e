"""The code blocks of the documentation, and how they are run. No heavy imports, as in hub.py."""

import os
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXEMPT = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
HIDDEN = re.compile(r"<!-- run first\n(.*?)-->", re.DOTALL)


class Block(NamedTuple):
    """A code block of a page."""

    line: int
    """Lines of the page before it."""
    language: str
    code: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, except those behind a comment that says why they cannot run.

    What a reader has at hand, but is not shown, stands as Python in a comment that begins with "run first".
    """
    text = page.read_text()
    found = [Block(text[: m.start(1)].count("\n"), "python", m[1]) for m in HIDDEN.finditer(text)]
    for match in FENCE.finditer(text):
        if not EXEMPT.search(text[: match.start()]):
            found.append(Block(text[: match.start(2)].count("\n"), match[1], match[2]))
    return [block for block in sorted(found) if block.language in languages]


def run(page: Path, directory: Path) -> None:
    """Execute the Python of a page, block by block in one namespace, in a directory of its own."""
    import datasets
    import stand_ins
    import transformers

    datasets.load_dataset = stand_ins.load_dataset
    transformers.utils.logging.disable_progress_bar()
    os.chdir(directory)
    namespace = {"__name__": "__main__"}
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()):
        for block in blocks(page, "python"):
            try:
                exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
            except BaseException as error:
                raise AssertionError(f"{page}:{block.line}\n{block.code}\n{printed.getvalue()[-2000:]}") from error
