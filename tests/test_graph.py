"The Snakefile at work: what runs, what runs again, and what a killed graph keeps. Notebooks are stood in for by their digests."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from reclip_nb.study import study_jobs

# writes what a notebook would: numbers that depend on the notebook, its settings and the runs it reads, and on nothing else
PAPERMILL = '''
import hashlib, json, os, sys, time
from pathlib import Path
notebook, executed, *options = sys.argv[1:]
folder = Path(executed).parent
files = [Path(notebook), *(Path(f) for flag, f in zip(options, options[1:]) if flag == "-f")]
reads = json.loads(Path("reads.json").read_text())[folder.name]
text = [f.read_text() for f in files] + [v for flag, v in zip(options, options[1:]) if flag == "-y"]
text += [(folder.parent/r/"metrics.json").read_text() for r in reads]
with open(os.environ["CALLS"], "a") as log: log.write(folder.name+"\\n")
time.sleep(float(os.environ.get("PAUSE", 0)))
new = folder/"metrics.json.new"
new.write_text(json.dumps(hashlib.sha256("\\n".join(text).encode()).hexdigest()))
new.replace(folder/"metrics.json")
'''


class Project:
    "A copy of everything the graph reads, with the notebooks reduced to a line each."
    def __init__(self, root, folder):
        self.folder, self.calls = folder, folder/"calls.txt"
        for name in ("Snakefile", "settings.ini"): shutil.copy(root/name, folder)
        for name in ("configs", "reclip_nb"): shutil.copytree(root/name, folder/name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder/"reads.json").write_text(json.dumps({name: job.reads for name, job in study_jobs("tiny").items()}))
        (folder/"nbs").mkdir()
        for job in study_jobs("tiny").values(): (folder/"nbs"/f"{job.notebook}.ipynb").write_text(job.notebook)
        (folder/"stand_in"/"papermill").mkdir(parents=True)
        (folder/"stand_in"/"papermill"/"__init__.py").touch()
        (folder/"stand_in"/"papermill"/"__main__.py").write_text(PAPERMILL)

    def start(self, *more, pause=0.):
        "Run the graph; the process leads a group of its own."
        env = {k: v for k, v in os.environ.items() if not k.startswith("RECLIP")}
        env |= dict(PYTHONPATH=f"{self.folder}/stand_in:{self.folder}", CALLS=str(self.calls), PAUSE=str(pause), OMP_NUM_THREADS="1")
        self.calls.write_text("")
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--rerun-incomplete", "--quiet", "host", "reason", "--show-failed-logs", "--config", "world=smoke", *more]
        return subprocess.Popen(command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)

    def run(self):
        "Names of the runs that were made, in order."
        process = self.start()
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]
        return self.calls.read_text().split()

    def edit(self, name, pattern, new):
        "Replace a value in a file."
        text = (self.folder/name).read_text()
        assert re.search(pattern, text), f"{pattern} is not in {name}"
        (self.folder/name).write_text(re.sub(pattern, new, text))

    def numbers(self):
        "What every run holds."
        return {p.parent.name: json.loads(p.read_text()) for p in self.folder.glob("runs/tiny/smoke-seed0/*/metrics.json")}


def dependents(*names):
    "Those runs and all that read them, at any distance."
    jobs, found = study_jobs("tiny"), set(names)
    while more := {n for n, j in jobs.items() if found & {*j.reads}}-found: found |= more
    return found


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    "A graph that ran once, undisturbed, with the order of its runs."
    project = Project(root, tmp_path_factory.mktemp("whole"))
    return project, project.run(), project.numbers()


def test_killed_graph_goes_on(root, tmp_path, whole):
    "Killed three times on the way: finished runs are kept, and the numbers are those of the undisturbed graph."
    project = Project(root, tmp_path)
    for after in (3, 12, 9):
        before = project.numbers()
        process = project.start(pause=.1)
        while process.poll() is None and len(project.calls.read_text().split()) < after: time.sleep(.01)
        os.killpg(process.pid, signal.SIGKILL); process.wait()
        again = project.calls.read_text().split()
        assert project.start("--unlock").wait() == 0, "as snakemake's own message says after a kill"
        now = project.numbers()
        assert len(now) < len(study_jobs("tiny")), "it was really stopped early"
        assert now.items() >= before.items(), "nothing is lost"
        assert len({*again} & before.keys()) <= 2, "no more than the two in flight are made twice"
    project.run()
    assert project.numbers() == whole[2]


def test_what_changed_runs_again_and_nothing_else(whole):
    (project, order, _), jobs = whole, study_jobs("tiny")
    assert sorted(order) == sorted(jobs), "every run once"
    assert all(order.index(r) < order.index(n) for n, j in jobs.items() for r in j.reads)
    assert project.run() == [], "finished runs are kept"
    project.edit("configs/graph.yaml", r"w_s: 0\.2,", "w_s: 0.25,")                       # a parameter of one run
    (project.folder/"configs"/"tiny"/"retrieval.yaml").write_text("batch_size: 32\n")   # the settings of a notebook
    project.edit("nbs/mechanisms.ipynb", "mechanisms", "mechanisms, once more")          # a notebook
    assert {*project.run()} == dependents("epg0.2", "retrieval", "mechanisms")
