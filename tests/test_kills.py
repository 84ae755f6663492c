"""Twenty SIGKILLs at random moments of training, evaluation and graph, and one before every renaming of a file.

The final result is always that of an uninterrupted run."""
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import kill_jobs
import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from reclip_nb.models.weights import read_state

ROOT = Path(__file__).resolve().parent.parent
KILLS = dict(aft=6, epg=6, evaluation=5, graph=3)


def test_there_are_twenty(): assert sum(KILLS.values()) == 20


@pytest.fixture(scope="module")
def processes():
    "Context of a fork server: a clean process that has imported everything and forks the workers."
    paths = os.pathsep.join([str(ROOT/"tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kill_jobs"])
        first = context.Process(target=print)
        first.start()
        first.join()
    assert first.exitcode == 0
    return context


def finished(processes, job, *args):
    "Run a job in a process to its end; the process."
    p = processes.Process(target=job, args=args)
    p.start()
    p.join()
    return p


def uninterrupted(processes, job, *args) -> float:
    "Run a job without a kill; the seconds it takes."
    start = time.monotonic()
    assert finished(processes, job, *args).exitcode == 0
    return time.monotonic()-start


def row_count(log: Path) -> int: return len(log.read_text().splitlines()) if log.exists() else 0


def killed_and_resumed(processes, max_kills, random_, progress, end, step, check, job, *args) -> int:
    """Start a job again and again until it ends by itself; returns the number of kills.

    It is killed up to `max_kills` times: when `progress()` reaches a random value below `end`, and then after a random
    part of `step` seconds."""
    kills = 0
    while True:
        target = random_.uniform(progress(), end)
        p = processes.Process(target=job, args=args)
        p.start()
        while kills < max_kills and p.exitcode is None and progress() < int(target): time.sleep(.002)
        p.join(random_.uniform(0, step) if kills < max_kills else None)
        if p.exitcode is None:
            p.kill()
            p.join()
            kills += p.exitcode == -signal.SIGKILL  # else it ended just before the kill
            check()
        if p.exitcode != -signal.SIGKILL:
            assert p.exitcode == 0
            return kills


def assert_same(a: Path, b: Path):
    "Weights and numbers of two finished runs are equal, bit for bit, and no temporary files are left."
    x, y = (load_file(r/"visual.safetensors") for r in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    x, y = (json.loads((r/"metrics.json").read_text()) for r in (a, b))
    x, y = ({k: v for k, v in m.items() if k not in ("images_s", "energy", "seconds")} for m in (x, y))
    assert x == y
    x, y = ([json.loads(line)["step"] for line in (r/"log.jsonl").read_text().splitlines()] for r in (a, b))
    assert y == sorted(set(y)) and y[-1] == x[-1]
    assert not [f.name for f in b.iterdir() if f.name.startswith((".", "checkpoint"))]


def assert_sound(run: Path, reference: Path):
    "Every result file that a killed run left is complete."
    for name in ("run.json", "metrics.json"):
        if (run/name).exists(): json.loads((run/name).read_text())
    for f in run.glob("checkpoint*.pt"): assert {"key", "step", "model", "optimizer"} == read_state(f)[0].keys()
    if (run/"visual.safetensors").exists():
        a, b = load_file(run/"visual.safetensors"), load_file(reference/"visual.safetensors")
        assert all(torch.equal(a[k], b[k]) for k in b)
    if (run/"metrics.json").exists(): assert (run/"visual.safetensors").exists(), "the result comes last"


@pytest.mark.parametrize("objective", ["aft", "epg"])
def test_killed_training(tmp_path, processes, objective):
    def attempt(runs: Path, max_kills: int) -> tuple[int, int]:
        "One training with up to `max_kills` kills; how often it was killed and resumed from a checkpoint."
        runs.mkdir()
        run = runs/"kills"/objective
        kills = killed_and_resumed(processes, max_kills, random_, lambda: row_count(run/"log.jsonl"), 12, seconds/12,
                                   lambda: assert_sound(run, reference), kill_jobs.train, runs, objective)
        assert_same(reference, run)
        return kills, (runs/"out.txt").read_text().count("resuming")

    random_ = random.Random(objective)
    (tmp_path/"reference").mkdir()
    seconds = uninterrupted(processes, kill_jobs.train, tmp_path/"reference", objective)
    reference = tmp_path/"reference"/"kills"/objective
    kills, resumed, attempts = 0, 0, 0
    while kills < KILLS[objective]:
        new_kills, new_resumed = attempt(tmp_path/str(attempts), KILLS[objective]-kills)
        kills, resumed, attempts = kills+new_kills, resumed+new_resumed, attempts+1
    assert resumed, "some kills came after the first checkpoint"


def test_killed_before_every_rename(tmp_path, processes):
    "A kill between any two renamings of checkpoint, weights and result."
    job = kill_jobs.train
    (tmp_path/"reference").mkdir()
    uninterrupted(processes, job, tmp_path/"reference", "aft", 4, 2)
    reference = tmp_path/"reference"/"kills"/"aft"
    for n in count():
        runs = tmp_path/str(n)
        runs.mkdir()
        p = finished(processes, job, runs, "aft", 4, 2, n)
        if p.exitcode == 0: break
        assert p.exitcode == -signal.SIGKILL
        assert_sound(runs/"kills"/"aft", reference)
        uninterrupted(processes, job, runs, "aft", 4, 2)
        assert_same(reference, runs/"kills"/"aft")
    assert n >= 9, "run.json, 5 for two checkpoints, weights, run.json, metrics.json"


def test_killed_evaluation(tmp_path, processes):
    def attempt(folder: Path, max_kills: int) -> int:
        "One evaluation with up to `max_kills` kills; how often it was killed."
        folder.mkdir()
        state, metrics = folder/"state.npz", folder/"metrics.json"
        def check(): assert not metrics.exists() or metrics.read_text() == result
        def progress(): return np.load(state)["cost"][0] if state.exists() else 0
        kills = killed_and_resumed(processes, max_kills, random_, progress, passes, seconds/20, check,
                                   kill_jobs.evaluate, folder)
        assert metrics.read_text() == result
        return kills

    random_ = random.Random(0)
    (tmp_path/"reference").mkdir()
    seconds = uninterrupted(processes, kill_jobs.evaluate, tmp_path/"reference")
    result = (tmp_path/"reference"/"metrics.json").read_text()
    passes = json.loads(result)["card"]["cost"]["forward"]
    kills, attempts = 0, 0
    while kills < KILLS["evaluation"]:
        kills += attempt(tmp_path/str(attempts), KILLS["evaluation"]-kills)
        attempts += 1


@pytest.fixture
def graph(tmp_path):
    "A folder for the runs clip and aft1 of a very small study, and a function that starts the real Snakefile in it."
    shutil.copytree(ROOT/"configs", tmp_path/"configs")
    shutil.copy(ROOT/"settings.ini", tmp_path)
    (tmp_path/"nbs").symlink_to(ROOT/"nbs")
    for notebook, steps in (("train_clip", 40), ("train_aft", 48)):
        file = tmp_path/"configs"/"tiny"/"smoke"/f"{notebook}.yaml"
        short = dict(steps=steps, warmup=2, checkpoint_every=5, probe=False, country="")
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | short))
    env = {**os.environ, "RECLIP_RUNS": "reference", "RECLIP_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT),
           "OMP_NUM_THREADS": "1"}
    without_graph = "from reclip_nb.study import ensure_runs; ensure_runs('tiny/smoke-seed0', ['aft1'], 'smoke', 0)"
    subprocess.run([sys.executable, "-c", without_graph], cwd=tmp_path, env=env, check=True, capture_output=True)
    command = [sys.executable, "-m", "snakemake", "-s", ROOT/"Snakefile", "--directory", tmp_path, "--cores", "1",
               "--rerun-incomplete", "--nolock", "--config", "world=smoke", "--",
               "runs/tiny/smoke-seed0/aft1/metrics.json"]

    def start():
        with open(tmp_path/"out.txt", "a") as out:
            return subprocess.Popen(command, cwd=tmp_path, env=env | {"RECLIP_RUNS": "runs"}, stdout=out, stderr=out,
                                    start_new_session=True)
    return tmp_path, start


