# The study as a graph: every job is one notebook, run by papermill into its own run folder.
#
#   snakemake -c2                                                    the embedded world, one seed
#   snakemake -c2 --config world=full seeds=3                        another size, three seeds
#   snakemake --profile NAME --config preset=paper world=imagenet    the papers' own settings, on a cluster
#
# A job runs again when its notebook, its YAML or the numbers it reads have changed in content (`--touch` accepts finished
# runs after a change of prose). A training that was stopped goes on from its last checkpoint.
import os
import sys

PRESET = config.get("preset", "tiny")
WORLD = config.get("world", "quick")
SEEDS = range(int(config.get("seeds", 1)))
FOLDER = os.path.expanduser(os.environ.get("RECLIP_RUNS", "runs"))
STUDY = f"{FOLDER}/{PRESET}/{{world}}-seed{{seed}}"

# run: (notebook, runs it reads, its own parameters)
SWEEP = ["epg0.0", "epg0.2", "epg0.4", "epg0.6"]
START = "aft4_coco" if PRESET == "paper" else "aft4"   # [Re] 3.3: EPG starts from 5,000 steps of AFT4 on COCO
LEGRAD = ["legrad_perturbation", "legrad_open_vocabulary", "layer_gradients", "funnybirds"]
AS_LONG_AS_AFT = "-p steps 90 -p warmup 6 -p lr 3.0e-4" if PRESET == "tiny" else "-p steps 5000 -p lr 1.0e-5"
RUNS = {
    "clip": ("train_clip", [], ""),
    "aft1": ("train_aft", ["clip"], "-p name aft1 -p eps_255 1" + (" -p alpha_255 0.75" if PRESET == "tiny" else "")),
    "aft4": ("train_aft", ["clip"], "-p name aft4 -p eps_255 4"),
    "aft4_coco": ("train_aft", ["clip"], "-p name aft4_coco -p eps_255 4 -p data coco -p steps 5000"),
    **{run: ("train_epg", [START], f"-p name {run} -p init {START} -p w_s {run[3:]}") for run in SWEEP},
    **{run: ("train_epg", ["clip"], f"-p name {run} -p init clip -p w_s 0.6 -p min_total {guard} {AS_LONG_AS_AFT}")
       for run, guard in {"epg_from_clip": "1.0e-7", "epg_from_clip_guarded": "1.0e-4"}.items()},
    # the same length and weight, other maps: LeGrad's closed form, and both
    "legrad0.6": ("train_epg", [START], f"-p name legrad0.6 -p init {START} -p w_s 0.6 -y 'methods: [legrad]'"),
    "both0.6": ("train_epg", [START], f"-p name both0.6 -p init {START} -p w_s 0.6 -y 'methods: [simple_gradient, legrad]'"),
    "explainers": ("explainers", ["clip", "aft1", "aft4", "epg0.0", "epg0.6", "legrad0.6", "both0.6"], ""),
    # the LeGrad supplement
    "siglip": ("train_clip", [], "-p name siglip -p model tiny-siglip -p lr 1.0e-3"),
    "classifier": ("train_classifier", [], "-p name classifier"),
    "classifier_parts": ("train_classifier", [], "-p name classifier_parts -p data parts -p model tiny-vit-fine"),
    "legrad_perturbation": ("legrad_perturbation", ["clip", "siglip", "classifier"], ""),
    "legrad_open_vocabulary": ("legrad_open_vocabulary", ["clip", "siglip"], ""),
    "layer_gradients": ("layer_gradients", ["clip", "siglip"], ""),
    "funnybirds": ("funnybirds", ["classifier_parts"], ""),
    "localisation": ("localisation", ["clip", "aft1", "aft4", *SWEEP], ""),
    "saliency_gallery": ("saliency_gallery", ["clip", "aft1", "aft4", *SWEEP], ""),
    "report": ("report", [*LEGRAD, "localisation", "explainers", "saliency_gallery", "epg_from_clip", "epg_from_clip_guarded"], ""),
}
if PRESET != "tiny":   # only the embedded world trains the models it starts from
    for run in ["clip", "siglip", "classifier", "classifier_parts"]: del RUNS[run]
if PRESET == "sample": RUNS = {run: job for run, job in RUNS.items() if run not in LEGRAD}


def settings(wildcards):
    "YAML of the job: the preset's, then what the world changes."
    notebook = RUNS[wildcards.run][0]
    world = f"configs/{PRESET}/{wildcards.world}/{notebook}.yaml"
    return [f"configs/{PRESET}/{notebook}.yaml", *filter(os.path.exists, [world])]


def finished(wildcards):
    "The runs a job reads."
    return [f"{STUDY.format(**wildcards)}/{run}/metrics.json" for run in RUNS[wildcards.run][1] if run in RUNS]


rule all:
    input: [STUDY.format(world=WORLD, seed=seed) + "/report/metrics.json" for seed in SEEDS]


# one rule a notebook, so that a cluster profile can give each its own resources
for notebook in dict.fromkeys(notebook for notebook, _, _ in RUNS.values()):
    rule:
        name: notebook
        message: f"{PRESET}/{{wildcards.world}}-seed{{wildcards.seed}}/{{wildcards.run}}"
        input:
            notebook=f"nbs/{notebook}.ipynb",
            settings=settings,
            runs=finished
        output: STUDY + "/{run}/metrics.json"
        log: STUDY + "/{run}/log.txt"
        wildcard_constraints:
            run="|".join(run.replace(".", "[.]") for run in RUNS if RUNS[run][0] == notebook)
        params:
            python=sys.executable,
            executed=STUDY + "/{run}/notebook.ipynb",
            settings=lambda wildcards, input: " ".join(f"-f {file}" for file in input.settings),
            study=f"-p study {PRESET}/{{world}}-seed{{seed}} -p world {{world}} -p seed {{seed}}",
            own=lambda wildcards: RUNS[wildcards.run][2]
        threads: 1
        shell:
            "TQDM_MININTERVAL=30 {params.python:q} -m papermill {input.notebook} {params.executed:q} {params.settings} "
            "{params.study} {params.own} --no-progress-bar --log-output > {log:q} 2>&1"
