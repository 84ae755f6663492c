"The committed results are what the code gives: the study runs again and its verdicts are compared, not its numbers."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reclip_nb.report import report_json

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT/"nbs"/"results"/"tiny_quick.json"
NOISE = .03 # what another machine may change in one seed's accuracy, PG or energy


@pytest.mark.slow
@pytest.mark.graph
@pytest.mark.skipif(not RECORD.exists(), reason="no recorded study")
def test_recorded_findings_hold_again(tmp_path, monkeypatch):
    "One seed against its own recorded values; all of them against the recorded verdicts with RECLIP_FULL_STUDY=1."
    record = json.loads(RECORD.read_text())
    studies = record["studies"] if os.environ.get("RECLIP_FULL_STUDY") == "1" else record["studies"][:1]
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    graph = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--quiet", "--config", f"preset={record['preset']}",
             f"world={record['world']}", f"seeds={len(studies)}", "sweeps=1"]
    run = subprocess.run(graph, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    report = report_json(studies)
    assert not any(report["missing"].values())
    again, compared = {f["id"]: f["verdict"] for f in report["findings"]}, 0
    for f in record["findings"]:
        if f["verdict"] not in ("holds", "fails"): continue
        value = f["value"] if len(studies) > 1 else f["per_seed"][studies[0]]
        if abs(value-f["margin"]) < NOISE: continue   # too close to call
        assert again[f["id"]] == ("holds" if value > f["margin"] else "fails"), f["statement"]
        compared += 1
    assert compared >= 3
