"Twenty SIGKILLs at random moments of training, evaluation and graph, and one before every rename: the end is always the same."
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
    "A clean process that has imported everything and forks the workers."
    paths = os.pathsep.join([str(ROOT/"tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kill_jobs"])
        first = context.Process(target=print)
        first.start(); first.join()
    assert first.exitcode == 0
    return context


def whole(processes, job, *args) -> float:
    "Run a job unbroken; the seconds it takes."
    p = processes.Process(target=job, args=args)
    began = time.monotonic()
    p.start(); p.join()
    assert p.exitcode == 0
    return time.monotonic()-began


def rows(log: Path) -> int: return len(log.read_text().splitlines()) if log.exists() else 0


def broken(processes, kills, moments, progress, end, step, check, job, *args) -> int:
    "Start a job until it ends by itself; kill it up to `kills` times, at random shares of its progress and of a step. How often it was."
    struck = 0
    while True:
        aim, p = moments.uniform(progress(), end), processes.Process(target=job, args=args)
        p.start()
        while struck < kills and p.exitcode is None and progress() < int(aim): time.sleep(.002)
        p.join(moments.uniform(0, step) if struck < kills else None)
        if p.exitcode is None:
            p.kill(); p.join()
            struck += p.exitcode == -signal.SIGKILL   # else it ended in between
            check()
        if p.exitcode != -signal.SIGKILL:
            assert p.exitcode == 0
            return struck


def same(a: Path, b: Path):
    "Weights and numbers of two finished runs are equal, bit for bit, and nothing else is left behind."
    x, y = (load_file(r/"visual.safetensors") for r in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    x, y = (json.loads((r/"metrics.json").read_text()) for r in (a, b))
    x, y = ({k: v for k, v in m.items() if k not in ("images_s", "energy", "seconds")} for m in (x, y))
    assert x == y
    x, y = ([json.loads(line)["step"] for line in (r/"log.jsonl").read_text().splitlines()] for r in (a, b))
    assert y == sorted(set(y)) and y[-1] == x[-1]
    assert not [f.name for f in b.iterdir() if f.name.startswith((".", "checkpoint"))]


def sound(run: Path, unbroken: Path):
    "Whatever a killed run left under the name of a result is whole."
    for name in ("run.json", "metrics.json"):
        if (run/name).exists(): json.loads((run/name).read_text())
    for f in run.glob("checkpoint*.pt"): assert {"key", "step", "model", "optimizer"} == read_state(f)[0].keys()
    if (run/"visual.safetensors").exists():
        a, b = load_file(run/"visual.safetensors"), load_file(unbroken/"visual.safetensors")
        assert all(torch.equal(a[k], b[k]) for k in b)
    if (run/"metrics.json").exists(): assert (run/"visual.safetensors").exists(), "the result comes last"


@pytest.mark.parametrize("objective", ["aft", "epg"])
def test_killed_training(tmp_path, processes, objective):
    moments, struck, resumed, tries = random.Random(objective), 0, 0, 0
    (tmp_path/"whole").mkdir()
    seconds = whole(processes, kill_jobs.train, tmp_path/"whole", objective)
    unbroken = tmp_path/"whole"/"kills"/objective
    while struck < KILLS[objective]:
        tries += 1
        runs = tmp_path/str(tries); runs.mkdir()
        run = runs/"kills"/objective
        struck += broken(processes, KILLS[objective]-struck, moments, lambda: rows(run/"log.jsonl"), 12, seconds/12,
                         lambda: sound(run, unbroken), kill_jobs.train, runs, objective)
        same(unbroken, run)
        resumed += (runs/"out.txt").read_text().count("resuming")
    assert resumed, "some kills came after the first checkpoint"


def test_killed_before_every_rename(tmp_path, processes):
    "Between any two renames of checkpoint, weights and result."
    job = kill_jobs.train
    (tmp_path/"whole").mkdir()
    whole(processes, job, tmp_path/"whole", "aft", 4, 2)
    unbroken, n = tmp_path/"whole"/"kills"/"aft", 0
    while True:
        runs = tmp_path/str(n); runs.mkdir()
        p = processes.Process(target=job, args=(runs, "aft", 4, 2, n))
        p.start(); p.join()
        if p.exitcode == 0: break
        assert p.exitcode == -signal.SIGKILL
        sound(runs/"kills"/"aft", unbroken)
        whole(processes, job, runs, "aft", 4, 2)
        same(unbroken, runs/"kills"/"aft")
        n += 1
    assert n >= 9, "run.json, 5 for two checkpoints, weights, run.json, metrics.json"


def test_killed_evaluation(tmp_path, processes):
    moments, struck, tries = random.Random(0), 0, 0
    (tmp_path/"whole").mkdir()
    seconds = whole(processes, kill_jobs.evaluate, tmp_path/"whole")
    result = (tmp_path/"whole"/"metrics.json").read_text()
    passes = json.loads(result)["card"]["cost"]["forward"]
    while struck < KILLS["evaluation"]:
        tries += 1
        folder = tmp_path/str(tries); folder.mkdir()
        def check(): assert not (folder/"metrics.json").exists() or (folder/"metrics.json").read_text() == result
        def progress(): return np.load(folder/"state.npz")["cost"][0] if (folder/"state.npz").exists() else 0
        struck += broken(processes, KILLS["evaluation"]-struck, moments, progress, passes, seconds/20, check, kill_jobs.evaluate, folder)
        assert (folder/"metrics.json").read_text() == result


@pytest.fixture
def graph(tmp_path):
    "A folder from which the real Snakefile makes the CLIP and the AFT1 run of a very small study, and that study made without it."
    shutil.copytree(ROOT/"configs", tmp_path/"configs")
    shutil.copy(ROOT/"settings.ini", tmp_path)
    (tmp_path/"nbs").symlink_to(ROOT/"nbs")
    for notebook, steps in (("train_clip", 40), ("train_aft", 48)):
        file = tmp_path/"configs"/"tiny"/"smoke"/f"{notebook}.yaml"
        short = dict(steps=steps, warmup=2, checkpoint_every=5, probe=False, country="")
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | short))
    env = {**os.environ, "RECLIP_RUNS": "whole", "RECLIP_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = "from reclip_nb.study import ensure_runs; ensure_runs('tiny/smoke-seed0', ['aft1'], 'smoke', 0)"
    subprocess.run([sys.executable, "-c", alone], cwd=tmp_path, env=env, check=True, capture_output=True)
    command = [sys.executable, "-m", "snakemake", "-s", ROOT/"Snakefile", "--directory", tmp_path, "--cores", "1", "--rerun-incomplete",
               "--nolock", "--config", "world=smoke", "--", "runs/tiny/smoke-seed0/aft1/metrics.json"]

    def start():
        with open(tmp_path/"out.txt", "a") as out:
            return subprocess.Popen(command, cwd=tmp_path, env=env | {"RECLIP_RUNS": "runs"}, stdout=out, stderr=out, start_new_session=True)
    return tmp_path, start


def power_cut(p: subprocess.Popen):
    "Kill a process, its group, and what it started in other sessions: papermill's kernels have their own."
    below = psutil.Process(p.pid).children(recursive=True)
    os.killpg(p.pid, signal.SIGKILL)
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess): child.kill()
    p.wait()


@pytest.mark.slow
@pytest.mark.graph
def test_killed_graph(graph):
    "Once while the CLIP trains, twice while the fine-tuning does; the last start finishes both."
    (folder, start), moments, struck = graph, random.Random(0), 0
    study, unbroken = (folder/k/"tiny"/"smoke-seed0" for k in ("runs", "whole"))
    for name, row in (("clip", moments.randrange(20)), ("aft1", moments.randrange(1, 12)), ("aft1", moments.randrange(12, 24))):
        p = start()
        while p.poll() is None and rows(study/name/"log.jsonl") <= row: time.sleep(.01)
        if p.poll() is None: power_cut(p); struck += 1
        assert not (study/"aft1"/"metrics.json").exists()
        if (study/"aft1").exists(): sound(study/"aft1", unbroken/"aft1")
    assert struck == KILLS["graph"], (folder/"out.txt").read_text()[-3000:]
    assert start().wait() == 0, (folder/"out.txt").read_text()[-3000:]
    same(unbroken/"aft1", study/"aft1")
    a, b = (load_file(s/"clip"/"clip.safetensors") for s in (unbroken, study))
    assert all(torch.equal(a[k], b[k]) for k in a)
