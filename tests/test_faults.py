"Wrong or damaged input, interruptions, full or read-only disks: a clear error or a counted skip, and no lost data."
import contextlib
import errno
import itertools
import os
import random
import re
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from reclip_nb.data import open_dataset
from reclip_nb.evaluations import robust_eval
from reclip_nb.models import frozen, load_clip, load_visual, save_visual
from reclip_nb.objectives import AFT, Attack, epg_loss
from reclip_nb.study import append_rows, finish_run, has_run, load_run, read_rows, start_run, write_json
from reclip_nb.training import FitConfig, fit


@pytest.fixture
def clip(): return load_clip("tiny-smoke", seed=0)


@pytest.fixture
def x(): return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_eps_in_grey_levels(clip, x):
    with pytest.raises(ValueError, match="eps=4 .*did you mean 4/255"):
        AFT(clip, frozen(clip), Attack(eps=4))({"image": x}, None)


@pytest.mark.parametrize("bad, words", [
    (lambda x: x*255, "divide bytes by 255"), (lambda x: (x-.5)/.25, "leave normalisation"),
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
    with_empty = epg_loss(clip, other, x, mask, create_graph=False)
    without_empty = epg_loss(clip, other, x[:2], mask[:2], create_graph=False)
    assert torch.isclose(with_empty, without_empty, atol=1e-6)
    assert epg_loss(clip, other, x, mask & False).item() == 0


def test_checkpoint_of_another_model(clip, tmp_path):
    save_visual(load_clip("tiny", seed=0), tmp_path/"v.safetensors")
    before = clip.visual.state_dict()
    with pytest.raises(ValueError, match="belongs to another model"): load_visual(clip, tmp_path/"v.safetensors")
    assert all(torch.equal(before[k], v) for k, v in clip.visual.state_dict().items()), "the model is unchanged"


def test_truncated_checkpoint(clip, tmp_path):
    f = tmp_path/"v.safetensors"
    save_visual(clip, f)
    f.write_bytes(f.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"): load_visual(clip, f)


def test_nan_stops_before_the_update(tmp_path, monkeypatch, clip):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    with torch.no_grad(): clip.visual.proj[0, 0] = float("nan")
    run = start_run("f", "nan", "t", {})
    data = open_dataset("shapes", split="val", kind="zero_shot", world="smoke", seed=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(clip.visual, AFT(clip, load_clip("tiny-smoke", seed=0)), data, FitConfig(2, 8, 1e-4), run)
    assert read_rows(run) == []


# Interrupted training that is started again

STEPS = FitConfig(steps=6, batch_size=8, lr=1e-3, warmup=1)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def scenes(): return open_dataset("shapes", split="train", world="smoke", seed=0)


def train(scenes, run, at=None, do=None):
    "Six updates with a checkpoint after every second one; `do` changes the losses of update `at`. Returns the weights."
    student, calls = load_clip("tiny-smoke", seed=0), itertools.count()
    aft = AFT(student, frozen(student), Attack(steps=1))

    def objective(batch, generator):
        out = aft(batch, generator)
        return do(out) if next(calls) == at else out
    fit(student.visual, objective, scenes, STEPS, run, checkpoint_every=2)
    return {k: v.clone() for k, v in student.visual.state_dict().items()}


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory):
    "Weights after training without an interruption."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIP_RUNS", str(tmp_path_factory.mktemp("uninterrupted")))
        return train(scenes, start_run("f", "run", "t", {}))


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextlib.contextmanager
def full(size=0):
    "Simulate a full disk: no file of this process can grow beyond `size` bytes, so writing fails in the kernel."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_at_a_checkpoint(runs, scenes, uninterrupted, capsys):
    run, disk = start_run("f", "run", "t", {}), contextlib.ExitStack()
    with disk, pytest.raises(OSError, match=r"no room to write .*checkpoint.*start again") as error:
        train(scenes, run, at=3, do=lambda out: disk.enter_context(full(100_000)) or out)
    assert error.value.errno == errno.ENOSPC
    files = {f.name for f in run.path.iterdir()}
    assert files == {"run.json", "log.jsonl", "probes.jsonl", "checkpoint.pt"}, "first checkpoint, no temporary file"
    assert equal(train(scenes, run), uninterrupted) and "resuming run at step 2" in capsys.readouterr().out


def test_disk_full_at_a_row_of_the_log(runs, scenes, uninterrupted):
    run, disk = start_run("f", "run", "t", {}), contextlib.ExitStack()
    with disk, pytest.raises(OSError, match="no room to write .*log.jsonl"):
        train(scenes, run, at=3, do=lambda out: disk.enter_context(full((run/"log.jsonl").stat().st_size+20)) or out)
    assert (run/"log.jsonl").read_bytes()[-1:] != b"\n", "the last line is incomplete"
    assert [r["step"] for r in read_rows(run)] == [0, 1, 2]
    assert equal(train(scenes, run), uninterrupted) and [r["step"] for r in read_rows(run)] == [*range(6)]


@pytest.mark.parametrize("file, size, write", [
    ("run.json", 10, lambda clip, run: start_run("f", "run", "t", {})),
    ("metrics.json", 900, lambda clip, run: finish_run(run, {"a": [0]*900})),
    ("visual.safetensors", 50_000, lambda clip, run: save_visual(clip, run/"visual.safetensors")),
    ("state.npz", 50_000, lambda clip, run: evaluate(run/"state.npz"))])
def test_disk_full_at_a_result(runs, clip, file, size, write):
    run = start_run("f", "run", "t", {})
    write_json(run/"metrics.json", {"a": 1})
    save_visual(clip, run/"visual.safetensors")
    before = {f.name: f.read_bytes() for f in run.path.iterdir()}
    with full(size), pytest.raises(OSError, match=f"no room to write .*{file}.*Make room"): write(clip, run)
    after = {f.name: f.read_bytes() for f in run.path.iterdir()}
    if file == "metrics.json": del before["run.json"], after["run.json"]  # "finished" counts only with a result
    assert after == before, "the earlier files are intact, and there are no others"
    write(clip, run)


def evaluate(state):
    "Robust accuracy of a small function, with a resumable state."
    x, y = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    f = lambda v: torch.cat([v.mean((1, 2, 3))[:, None]*k for k in range(500)], 1)
    return robust_eval(f, x, y, (4/255,), ["apgd-ce"], n_iter=1, resume=state)


@contextlib.contextmanager
def as_another_user():
    "Root may write anywhere; in this block the process runs as another user."
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)


def test_read_only_run_folder(monkeypatch, uninterrupted):
    with tempfile.TemporaryDirectory() as d:  # pytest's own folders are closed to other users
        monkeypatch.setenv("RECLIP_RUNS", d)
        run = start_run("f", "run", "t", {"a": 1})
        finish_run(run, {"b": 2})
        for folder in (run.path, run.path.parent, Path(d)): folder.chmod(0o555)
        with as_another_user():
            for name in ("run", "new"):
                with pytest.raises(PermissionError, match=f"cannot write to .*{name} .*set RECLIP_RUNS"):
                    start_run("f", name, "t", {})
            with pytest.raises(PermissionError, match="log.jsonl"): append_rows(run, [{"step": 0}])
            assert load_run("f", "run").metrics == {"b": 2} and run.config == {"a": 1}, "reading works"
        for folder in (Path(d), run.path.parent, run.path): folder.chmod(0o755)


def test_a_file_instead_of_the_folder(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("not a folder")
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path/"file"))
    with pytest.raises(PermissionError, match="set RECLIP_RUNS"): start_run("s", "r", "t", {})


def test_temporary_files_of_a_killed_process_are_removed(runs):
    run = start_run("f", "run", "t", {})
    (run/".checkpoint.new.pt.99.tmp").write_bytes(b"half")
    start_run("f", "run", "t", {})
    assert [f.name for f in run.path.iterdir()] == ["run.json"]


class Evil:
    "A pickle that would create a file."
    def __reduce__(self): return (os.system, ("touch pwned",))


def flip(file):
    "Flip one bit in the middle of the weights."
    data = bytearray(file.read_bytes())
    data[random.Random(0).randrange(len(data)//4, len(data)//2)] ^= 1
    file.write_bytes(data)


DAMAGE = {"truncated": lambda f: f.write_bytes(f.read_bytes()[:5000]), "empty": lambda f: f.write_bytes(b""),
          "flipped": flip, "evil": lambda f: torch.save(Evil(), f), "foreign": lambda f: torch.save({"a": 1}, f),
          "tensor": lambda f: torch.save(torch.zeros(3), f), "text": lambda f: f.write_text("<html>404</html>")}


def stopped(scenes, run, at=5):
    "Interrupt a run after its second checkpoint."
    def stop(out): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(scenes, run, at=at, do=stop)
    assert (run/"checkpoint.pt").exists() and (run/"checkpoint.prev.pt").exists()


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_falls_back(runs, scenes, uninterrupted, monkeypatch, capsys, how):
    monkeypatch.chdir(runs)
    run = start_run("f", "run", "t", {})
    stopped(scenes, run)
    DAMAGE[how](run/"checkpoint.pt")
    assert equal(train(scenes, run), uninterrupted)
    out = capsys.readouterr().out
    assert re.search("run/checkpoint.pt (is damaged|was made with other settings)", out)
    assert "resuming run at step 2" in out and not (runs/"pwned").exists()


def test_both_checkpoints_damaged(runs, scenes, uninterrupted, capsys):
    run = start_run("f", "run", "t", {})
    stopped(scenes, run)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"): DAMAGE["truncated"](run/name)
    assert equal(train(scenes, run), uninterrupted)
    out = capsys.readouterr().out
    assert out.count("is damaged") == 2 and "run starts over" in out and "resuming" not in out


def test_checkpoint_of_other_settings_is_not_used(runs, scenes, uninterrupted, capsys):
    stopped(scenes, start_run("f", "run", "t", {"lr": 2}))
    assert equal(train(scenes, start_run("f", "run", "t", {})), uninterrupted)
    assert capsys.readouterr().out.count("made with other settings") == 2


def test_nan_loss(runs, scenes, uninterrupted):
    run = start_run("f", "run", "t", {})
    words = r"gradient of step 3 is not finite; nothing was updated. Images: train-\S+, .*Lower lr"
    with pytest.raises(FloatingPointError, match=words):
        train(scenes, run, at=3, do=lambda out: out | dict(loss=out["loss"]*float("nan")))
    assert [r["step"] for r in read_rows(run)] == [0, 1, 2] and not has_run("f", "run")
    assert equal(train(scenes, run), uninterrupted), "the checkpoint before it is intact"


def test_stopped_in_the_last_probe(runs, scenes):
    run, student = start_run("f", "run", "t", {}), load_clip("tiny-smoke", seed=0)
    aft = AFT(student, frozen(student), Attack(steps=1))
    def stop(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(student.visual, aft, scenes, STEPS, run, checkpoint_every=2, probe=stop)
    fit(student.visual, aft, scenes, STEPS, run, checkpoint_every=2, probe=lambda: dict(clean=.5))
    assert [r["step"] for r in read_rows(run, "probes.jsonl")] == [5]


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "text", "evil", "tensor"])
@pytest.mark.parametrize("name", ["v.safetensors", "v.pt"])
def test_damaged_weights(clip, tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    file = tmp_path/name
    before = {k: v.clone() for k, v in clip.visual.state_dict().items()}
    if name == "v.safetensors": save_visual(clip, file)
    else: torch.save(before, file)
    load_visual(clip, file)
    DAMAGE[how](file)
    with pytest.raises(ValueError, match=f"{name}.*bytes. is truncated, damaged or not a checkpoint of tensors"):
        load_visual(clip, file)
    assert equal(clip.visual.state_dict(), before) and not (tmp_path/"pwned").exists()


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "objects"])
def test_damaged_state_of_an_evaluation(tmp_path, how):
    state = tmp_path/"state.npz"
    evaluate(state)
    if how == "objects": np.savez(state, key="k", logits=np.array([{}], object))
    else: DAMAGE[how](state)
    with pytest.raises(ValueError, match="state.npz is damaged or no state.*delete it"): evaluate(state)


@pytest.mark.parametrize("content", [b'{"config": {"a": ', b"", b"\xff\xfe\x00", b"<html>"])
def test_damaged_run_files(runs, content):
    run = start_run("f", "run", "t", {})
    finish_run(run, {"a": 1})
    for name in ("run.json", "metrics.json"): (run/name).write_bytes(content)
    for read in (lambda: load_run("f", "run").config, lambda: load_run("f", "run").metrics):
        with pytest.raises(ValueError, match=r"(run|metrics).json is not valid JSON .*delete it and run again"): read()
    (run/"log.jsonl").write_bytes(b'{"step": 0}\n'+content+b'\n{"step": 1}\n')
    assert [r["step"] for r in read_rows(run, before=2)] == [0, 1]


@pytest.mark.parametrize("study, name", [
    ("../../etc", "a"), ("/etc", "a"), ("a/../..", "a"), ("s", "../../a"), ("s", "/etc"), ("s", ""), ("", "a")])
def test_names_of_runs_are_not_paths(runs, study, name):
    for use in (lambda: start_run(study, name, "t", {}), lambda: load_run(study, name)):
        with pytest.raises(ValueError, match="no absolute path.*set RECLIP_RUNS"): use()
    assert not has_run(study, name) and not list(runs.iterdir())
