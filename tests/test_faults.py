"Wrong, damaged and interrupted input: a clear error or a counted skip, and nothing lost."
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from reclip_nb.aft import AFT, Attack
from reclip_nb.clip import frozen, load_clip, load_visual, save_visual
from reclip_nb.data import open_dataset
from reclip_nb.epg import epg_loss
from reclip_nb.runs import read_rows, start_run
from reclip_nb.training import FitConfig, fit

TRAIN = """
import sys, torch
from reclip_nb.aft import AFT, Attack
from reclip_nb.clip import frozen, load_clip, save_visual
from reclip_nb.data import open_dataset
from reclip_nb.runs import start_run, finish_run
from reclip_nb.shapes import World, ShapesDataset
from reclip_nb.training import FitConfig, fit
torch.set_num_threads(1)
student = load_clip("tiny-smoke", seed=0)
data = ShapesDataset(World(size=32, train=96), "train", seed=0)
run = start_run("faults", sys.argv[1], "train_aft", {"eps_255": 4})
aft = AFT(student, frozen(student), Attack(steps=2))
rows = fit(student.visual, aft, data, FitConfig(steps=12, batch_size=16, lr=1e-3, warmup=2), run, checkpoint_every=3)
save_visual(student, run/"visual.safetensors")
finish_run(run, {"rows": len(rows)})
"""


def train(name, runs, **kwargs):
    env = {**os.environ, "RECLIP_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TRAIN, name], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("after", [2, 7, 10])
def test_killed_run_resumes_bit_for_bit(tmp_path_factory, after, unbroken):
    runs = tmp_path_factory.mktemp("killed")
    log = runs/"faults"/"killed"/"log.jsonl"
    p = train("killed", runs)
    while p.poll() is None and lines(log) < after: time.sleep(.002)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (runs/"faults"/"killed"/"metrics.json").exists(), "the run was really stopped early"
    again = train("killed", runs)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    if after > 3: assert "resuming killed at step" in out
    a, b = (load_file(r/"faults"/n/"visual.safetensors") for r, n in ((unbroken, "whole"), (runs, "killed")))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert lines(log) == 12


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    p = train("whole", runs)
    out, _ = p.communicate(timeout=120)
    assert p.returncode == 0, out
    return runs


@pytest.fixture
def clip(): return load_clip("tiny-smoke", seed=0)


@pytest.fixture
def x(): return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_eps_in_grey_levels(clip, x):
    with pytest.raises(ValueError, match="eps=4 .*did you mean 4/255"): AFT(clip, frozen(clip), Attack(eps=4))({"image": x}, None)


@pytest.mark.parametrize("bad, words", [(lambda x: x*255, "divide bytes by 255"), (lambda x: (x-.5)/.25, "leave normalisation"),
                                        (lambda x: x*float("nan"), "span")])
def test_images_outside_the_unit_interval_stop_training(tmp_path, monkeypatch, clip, x, bad, words):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    data = [dict(image=i, id=str(n)) for n, i in enumerate(bad(x))]
    with pytest.raises(ValueError, match=words):
        fit(clip.visual, AFT(clip, frozen(clip)), data, FitConfig(1, 4, 1e-4), start_run("f", "r", "t", {}))


def test_mask_of_another_size(clip, x):
    with pytest.raises(ValueError, match=r"\(4, 16, 16\).*differ in size"):
        epg_loss(clip, frozen(clip), x, torch.ones(4, 16, 16, dtype=torch.bool))


def test_empty_masks_are_left_out(clip, x):
    other = load_clip("tiny-smoke", seed=1)
    mask = torch.zeros(4, 32, 32, dtype=torch.bool)
    mask[:2, 8:20, 8:20] = True
    assert torch.isclose(epg_loss(clip, other, x, mask, create_graph=False), epg_loss(clip, other, x[:2], mask[:2], create_graph=False), atol=1e-6)
    assert epg_loss(clip, other, x, mask & False).item() == 0


def test_checkpoint_of_another_model(clip, tmp_path):
    save_visual(load_clip("tiny", seed=0), tmp_path/"v.safetensors")
    before = clip.visual.state_dict()
    with pytest.raises(ValueError, match="belongs to another model"): load_visual(clip, tmp_path/"v.safetensors")
    assert all(torch.equal(before[k], v) for k, v in clip.visual.state_dict().items()), "the model is as it was"


def test_truncated_checkpoint(clip, tmp_path):
    f = tmp_path/"v.safetensors"
    save_visual(clip, f)
    f.write_bytes(f.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"): load_visual(clip, f)


def test_pickles_that_run_code_are_refused(clip, tmp_path):
    class Evil:
        def __reduce__(self): return (os.system, ("touch pwned",))
    torch.save({"a": Evil()}, tmp_path/"evil.pt")
    with pytest.raises(ValueError, match="not a checkpoint of tensors"): load_visual(clip, tmp_path/"evil.pt")


def test_full_and_read_only_disks(clip, tmp_path, monkeypatch):
    blocked = tmp_path/"file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("RECLIP_RUNS", str(blocked))
    with pytest.raises(PermissionError, match="set RECLIP_RUNS"): start_run("s", "r", "t", {})


def test_nan_stops_before_the_update(tmp_path, monkeypatch, clip):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    with torch.no_grad(): clip.visual.proj[0, 0] = float("nan")
    run = start_run("f", "nan", "t", {})
    data = open_dataset("shapes", split="val", kind="zero_shot", world="smoke", seed=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(clip.visual, AFT(clip, load_clip("tiny-smoke", seed=0)), data, FitConfig(2, 8, 1e-4), run)
    assert read_rows(run) == []
