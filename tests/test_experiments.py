"The experiment notebooks through papermill: refused parameters, the real architecture on real photographs, CIFAR-10."
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml


def papermill(root, runs, notebook, *args, check=True, **variables):
    "Run a notebook as the README says, with more environment variables; returns the process."
    env = {**os.environ, "RECLIP_RUNS": str(runs), "OMP_NUM_THREADS": "1", **variables}
    out = runs/f"{notebook}-{len(list(runs.glob('*.ipynb')))}.ipynb"
    p = subprocess.run([sys.executable, "-m", "papermill", f"nbs/{notebook}.ipynb", str(out), *map(str, args), "--no-progress-bar"],
                       cwd=root, env=env, capture_output=True, text=True)
    if check: assert p.returncode == 0, p.stderr[-3000:]
    return p


def metrics(runs, study, name): return json.loads((runs/study/name/"metrics.json").read_text())


@pytest.mark.parametrize("args, words", [(["-p", "esp_255", 4], "did you mean 'eps_255'"), (["-p", "lr", "fast"], "must be float")])
def test_wrong_parameters_are_refused(root, tmp_path, args, words):
    p = papermill(root, tmp_path, "train_aft", *args, check=False)
    assert p.returncode != 0 and words in p.stderr
    assert not list(tmp_path.glob("*/*/run.json")), "nothing was written"


def shortened(root, folder, **steps):
    "Everything the graph of the embedded world reads, with fewer steps of some trainings in its smallest world."
    for name in ("settings.ini", "nbs"): (folder/name).symlink_to(root/name)
    shutil.copytree(root/"configs", folder/"configs")
    for notebook, n in steps.items():
        file = folder/"configs"/"tiny"/"smoke"/f"{notebook}.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | dict(steps=n, warmup=1)))
    return folder


def test_one_notebook_alone_brings_what_it_needs(root, tmp_path):
    "EPG in a study that does not exist: the CLIP and the AFT run it starts from are made first."
    short = shortened(root, tmp_path, train_clip=20, train_aft=3)
    papermill(root, tmp_path, "train_epg", "-p", "world", "smoke", "-p", "steps", 4, "-p", "warmup", 1, "-p", "w_s", 0.3,
              RECLIP_ROOT=str(short))
    study = tmp_path/"tiny"/"smoke-seed0"
    assert {p.parent.name for p in study.glob("*/metrics.json")} == {"clip", "aft4", "epg0.3"}
    config = {n: json.loads((study/n/"run.json").read_text())["config"] for n in ("clip", "aft4")}
    assert config["clip"]["model"] == "tiny-smoke" and [c["steps"] for c in config.values()] == [20, 3]
    assert len((study/"epg0.3"/"log.jsonl").read_text().splitlines()) == 4


@pytest.mark.sample
def test_real_architecture_on_real_photographs(root, tmp_path):
    "ViT-B/16 at 224 px: AFT, EPG on instance masks, and its maps scored."
    papermill(root, tmp_path, "train_aft", "-f", "configs/sample/train_aft.yaml", "-p", "steps", 2, "-p", "precision", "bf16")
    papermill(root, tmp_path, "train_epg", "-f", "configs/sample/train_epg.yaml", "-p", "steps", 1, "-p", "warmup", 0,
              "-p", "batch_size", 1, "-p", "country", "")
    papermill(root, tmp_path, "localisation", "-f", "configs/sample/localisation.yaml", "-p", "limit", 2,
              "-p", "probe_limit", 13)   # the fewest, evenly spaced, that show all six classes
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
    papermill(root, tmp_path, "train_clip", "-f", "configs/sample/train_clip.yaml", "-p", "steps", 50, "-p", "warmup", 8,
              "-p", "country", "")
    weights = tmp_path/"sample/cifar/clip/clip.safetensors"
    papermill(root, tmp_path, "train_aft", "-f", "configs/sample/train_aft_cifar.yaml", "-p", "pretrained", weights, "-p", "steps", 5,
              "-p", "warmup", 1, "-p", "probe", False, "-p", "country", "")   # zero_shot measures it below
    clip, aft = (metrics(tmp_path, "sample/cifar", n) for n in ("clip", "aft2"))
    assert clip["clean"] > .2 and clip["n"] == 1500, "twice chance"
    assert aft["aft"] > 0
    papermill(root, tmp_path, "zero_shot", "-f", "configs/sample/zero_shot.yaml", "-p", "limit", 24, "-p", "n_iter", 4)
    rows = metrics(tmp_path, "sample/cifar", "zero_shot")["table"]
    rows = {(r["model"], r["prompts"], r["metric"]): r for r in rows if r["data"] == "cifar10_small"}
    assert len(rows) == 2*2*3 and all(r["n"] == 24 and r["chance"] == .1 for r in rows.values())
    for model in ("clip", "aft2"):
        clean, two, four = (rows[model, "reference", k]["mean"] for k in ("clean", "robust_2", "robust_4"))
        assert clean >= two >= four and clean > .1
