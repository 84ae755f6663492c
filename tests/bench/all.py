"""Run every benchmark in turn; each writes nbs/results/bench_<name>.json, which a page of the site shows.

    python tests/bench/all.py [--only NAME ...] [--peer-python FILE] [--peers FOLDER]

FILE and FOLDER give access to the published packages (see explainers.py and apgd.py); without them, the columns of
these packages stay empty."""
import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent/"nbs"/"results"
SCRIPTS = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("all", "machine"))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="run these benchmarks only")
    parser.add_argument("--peer-python", help="Python interpreter with the published explainers installed")
    parser.add_argument("--peers", help="folder with torchattacks")
    args = parser.parse_args()
    options = {}
    if args.peer_python: options["explainers"] = ["--peer-python", args.peer_python]
    if args.peers: options["apgd"] = ["--peers", args.peers]
    failed = []
    for name in args.only:
        print(f"== {name}", flush=True)
        command = [sys.executable, HERE/f"{name}.py", "--json", RESULTS/f"bench_{name}.json", *options.get(name, [])]
        if subprocess.run(command).returncode: failed.append(name)
    if failed: sys.exit(f"failed: {', '.join(failed)}")
