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
NOISE = .02 # standard error of an accuracy or of PG on the held-out images, and what another machine changes


def decided(finding: dict, studies: list[str]) -> bool:
    "Whether the recorded value of these studies is farther from its margin than the noise."
    values = [finding["per_seed"][s] for s in studies if s in finding["per_seed"]]
    return bool(values) and abs(sum(values)/len(values)-finding["margin"]) > NOISE


@pytest.mark.slow
@pytest.mark.graph
@pytest.mark.skipif(not RECORD.exists(), reason="no recorded study")
def test_recorded_findings_hold_again(tmp_path, monkeypatch):
    "One seed; all of them with RECLIP_FULL_STUDY=1."
    record = json.loads(RECORD.read_text())
    studies = record["studies"] if os.environ.get("RECLIP_FULL_STUDY") == "1" else record["studies"][:1]
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    graph = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--quiet", "--config", f"preset={record['preset']}",
             f"world={record['world']}", f"seeds={len(studies)}"]
    run = subprocess.run(graph, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    again = {f["id"]: f["verdict"] for f in report_json(studies)["findings"]}
    whole = len(studies) == len(record["studies"])
    for f in record["findings"]:
        if f["verdict"] not in ("holds", "fails"): assert again[f["id"]] == f["verdict"], f["id"]; continue
        if not decided(f, studies): continue
        expected = "holds" if whole else None
        values = [f["per_seed"][s] for s in studies]
        expected = "holds" if sum(values)/len(values) > f["margin"] else "fails"
        assert again[f["id"]] == expected, f["statement"]
