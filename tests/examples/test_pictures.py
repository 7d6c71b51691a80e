"""The pictures of the documentation come out of their scripts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


@pytest.mark.parametrize(
    ("script", "picture", "options"),
    [("phases", "phases.png", ["--output"]), ("runs", "runs.png", ["--draw", "--output_dir"])],
)
def test_a_picture_is_drawn(script, picture, options, tmp_path):
    shutil.copy(PICTURES / "runs.json", tmp_path)
    place = tmp_path / picture if script == "phases" else tmp_path
    subprocess.run([sys.executable, PICTURES / f"{script}.py", *options, place], check=True)
    assert (tmp_path / picture).stat().st_size > 10_000
