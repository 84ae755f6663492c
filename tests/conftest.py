"""What every test shares: the project root, the threads, and which tests this machine can run."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch loads
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(os.environ.setdefault("RECLIP_SAMPLE_DATA", str(ROOT.parent/"shared"/"data")))


@pytest.fixture(scope="session")
def root() -> Path:
    "Folder that holds settings.ini."
    return ROOT


@pytest.fixture(scope="session")
def sample_data() -> Path:
    "Folder of real photographs, for tests marked `sample`."
    return SAMPLE


def pytest_collection_modifyitems(items):
    "A test whose file names the golden arrays is marked `golden`."
    named = {path: "golden" in path.read_text().lower() for path in {item.path for item in items}}
    for item in items:
        if named[item.path]: item.add_marker("golden")


def pytest_runtest_setup(item):
    if item.get_closest_marker("sample") and not SAMPLE.is_dir():
        pytest.skip(f"no photographs in {SAMPLE}; set RECLIP_SAMPLE_DATA")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