def power_cut(p: subprocess.Popen):
    "Kill a process, its group, and its descendants in other sessions, such as papermill's kernels."
    descendants = psutil.Process(p.pid).children(recursive=True)
    os.killpg(p.pid, signal.SIGKILL)
    for child in descendants:
        with contextlib.suppress(psutil.NoSuchProcess): child.kill()
    p.wait()


@pytest.mark.slow
@pytest.mark.graph
def test_killed_graph(graph):
    "One kill while the CLIP trains, two during fine-tuning; the last start finishes both."
    folder, start = graph
    random_, kills = random.Random(0), 0
    study, reference = (folder/k/"tiny"/"smoke-seed0" for k in ("runs", "reference"))
    rows = [("clip", random_.randrange(20)), ("aft1", random_.randrange(1, 12)), ("aft1", random_.randrange(12, 24))]
    for name, row in rows:
        p = start()
        while p.poll() is None and row_count(study/name/"log.jsonl") <= row: time.sleep(.01)
        if p.poll() is None:
            power_cut(p)
            kills += 1
        assert not (study/"aft1"/"metrics.json").exists()
        if (study/"aft1").exists(): assert_sound(study/"aft1", reference/"aft1")
    assert kills == KILLS["graph"], (folder/"out.txt").read_text()[-3000:]
    assert start().wait() == 0, (folder/"out.txt").read_text()[-3000:]
    assert_same(reference/"aft1", study/"aft1")
    a, b = (load_file(s/"clip"/"clip.safetensors") for s in (reference, study))
    assert all(torch.equal(a[k], b[k]) for k in a)
