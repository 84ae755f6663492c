"The committed results are what the code gives: the study runs again and its verdicts are compared, not its numbers."
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
from scipy.stats import t as student

from reclip_nb.report import report_json

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT/"nbs"/"results"/"tiny_quick.json"
pytestmark = pytest.mark.skipif(not RECORD.exists(), reason="no recorded study")
LEAST = .03 # of an accuracy, PG or energy, what another machine may change where the seeds agree by chance


def decided(
    values: list[float], # of the recorded seeds
    margin: float, # what they had to exceed
    seeds: int = 1, # of the study that is run again
) -> bool | None: # whether the mean of that study must exceed the margin; None: open
    """Another machine rounds otherwise, so its trainings take another way, as those of another seed do. A finding is
    sure where the recorded mean is farther from the margin than 19 of 20 new studies are from it (Student's t)."""
    n, scatter = len(values), stdev(values)
    bound = student.ppf(.95, n-1)*scatter*(1/n+1/seeds)**.5
    if abs(mean(values)-margin) <= max(bound, LEAST): return None
    return mean(values) > margin


@pytest.fixture(scope="module")
def rules():
    "Recorded values by seed, and margin, of every finding that has a verdict."
    findings = json.loads(RECORD.read_text())["findings"]
    return {f["id"]: ([*f["per_seed"].values()], f["margin"]) for f in findings if f["verdict"] in ("holds", "fails")}


def test_recorded_seeds_decide_about_each_other(rules):
    "Two seeds say what the third finds; enough findings are sure for a test of one seed on another machine."
    agree = []
    for values, margin in rules.values():
        for i, left_out in enumerate(values):
            want = decided(values[:i]+values[i+1:], margin)
            if want is not None: agree.append((left_out > margin) == want)
    assert len(agree) >= 30 and mean(agree) >= .95
    assert sum(decided(*rule) is not None for rule in rules.values()) >= 20


@pytest.mark.parametrize("values, want", [([.3, .31, .29], True), ([-.3, -.31, -.29], False), ([.3, -.1, .2], None),
                                          ([.02, .02, .02], None)])
def test_what_seeds_decide(values, want):
    assert decided(values, 0) is want
    assert decided([v+.1 for v in values], .1) is want


@pytest.mark.slow
@pytest.mark.graph
def test_recorded_findings_hold_again(tmp_path, monkeypatch):
    "One seed, or all of them with RECLIP_FULL_STUDY=1, against what the recorded seeds are sure of."
    record = json.loads(RECORD.read_text())
    studies = record["studies"] if os.environ.get("RECLIP_FULL_STUDY") == "1" else record["studies"][:1]
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    graph = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--quiet", "--config",
             f"preset={record['preset']}", f"world={record['world']}", f"seeds={len(studies)}", "sweeps=1"]
    run = subprocess.run(graph, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    report = report_json(studies)
    assert not any(report["missing"].values())
    again, compared = {f["id"]: f["verdict"] for f in report["findings"]}, 0
    for f in record["findings"]:
        if f["verdict"] not in ("holds", "fails"): continue
        want = decided([*f["per_seed"].values()], f["margin"], len(studies))
        if want is None: continue
        assert again[f["id"]] == ("holds" if want else "fails"), f["statement"]
        compared += 1
    assert compared >= 20
