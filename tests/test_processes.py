"Training and evaluation in several processes: the numbers of one process, the error of a dead worker, and resumption."
import itertools
import os
import re
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from reclip_nb.benchmarks.localisation import join_scores as joined_scores
from reclip_nb.benchmarks.localisation import localisation, masked_batches
from reclip_nb.cli import checked_parameters, notebook_defaults
from reclip_nb.data import open_dataset
from reclip_nb.evaluations import ClipClassifier, prompts_of, robust_eval, text_classifier
from reclip_nb.evaluations.attacked import STANDS
from reclip_nb.evaluations.robust import join_reports as joined_reports
from reclip_nb.models import frozen, load_clip, save_clip, save_visual
from reclip_nb.objectives import AFT, EPG, Attack
from reclip_nb.study import Run, read_rows, runs_root, start_run
from reclip_nb.study.processes import barrier, launch, main_first, main_process, rank, sharded
from reclip_nb.training import FitConfig, fit, train
from reclip_nb.worlds import ShapesDataset, World

CFG = FitConfig(steps=4, batch_size=16, lr=1e-3, warmup=1, accumulate=4)


def opened(name):
    "Open a run folder in every process."
    with main_first():
        if main_process(): start_run("p", name, "train_aft", {})
    return Run(runs_root()/"p"/name)


def fitted(name, epg=False, fault=None, cfg=CFG, **options):
    "Fine-tune a tiny model in all processes of the group; returns the loss terms of the log."
    torch.set_num_threads(1)
    student, run = load_clip("tiny-smoke", seed=0), opened(name)
    data = ShapesDataset(World(size=32, train=64), "train", seed=0)
    aft = AFT(student, frozen(student), Attack(steps=1, start="uniform"))
    objective = EPG(aft, .6) if epg else aft
    calls = itertools.count()

    def with_fault(*args):
        if fault: fault(next(calls))
        return objective(*args)
    rows = fit(student.visual, with_fault, data, cfg, run, **options)
    if main_process(): save_visual(student, run/"visual.safetensors")
    barrier()
    return [{k: v for k, v in r.items() if k != "images_s"} for r in rows]


def nan_message():
    "Error message of each process if a gradient is not finite in the share of one process."
    run, net = opened("nan"), torch.nn.Linear(2, 1)
    data = [dict(image=torch.full((3, 2, 2), i/8), id=str(i)) for i in range(8)]

    def objective(batch, _):
        factor = float("nan") if "0" in batch["id"] else 1
        return dict(loss=(net(batch["image"])*factor).mean())
    with pytest.raises(FloatingPointError) as e: fit(net, objective, data, FitConfig(1, 8, 1e-3, accumulate=2), run)
    return str(e.value)


def evaluated():
    "Localisation and robust accuracy of a tiny model, shared out in batches of 8 images."
    clip = load_clip("tiny-smoke", seed=0).eval()
    data = open_dataset("shapes", split="val", size=32, world="smoke", seed=0, kind="zero_shot")

    def local(rows):
        batches = masked_batches(clip, data, 8, 36, only=rows)
        return localisation({"clip": clip}, batches, ["simple_gradient", "random"])
    f = ClipClassifier(clip, text_classifier(clip, prompts_of(data)))
    x = torch.stack([data[i]["image"] for i in range(20)])
    with torch.no_grad(): y = f(x).argmax(1)  # the model is untrained, so its own predictions serve as labels
    robust = lambda rows: robust_eval(f, x[rows], y[rows], [.5/255], ["apgd-ce"], n_iter=2, batch_size=8, ids=rows)
    report = joined_reports(sharded(robust, 20, 8))
    return joined_scores(sharded(local, 36, 8)), report.logits, report.status, report.card


def everything():
    "All computations of one launch."
    return dict(aft=fitted("aft"), epg=fitted("epg", epg=True), nan=nan_message(), evaluation=evaluated(), rank=rank())


def die(call):
    "Kill the second process in the last of its four steps, of two micro-batches each."
    if rank() == 1 and call == 7: os.kill(os.getpid(), signal.SIGKILL)


def killed(): return fitted("killed", fault=die, checkpoint_every=2)


def resumed():
    "Finish the killed run, then raise an error in the second process."
    rows = fitted("killed", checkpoint_every=2)
    if rank() == 1: raise ValueError("a deliberate error")
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("RECLIP_RUNS", str(tmp_path_factory.mktemp("runs")))
        m.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # spawned processes find this file
        yield runs_root()


