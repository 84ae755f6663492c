"The Snakefile: which runs are executed, executed again, or kept after a kill. Digests replace the notebooks' results."
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

# Stand-in for papermill: the result depends only on the notebook, its settings and the runs it reads
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
    "A copy of everything the graph reads, with each notebook reduced to one line."
    def __init__(self, root, folder):
        self.folder, self.calls = folder, folder/"calls.txt"
        for name in ("Snakefile", "settings.ini"): shutil.copy(root/name, folder)
        ignore = shutil.ignore_patterns("__pycache__")
        for name in ("configs", "reclip_nb"): shutil.copytree(root/name, folder/name, ignore=ignore)
        (folder/"reads.json").write_text(json.dumps({name: job.reads for name, job in study_jobs("tiny").items()}))
        (folder/"nbs").mkdir()
        for job in study_jobs("tiny").values(): (folder/"nbs"/f"{job.notebook}.ipynb").write_text(job.notebook)
        (folder/"stand_in"/"papermill").mkdir(parents=True)
        (folder/"stand_in"/"papermill"/"__init__.py").touch()
        (folder/"stand_in"/"papermill"/"__main__.py").write_text(PAPERMILL)

    def start(self, *more, pause=0.):
        "Start the graph as the leader of a new process group."
        env = {k: v for k, v in os.environ.items() if not k.startswith("RECLIP")}
        env |= dict(PYTHONPATH=f"{self.folder}/stand_in:{self.folder}", CALLS=str(self.calls), PAUSE=str(pause),
                    OMP_NUM_THREADS="1")
        self.calls.write_text("")
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--rerun-incomplete", "--quiet", "host", "reason",
                   "--show-failed-logs", "--config", "world=smoke", *more]
        return subprocess.Popen(command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True)

    def run(self):
        "Run the graph to its end; names of the executed runs, in order."
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
        "Run -> its result."
        files = self.folder.glob("runs/tiny/smoke-seed0/*/metrics.json")
        return {file.parent.name: json.loads(file.read_text()) for file in files}


def dependents(*names):
    "These runs and all runs that read them, directly or not."
    affected, jobs = set(), study_jobs("tiny")
    while names:
        affected.update(names)
        names = [n for n, job in jobs.items() if n not in affected and affected & {*job.reads}]
    return affected


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    "A graph that ran once without interruption, the order of its runs, and their results."
    project = Project(root, tmp_path_factory.mktemp("uninterrupted"))
    return project, project.run(), project.numbers()


def test_killed_graph_resumes(root, tmp_path, uninterrupted):
    "After three kills, finished runs are kept, and the results equal those of the uninterrupted graph."
    project = Project(root, tmp_path)
    for after in (3, 12, 9):
        before = project.numbers()
        process = project.start(pause=.1)
        while process.poll() is None and len(project.calls.read_text().split()) < after: time.sleep(.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        executed = project.calls.read_text().split()
        assert project.start("--unlock").wait() == 0, "as snakemake's own message advises after a kill"
        now = project.numbers()
        assert len(now) < len(study_jobs("tiny")), "the graph was really stopped early"
        assert now.items() >= before.items(), "no result is lost"
        assert len({*executed} & before.keys()) <= 2, "at most the two runs in progress are executed twice"
    project.run()
    assert project.numbers() == uninterrupted[2]


def test_only_what_changed_runs_again(uninterrupted):
    project, order, _ = uninterrupted
    jobs = study_jobs("tiny")
    assert sorted(order) == sorted(jobs), "every run once"
    assert all(order.index(r) < order.index(n) for n, j in jobs.items() for r in j.reads)
    assert project.run() == [], "finished runs are kept"
    project.edit("configs/graph.yaml", r"w_s: 0\.2,", "w_s: 0.25,")  # a parameter of one run
    (project.folder/"configs"/"tiny"/"retrieval.yaml").write_text("batch_size: 32\n")  # the settings of a notebook
    project.edit("nbs/mechanisms.ipynb", "mechanisms", "mechanisms, edited")  # a notebook
    assert {*project.run()} == dependents("epg0.2", "retrieval", "mechanisms")
