"""Tutorials as jobs: a mistyped parameter is an error that lists the known ones, before any work is done."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "nbs").glob("tutorial*.ipynb"))


@pytest.mark.parametrize("notebook", TUTORIALS, ids=lambda path: path.stem)
def test_an_unknown_parameter_is_refused(notebook, tmp_path):
    """papermill itself would only warn."""
    command = [sys.executable, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb"), "-k", "python3", "-p", "stepz", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "unknown parameter 'stepz' (did you mean 'steps'?)" in done.stderr
    assert "Known parameters: preset, steps, batch_size" in done.stderr