@pytest.fixture(scope="module")
def two(runs): return launch(everything, (), 2, runs/"two", "cpu")


@pytest.fixture(scope="module")
def one(runs, two):
    os.rename(runs/"p", runs/"p2")
    return everything()


@pytest.mark.parametrize("name", ["aft", "epg"])
def test_two_processes_train_like_one(runs, one, two, name):
    assert [r["rank"] for r in two] == [0, 1] and two[0][name] == two[1][name], "both return the log"
    for a, b in zip(one[name], two[0][name], strict=True): assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    assert one[name][0]["loss"] != one[name][-1]["loss"]
    a, b = (load_file(runs/p/name/"visual.safetensors") for p in ("p", "p2"))
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=1e-3, atol=1e-4)


def test_nan_stops_all_processes_with_one_message(one, two):
    assert two[0]["nan"] == two[1]["nan"] and all(str(i) in two[0]["nan"] for i in range(8))
    assert sorted(one["nan"]) == sorted(two[0]["nan"]), "the same images, in another order"


def test_sharded_evaluation_is_the_evaluation(one, two):
    (scores, logits, status, card), (scores2, logits2, status2, card2) = one["evaluation"], two[1]["evaluation"]
    assert scores.keys() == scores2.keys() and torch.equal(logits, logits2)
    for k in scores:
        for metric, v in scores[k].items(): np.testing.assert_array_equal(scores2[k][metric], v)
    assert status.keys() == status2.keys() and all(torch.equal(status[k], status2[k]) for k in status)
    assert 0 < (status[.5/255, "apgd-ce"] == STANDS).sum() < 20, "the attack breaks some of the images"
    assert card == card2 and len(logits) == card["images"] == 20


def test_accumulate_must_be_shared_evenly(runs):
    values, _ = notebook_defaults("train_aft")
    with pytest.raises(ValueError, match="set accumulate to a multiple of 2"):
        train("train_aft", values | dict(processes=2, accumulate=3, batch_size=9))
    assert not list(runs.glob("tiny")), "nothing was started"


def test_killed_process_is_named_and_the_run_resumes(runs, one):
    "A killed run resumes to the weights of the uninterrupted run; an error in a process is named too."
    with pytest.raises(RuntimeError, match=r"process 1 of 2 ended: .*(?i:kill).*same command again") as e:
        launch(killed, (), 2, runs/"logs", "cpu")
    log = Path(re.search(r"Its log is (\S+)\. ", str(e.value))[1])
    assert log.exists() and len(read_rows(Run(runs/"p"/"killed"))) == 3
    with pytest.raises(RuntimeError, match="process 1 of 2 ended: ValueError: a deliberate error(?s:.*)Traceback"):
        launch(resumed, (), 2, runs/"logs", "cpu")
    outputs = [f.read_text() for f in (runs/"logs").glob("*/attempt_0/*/stdout.log")]
    assert len(outputs) == 4 and sum("resuming killed at step 2" in text for text in outputs) == 2
    a, b = (load_file(f/"visual.safetensors") for f in (runs/"p2"/"aft", runs/"p"/"killed"))
    assert all(torch.equal(a[k], b[k]) for k in a), "bit for bit"
    assert len(read_rows(Run(runs/"p"/"killed"))) == CFG.steps


def console_script(root, folder, name="reclip_train"):
    "The console script that pip would create from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(root/"settings.ini")
    entries = dict(e.split("=") for e in config["DEFAULT"]["console_scripts"].split())
    module, function = entries[name].split(":")
    script = folder/name
    script.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
    script.chmod(0o755)
    return script


def test_torchrun_and_the_console_script(root, runs, tmp_path):
    save_clip(load_clip("tiny-smoke", seed=0), tmp_path/"clip.safetensors")
    values = dict(study="console", world="smoke", model="tiny-smoke", pretrained=str(tmp_path/"clip.safetensors"),
                  steps=2, warmup=1, batch_size=8, accumulate=2, probe=False, country="")
    settings = tmp_path/"short.yaml"
    settings.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
               str(console_script(root, tmp_path)), "train_aft", "-f", str(settings),
               "-p", "name", "two", "-p", "device", "cpu"]
    p = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]
    two = Run(runs/"console"/"two")
    one = train("train_aft", checked_parameters("train_aft", [settings], [("name", "one")]))
    for a, b in zip(read_rows(one), read_rows(two), strict=True): assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert two.info["status"] == "finished" and two.info["protocol"]["processes"] == 2
    assert (two/"visual.safetensors").exists() and not list(two.path.glob("checkpoint*"))
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
