"""The notebook of the main job runs from top to bottom."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_notebook_runs_and_learns_its_task(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    shutil.copy(EXAMPLES / "common.py", tmp_path)
    shutil.copytree(EXAMPLES / "acceptability", tmp_path / "acceptability")
    notebook = nbformat.read(EXAMPLES / "diff_pruning.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}})
    client.execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    before, after = (float(word.rstrip("%")) for word in printed.split("held-out accuracy: ")[1].split() if "%" in word)
    assert before < 70
    assert after > 80
