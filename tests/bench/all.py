"""Every benchmark in turn; each writes nbs/results/bench_<name>.json, which the site's page shows.

    python tests/bench/all.py [--only NAME ...] [--peer-python FILE] [--peers FOLDER]

The two last name what holds the published packages (see explainers.py and apgd.py); without them those columns stay empty."""
import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent/"nbs"/"results"
SCRIPTS = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("all", "machine"))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="some of them")
    parser.add_argument("--peer-python", help="interpreter that has the explainers' peers")
    parser.add_argument("--peers", help="folder that has torchattacks")
    args = parser.parse_args()
    own = dict(explainers=["--peer-python", args.peer_python], apgd=["--peers", args.peers])
    failed = []
    for name in args.only:
        more = [a for a in own.get(name, []) if all(own[name])]
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, HERE/f"{name}.py", "--json", RESULTS/f"bench_{name}.json", *more])
        if done.returncode: failed.append(name)
    if failed: sys.exit(f"failed: {', '.join(failed)}")
