"Experiment notebooks run by papermill: wrong parameters, missing runs, ViT-B/16 on photographs, CIFAR-10."
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml


def papermill(root, runs, notebook, *args, check=True, **variables):
    "Run a notebook as in the README, with additional environment variables; returns the finished process."
    env = {**os.environ, "RECLIP_RUNS": str(runs), "OMP_NUM_THREADS": "1", **variables}
    out = runs/f"{notebook}-{len(list(runs.glob('*.ipynb')))}.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", f"nbs/{notebook}.ipynb", out, *args]
    process = subprocess.run(list(map(str, command)), cwd=root, env=env, capture_output=True, text=True)
    if check: assert process.returncode == 0, process.stderr[-3000:]
    return process


def metrics(runs, study, name):
    "Recorded metrics of a run."
    return json.loads((runs/study/name/"metrics.json").read_text())


WRONG = [(["-p", "esp_255", 4], "did you mean 'eps_255'"), (["-p", "lr", "fast"], "must be float")]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_parameters_are_refused(root, tmp_path, args, message):
    process = papermill(root, tmp_path, "train_aft", *args, check=False)
    assert process.returncode != 0 and message in process.stderr
    assert not list(tmp_path.glob("*/*/run.json")), "a refused notebook started a run"


def shortened(root, folder, **steps):
    "Copy of the settings and notebooks of the embedded world, with fewer training steps in its smallest world."
    for name in ("settings.ini", "nbs"): (folder/name).symlink_to(root/name)
    shutil.copytree(root/"configs", folder/"configs")
    for notebook, n in steps.items():
        file = folder/"configs"/"tiny"/"smoke"/f"{notebook}.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | dict(steps=n, warmup=1)))
    return folder


def test_missing_runs_are_made_first(root, tmp_path):
    "EPG in a study that does not exist: the notebook first trains the CLIP and the AFT model that it starts from."
    project = shortened(root, tmp_path, train_clip=20, train_aft=3)
    papermill(root, tmp_path, "train_epg", "-p", "world", "smoke", "-p", "steps", 4, "-p", "warmup", 1,
              "-p", "w_s", 0.3, RECLIP_ROOT=str(project))
    study = tmp_path/"tiny"/"smoke-seed0"
    assert {p.parent.name for p in study.glob("*/metrics.json")} == {"clip", "aft4", "epg0.3"}
    config = {n: json.loads((study/n/"run.json").read_text())["config"] for n in ("clip", "aft4")}
    assert config["clip"]["model"] == "tiny-smoke"
    assert [c["steps"] for c in config.values()] == [20, 3]
    assert len((study/"epg0.3"/"log.jsonl").read_text().splitlines()) == 4


@pytest.mark.sample
def test_real_architecture_on_real_photographs(root, tmp_path):
    "ViT-B/16 at 224 px: AFT, EPG with instance masks, and localisation scores."
    papermill(root, tmp_path, "train_aft", "-f", "configs/sample/train_aft.yaml", "-p", "steps", 2,
              "-p", "precision", "bf16")
    papermill(root, tmp_path, "train_epg", "-f", "configs/sample/train_epg.yaml", "-p", "steps", 1, "-p", "warmup", 0,
              "-p", "batch_size", 1, "-p", "country", "")
    papermill(root, tmp_path, "localisation", "-f", "configs/sample/localisation.yaml", "-p", "limit", 2,
              "-p", "probe_limit", 13)  # the smallest evenly spaced subset with all six classes
    aft, epg = (metrics(tmp_path, "sample/photos", n) for n in ("aft4", "epg0.6"))
    assert 0 < aft["aft"] < 4 and 0 < epg["epg"] < 1
    localisation = metrics(tmp_path, "sample/photos", "localisation")
    rows = [r for r in localisation["table"] if r["protocol"] == "zero_shot"]
    assert {r["model"] for r in rows} == {"clip", "aft4", "epg0.6"}
    assert all(r["n"]+r["undefined"] == 2 for r in rows)
    probed = [r for r in localisation["table"] if r["protocol"] == "linear_probe"]
    assert {r["model"] for r in probed} == {"aft4"} and localisation["probes"]
    assert all(0 < r["n"]+r["undefined"] <= 2 for r in probed), "an object can lie outside the crop"


@pytest.mark.sample
def test_cifar10(root, tmp_path):
    "The tiny architecture, trained and fine-tuned on photographs."
    papermill(root, tmp_path, "train_clip", "-f", "configs/sample/train_clip.yaml", "-p", "steps", 50,
              "-p", "warmup", 8, "-p", "country", "")
    weights = tmp_path/"sample/cifar/clip/clip.safetensors"
    papermill(root, tmp_path, "train_aft", "-f", "configs/sample/train_aft_cifar.yaml", "-p", "pretrained", weights,
              "-p", "steps", 5, "-p", "warmup", 1, "-p", "probe", False, "-p", "country", "")  # evaluated by zero_shot
    clip, aft = (metrics(tmp_path, "sample/cifar", n) for n in ("clip", "aft2"))
    assert clip["clean"] > .2 and clip["n"] == 1500, "twice chance"
    assert aft["aft"] > 0
    papermill(root, tmp_path, "zero_shot", "-f", "configs/sample/zero_shot.yaml", "-p", "limit", 24, "-p", "n_iter", 4)
    table = metrics(tmp_path, "sample/cifar", "zero_shot")["table"]
    rows = {(r["model"], r["prompts"], r["metric"]): r for r in table if r["data"] == "cifar10_small"}
    assert len(rows) == 2*2*3 and all(r["n"] == 24 and r["chance"] == .1 for r in rows.values())
    for model in ("clip", "aft2"):
        clean, two, four = (rows[model, "reference", k]["mean"] for k in ("clean", "robust_2", "robust_4"))
        assert clean >= two >= four and clean > .1
