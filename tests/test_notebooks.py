"""Library, theory and front pages as test cases. Experiments run through papermill elsewhere."""
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

NBS = Path(__file__).resolve().parent.parent/"nbs"
PAGES = [NBS/f"{page}.ipynb" for page in ("index", "results", "benchmarks", "equations", "protocols")]
NOTEBOOKS = [*PAGES, *sorted(NBS.glob("api/**/*.ipynb")), *sorted(NBS.glob("theory/*.ipynb"))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS).with_suffix("")))
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("IN_TEST", "1")   # nbdev sets it for good otherwise
    flags = get_config(path=NBS.parent).tst_flags.split()
    passed, _ = run_notebook(path, skip_flags=flags, basepath=NBS.parent)
    assert passed, f"a cell of {path.name} failed: see the captured stderr"
