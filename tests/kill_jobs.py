"The jobs of the processes in test_kills.py; a fork server imports them once, so a new process starts in milliseconds."
import os
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from helpers import golden
from test_robust import tiny

from reclip_nb.evaluations import robust_eval
from reclip_nb.models import frozen, load_clip, save_visual
from reclip_nb.objectives import AFT, EPG, Attack
from reclip_nb.study import finish_run, start_run, write_json
from reclip_nb.training import FitConfig, fit
from reclip_nb.training.checkpoints import drop_checkpoints
from reclip_nb.worlds import ShapesDataset, World

DATA = ShapesDataset(World(size=32, train=96), "train", seed=0)
OBJECTIVES = dict(aft=lambda aft: aft, epg=lambda aft: EPG(aft, w_s=.6))


def killed_at(rename: int):
    "Make this process kill itself just before its n-th renaming of a file, counted from 0."
    real, calls = os.replace, count()

    def replace(*args):
        if next(calls) == rename: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    os.replace = replace


def train(runs: Path, objective: str, steps: int = 12, every: int = 3, rename: int = -1):
    "Train into runs/kills/<objective> as the notebooks do, with checkpoints, weights and result."
    os.environ["RECLIP_RUNS"] = str(runs)
    sys.stdout = open(runs/"out.txt", "a", buffering=1)
    torch.set_num_threads(1)
    killed_at(rename)
    student = load_clip("tiny-smoke", seed=0)
    aft = OBJECTIVES[objective](AFT(student, frozen(student), Attack(steps=2)))
    run = start_run("kills", objective, "train_aft", dict(objective=objective))
    rows = fit(student.visual, aft, DATA, FitConfig(steps, 16, lr=1e-3, warmup=2), run, checkpoint_every=every)
    save_visual(student, run/"visual.safetensors")
    finish_run(run, {k: rows[-1][k] for k in ("step", "loss", "grad_norm")})
    drop_checkpoints(run)


def evaluate(folder: Path):
    "Robust accuracy, with a resumable state in the folder."
    torch.set_num_threads(1)
    d = golden("robust", "tiny_inputs.npz")
    report = robust_eval(tiny(), d["x"], d["y"], (10/255, 14/255), n_iter=40, batch_size=6, resume=folder/"state.npz")
    status = {f"{eps} {attack}": s for (eps, attack), s in report.status.items()}
    write_json(folder/"metrics.json", dict(table=report.table().to_dict("records"), card=report.card, status=status))
