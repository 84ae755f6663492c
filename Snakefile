# The study as a graph: every job is one notebook, run by papermill into its own run folder.
#
#   snakemake -c2                                           the embedded world, one seed
#   snakemake -c2 --config world=full seeds=3               another size, three seeds
#   snakemake --profile NAME --config preset=paper          the papers' own settings, on a cluster
#
# A job runs again when its notebook, its YAML or the numbers it reads have changed in content (`--touch` accepts finished
# runs after a change of prose). A training that was stopped goes on from its last checkpoint.
import os
import sys

FOLDER = os.path.expanduser(os.environ.get("RECLIP_RUNS", "runs"))
STUDY = FOLDER + "/{preset}/{world}-seed{seed}"
PRESET, WORLD, SEEDS = config.get("preset", "tiny"), config.get("world", "quick"), int(config.get("seeds", 1))

# run: (notebook, runs it reads, its own parameters)
MODELS = ["clip", "aft1", "aft4", "epg0.0", "epg0.2", "epg0.4", "epg0.6", "epg_from_clip"]
RUNS = {
    "clip": ("train_clip", [], ""),
    "aft1": ("train_aft", ["clip"], "-p eps_255 1"),
    "aft4": ("train_aft", ["clip"], "-p eps_255 4"),
    "epg0.0": ("train_epg", ["aft4"], "-p init aft4 -p w_s 0.0"),
    "epg0.2": ("train_epg", ["aft4"], "-p init aft4 -p w_s 0.2"),
    "epg0.4": ("train_epg", ["aft4"], "-p init aft4 -p w_s 0.4"),
    "epg0.6": ("train_epg", ["aft4"], "-p init aft4 -p w_s 0.6"),
    "epg_from_clip": ("train_epg", ["clip"], "-p init clip -p w_s 0.6"),
    "localisation": ("localisation", MODELS, ""),
    "saliency_gallery": ("saliency_gallery", MODELS, ""),
    "report": ("report", ["localisation", "saliency_gallery"], ""),
}


def finished(wildcards):
    "The runs a job reads; only the embedded world trains a CLIP of its own."
    needed = [run for run in RUNS[wildcards.run][1] if run != "clip" or wildcards.preset == "tiny"]
    return [f"{STUDY.format(**wildcards)}/{run}/metrics.json" for run in needed]


rule all:
    input: [STUDY.format(preset=PRESET, world=WORLD, seed=seed) + "/report/metrics.json" for seed in range(SEEDS)]


# one rule a notebook, so that a cluster profile can give each its own resources
for notebook in dict.fromkeys(notebook for notebook, _, _ in RUNS.values()):
    rule:
        name: notebook
        message: "{wildcards.preset}/{wildcards.world}-seed{wildcards.seed}/{wildcards.run}"
        input:
            notebook=f"nbs/{notebook}.ipynb",
            settings="configs/{preset}/" + f"{notebook}.yaml",
            runs=finished
        output: STUDY + "/{run}/metrics.json"
        log: STUDY + "/{run}/log.txt"
        wildcard_constraints:
            run="|".join(run.replace(".", "[.]") for run in RUNS if RUNS[run][0] == notebook)
        params:
            python=sys.executable,
            executed=STUDY + "/{run}/notebook.ipynb",
            own=lambda wildcards: RUNS[wildcards.run][2]
        threads: 1
        shell:
            "TQDM_MININTERVAL=30 {params.python:q} -m papermill {input.notebook} {params.executed:q} "
            "-f {input.settings} -p study {wildcards.preset}/{wildcards.world}-seed{wildcards.seed} "
            "-p world {wildcards.world} -p seed {wildcards.seed} {params.own} "
            "--no-progress-bar --log-output > {log:q} 2>&1"
