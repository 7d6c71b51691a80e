"""Sphinx's settings. `sphinx-build -W docs docs/_build` makes the documentation."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffpeft

project, author, copyright = "diffpeft", "the diffpeft authors", "the diffpeft authors"  # noqa: A001 - Sphinx's name
version = release = diffpeft.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"diffpeft {version}"
html_show_sourcelink = False
html_static_path = html_css_files = ["style.css"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
default_role = "literal"  # docstrings are in plain English with Markdown's backticks
maximum_signature_line_length = 80
napoleon_use_ivar = True


def _plain(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Names in docstrings that stand as [`name`] lose their brackets, and bars mean magnitudes."""
    lines[:] = [re.sub(r"\[(`[^`]+`)\]", r"\1", line).replace("|", r"\|") for line in lines]


def _read(app: Any, docname: str, source: list[str]) -> None:
    """Kept outputs of examples, which are Markdown too, become downloads: they are no pages of the documentation.

    The page of results is there once its script has run.
    """
    if docname == "index" and not Path(__file__).with_name("results.md").exists():
        source[0] = source[0].replace("\nresults\n", "\n")
    link = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+(?:examples/|README)[^)#]*\.md)\)")
    source[0] = link.sub(lambda m: "{download}`" + " ".join(m[1].split()) + f" <{m[2]}>`", source[0])


def setup(app: Any) -> None:
    """Connect what reads docstrings and pages."""
    app.connect("autodoc-process-docstring", _plain, priority=400)
    app.connect("source-read", _read)
