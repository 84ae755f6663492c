"The experiment notebooks through papermill: refused parameters, the real architecture on real photographs, CIFAR-10."
import json
import os
import subprocess
import sys

import pytest


def papermill(root, runs, notebook, *args, check=True):
    "Run a notebook as the README says; returns the process."
    env = {**os.environ, "RECLIP_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    out = runs/f"{notebook}-{len(list(runs.glob('*.ipynb')))}.ipynb"
    p = subprocess.run([sys.executable, "-m", "papermill", f"nbs/{notebook}.ipynb", str(out), *map(str, args), "--no-progress-bar"],
                       cwd=root, env=env, capture_output=True, text=True)
    if check: assert p.returncode == 0, p.stderr[-3000:]
    return p


def metrics(runs, study, name): return json.loads((runs/study/name/"metrics.json").read_text())


@pytest.mark.parametrize("args, words", [(["-p", "esp_255", 4], "did you mean 'eps_255'"), (["-p", "steps", "many"], "must be int"),
                                         (["-p", "lr", "fast"], "must be float")])
def test_wrong_parameters_are_refused(root, tmp_path, args, words):
    p = papermill(root, tmp_path, "train_aft", *args, check=False)
    assert p.returncode != 0 and words in p.stderr
    assert not list(tmp_path.glob("*/*/run.json")), "nothing was written"


def test_one_notebook_alone_brings_what_it_needs(root, tmp_path):
    "EPG in a study that does not exist: the CLIP and the AFT run it starts from are made first."
    papermill(root, tmp_path, "train_epg", "-p", "world", "smoke", "-p", "steps", 4, "-p", "warmup", 1, "-p", "w_s", 0.3)
    study = tmp_path/"tiny"/"smoke-seed0"
    assert {p.parent.name for p in study.glob("*/metrics.json")} == {"clip", "aft4", "epg0.3"}
    assert json.loads((study/"clip"/"run.json").read_text())["config"]["model"] == "tiny-smoke"
    assert len((study/"epg0.3"/"log.jsonl").read_text().splitlines()) == 4


@pytest.mark.sample
def test_real_architecture_on_real_photographs(root, tmp_path):
    "ViT-B/16 at 224 px: AFT, EPG on instance masks, and its maps scored."
    papermill(root, tmp_path, "train_aft", "-f", "configs/sample/train_aft.yaml", "-p", "steps", 2, "-p", "precision", "bf16")
    papermill(root, tmp_path, "train_epg", "-f", "configs/sample/train_epg.yaml", "-p", "steps", 1, "-p", "warmup", 0)
    papermill(root, tmp_path, "localisation", "-f", "configs/sample/localisation.yaml", "-p", "limit", 2)
    aft, epg = (metrics(tmp_path, "sample/photos", n) for n in ("aft4", "epg0.6"))
    assert 0 < aft["aft"] < 4 and 0 < epg["epg"] < 1
    found = metrics(tmp_path, "sample/photos", "localisation")
    rows = [r for r in found["table"] if r["protocol"] == "zero_shot"]
    assert {r["model"] for r in rows} == {"clip", "aft4", "epg0.6"} and all(r["n"]+r["undefined"] == 2 for r in rows)
    probed = [r for r in found["table"] if r["protocol"] == "linear_probe"]   # of the six classes; one may lie outside the crop
    assert {r["model"] for r in probed} == {"aft4"} and all(0 < r["n"]+r["undefined"] <= 2 for r in probed) and found["probes"]


@pytest.mark.sample
def test_cifar10(root, tmp_path):
    "The tiny architecture learns from, and is fine-tuned on, real photographs."
    papermill(root, tmp_path, "train_clip", "-f", "configs/sample/train_clip.yaml", "-p", "steps", 80, "-p", "warmup", 10)
    weights = tmp_path/"sample/cifar/clip/clip.safetensors"
    papermill(root, tmp_path, "train_aft", "-f", "configs/sample/train_aft_cifar.yaml", "-p", "pretrained", weights, "-p", "steps", 10, "-p", "warmup", 2)
    clip, aft = (metrics(tmp_path, "sample/cifar", n) for n in ("clip", "aft2"))
    assert clip["clean"] > .2, "twice chance"
    assert aft["n"] == 1500 and aft["aft"] > 0
    papermill(root, tmp_path, "zero_shot", "-f", "configs/sample/zero_shot.yaml", "-p", "limit", 24, "-p", "n_iter", 4)
    rows = metrics(tmp_path, "sample/cifar", "zero_shot")["table"]
    rows = {(r["model"], r["prompts"], r["metric"]): r for r in rows if r["data"] == "cifar10_small"}
    assert len(rows) == 2*2*3 and all(r["n"] == 24 and r["chance"] == .1 for r in rows.values())
    for model in ("clip", "aft2"):
        clean, two, four = (rows[model, "reference", k]["mean"] for k in ("clean", "robust_2", "robust_4"))
        assert clean >= two >= four and clean > .1
