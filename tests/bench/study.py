"""The whole study from nothing: `make reproduce` of one seed into an empty folder, by the wall clock.

    python tests/bench/study.py [--world quick] [--cores 2] [--json FILE]

`wall_s` is meaningful on an idle machine only. `cpu_s`, the processor time of all processes, is meaningful on a busy
machine too; `wall_s` cannot be less than `cpu_s` divided by the number of cores. `seconds` of a run is the wall time of
its notebook."""
import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from machine import machine

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = 900     # seconds on two cores


def notebook_seconds(folder):
    "Duration of an executed notebook."
    return json.loads((folder/"notebook.ipynb").read_text())["metadata"]["papermill"]["duration"]


def study(world, cores):
    "Time of the graph, and of each of its runs, the longest first."
    with tempfile.TemporaryDirectory() as runs:
        log = Path(runs)/"log.txt"
        began = time.time()
        with open(log, "w") as file:
            make = subprocess.run(["make", "reproduce", f"WORLD={world}", f"CORES={cores}"], cwd=ROOT, stdout=file,
                                  stderr=file, env=os.environ | dict(RECLIP_RUNS=runs))
        wall, used = time.time()-began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if make.returncode: raise SystemExit(log.read_text()[-3000:])
        folders = [f.parent for f in Path(runs).glob("*/*/*/metrics.json")]
        (report,) = Path(runs).glob("*/*/report/report.json")
        missing = sum(map(len, json.loads(report.read_text())["missing"].values()))
        rows = [dict(run=f.name, seconds=round(notebook_seconds(f))) for f in folders]
    rows.sort(key=lambda row: -row["seconds"])
    total = dict(world=world, cores=cores, runs=len(rows), missing=missing, wall_s=round(wall),
                 cpu_s=round(used.ru_utime+used.ru_stime))
    return [total | dict(minutes=wall/60, asked_for_s=TARGET)], rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="quick", help="size of the embedded world")
    parser.add_argument("--cores", type=int, default=2, help="runs at a time")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    total, runs = study(args.world, args.cores)
    what = "make reproduce: every run of one seed without the sweeps; target: 15 minutes on two idle cores"
    result = dict(what=what, machine=machine() | dict(cores=os.cpu_count()), whole_study=total, by_run=runs)
    print(json.dumps(result, indent=1))
    if args.json: args.json.write_text(json.dumps(result, indent=1)+"\n")
