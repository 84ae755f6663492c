# A study as a graph: each job executes one notebook with papermill and writes into one run folder.
#
#   snakemake -c2                                                             the embedded world, one seed
#   snakemake -c2 --config world=full seeds=3                                 another world size, three seeds
#   snakemake -c2 --config sweeps=1                                           also the wider comparisons beyond the papers
#   snakemake --profile configs/slurm --config preset=paper world=imagenet    the papers' own settings, on a cluster
#
# A job runs again when the content of its notebook, its YAML or the results it reads has changed (`--touch` accepts
# finished runs after a change of prose). Interrupted training resumes from its last checkpoint.
import os
import sys
from functools import cache

import yaml

from reclip_nb.study.graph import config_files, study_jobs

PRESET = config.get("preset", "tiny")
WORLD = config.get("world", "quick")
if not WORLD.isidentifier(): raise ValueError(f"world={WORLD!r} must be a name such as smoke, quick or full")
SEEDS = range(int(config.get("seeds", 1)))
FOLDER = os.path.expanduser(os.environ.get("RECLIP_RUNS", "runs"))
STUDY = f"{FOLDER}/{PRESET}/{{world}}-seed{{seed}}"

RUNS = study_jobs(PRESET, sweeps=bool(int(config.get("sweeps", 0))))  # configs/graph.yaml
# Fewer progress lines, as they go to a file; glibc keeps the memory that every training step frees and allocates again.
os.environ |= dict(TQDM_MININTERVAL="30", MALLOC_TRIM_THRESHOLD_=str(2**30), MALLOC_MMAP_THRESHOLD_=str(2**25))
with open("configs/resources.yaml") as file: RESOURCES = yaml.safe_load(file)[PRESET]


def as_yaml(parameters):
    "Parameters as one line of YAML, for papermill -y."
    return yaml.safe_dump(parameters, default_flow_style=True, width=float("inf")).strip()


def resources(notebook):
    "Threads, GPUs, memory and wall time of a notebook."
    return RESOURCES["default"] | RESOURCES.get(notebook, {})


def minutes(runtime):
    "Minutes of a wall time such as 30m or 12h."
    return int(runtime[:-1]) * dict(m=1, h=60)[runtime[-1]]


@cache
def ahead(run):
    "Declared minutes from the start of a run to the end of the study; the run with the longest path starts first."
    readers = [ahead(name) for name, job in RUNS.items() if run in job.reads]
    return minutes(resources(RUNS[run].notebook)["runtime"]) + max(readers, default=0)


def settings(wildcards):
    "YAML files of the job: the preset's, then the overrides of the world."
    notebook = RUNS[wildcards.run].notebook
    return [os.path.relpath(f) for f in config_files(PRESET, notebook, wildcards.world)]


def finished(wildcards):
    "Result files of the runs that a job reads."
    return [f"{STUDY.format(**wildcards)}/{run}/metrics.json" for run in RUNS[wildcards.run].reads]


rule all:
    input: [STUDY.format(world=WORLD, seed=seed) + "/report/metrics.json" for seed in SEEDS]


# One rule per notebook, so that a cluster profile can set resources for each.
for notebook in dict.fromkeys(job.notebook for job in RUNS.values()):
    rule:
        name: notebook
        message: f"{PRESET}/{{wildcards.world}}-seed{{wildcards.seed}}/{{wildcards.run}}"
        input:
            notebook=f"nbs/{notebook}.ipynb",
            settings=settings,
            runs=finished
        output: STUDY + "/{run}/metrics.json"
        log: STUDY + "/{run}/log.txt"
        wildcard_constraints:
            run="|".join(run.replace(".", "[.]") for run, job in RUNS.items() if job.notebook == notebook)
        params:
            python=sys.executable,
            executed=STUDY + "/{run}/notebook.ipynb",
            settings=lambda wildcards, input: [word for file in input.settings for word in ("-f", file)],
            study=lambda wildcards: ["-p", "study", f"{PRESET}/{wildcards.world}-seed{wildcards.seed}",
                                     "-p", "world", wildcards.world, "-p", "seed", wildcards.seed],
            own=lambda wildcards: as_yaml(RUNS[wildcards.run].parameters)
        priority: max(ahead(run) for run, job in RUNS.items() if job.notebook == notebook)
        threads: resources(notebook)["threads"]
        resources: **{key: value for key, value in resources(notebook).items() if key != "threads"}
        shell:
            "{params.python:q} -m papermill {input.notebook} {params.executed:q} {params.settings:q} "
            "{params.study:q} -y {params.own:q} --no-progress-bar --log-output > {log:q} 2>&1"
