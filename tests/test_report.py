"Reports of made-up studies: complete, partial, empty, with undefined values; verdicts follow the numbers."
import ast
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from reclip_nb.benchmarks import METRICS
from reclip_nb.paper import EXPERIMENTS, table
from reclip_nb.report import report_json, sections
from reclip_nb.report.dual import dual_table, plot_dual
from reclip_nb.report.measured import RECORDED, TRAINING
from reclip_nb.report.pages import comparison_table, tradeoff, weight_sweep
from reclip_nb.study import finish_run, has_run, runs_root, start_run, study_jobs, write_json
from reclip_nb.study.rows import check_rows, report_rows, training_rows

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ("epg0.0", "epg0.2", "epg0.4", "epg0.6")
MAPS = dict(clip=.30, aft1=.35, aft4=.50) | {m: .50+.08*i for i, m in enumerate(SWEEP)}
CLEAN = dict(clip=.80, aft1=.78, aft4=.70, epg_from_clip=.20, epg_from_clip_guarded=.60) | dict.fromkeys(SWEEP, .72)
ROBUST = dict(clip=.10, aft1=.25, aft4=.40, epg_from_clip=.02, epg_from_clip_guarded=.30) | dict.fromkeys(SWEEP, .42)
METHODS = ("simple_gradient", "gradcam", "grad_eclip", "random", "center")
GROW = dict(clip=.1, aft1=.2, aft4=.3) | dict.fromkeys(SWEEP, .3)  # what rises from CLIP to AFT


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Path:
    "The folder of all studies."
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path/"runs"))
    return tmp_path/"runs"


def row(metric: str, mean: float, **columns) -> dict:
    "A number with an interval around it; `columns` replace the common ones."
    return dict(metric=metric, mean=mean, low=mean-.02, high=mean+.02, interval="bootstrap", n=96,
                chance=None) | columns


def record(study: str, experiment: str, rows: list[dict], config: dict | None = None, protocol: dict | None = None,
           **results):
    "A finished run of an experiment with the rows of a report."
    run = start_run(study, experiment, experiment, config or {}, protocol or dict(rule="made up"))
    finish_run(run, results | dict(table=report_rows(rows)))


def train(study: str, name: str, **changed):
    "A finished training run; `changed` scalars."
    experiment = "train_clip" if name == "clip" else "train_aft" if name.startswith("aft") else "train_epg"
    metrics = dict(clean=CLEAN[name], n=384, robust_2=ROBUST[name], robust_4=ROBUST[name]/2, n_robust=192, energy={})
    if name == "epg_from_clip": metrics |= dict(aft=.9, epg=.76)
    elif experiment == "train_epg": metrics |= dict(aft=.1, epg=.35 if "guarded" in name else .45)
    metrics |= changed
    finish_run(start_run(study, name, experiment, {}), metrics | dict(table=training_rows(name, metrics)))


def localise(study: str, models=MAPS, shift: float = 0, protocols=("zero_shot", "linear_probe"), **changed):
    "A finished localisation run; `changed` values of the first protocol are keyed model/method/metric."
    rows = []
    for m, k, metric, p in itertools.product(models, METHODS, METRICS, protocols):
        mean = MAPS[m]+shift
        if p == protocols[0]: mean = changed.get(f"{m}/{k}/{metric}", mean)
        rows.append(row(metric, mean, protocol=p, method=k, model=m, interval="normal", n=384, chance=.14))
    record(study, "localisation", rows, protocol=dict(upsampling="bilinear", ties="stable"))


def concepts(study: str, similarities=("soft_wpmi", "cos", "cos_cubed", "pearson"), models=("clip", "aft1", "aft4")):
    "Runs of both dissections."
    rows = [row(s, GROW[m], protocol="own concepts", method=k, model=m) for m in models for k in similarities
            for s in ("mean", "median")]
    record(study, "clip_dissect", rows, dict(models=models, similarities=similarities))
    rows = []
    for (m, v), o in itertools.product(GROW.items(), ("after", "before")):
        counts = dict(detectors=96*v, percent_of_neurons=100*v)
        rows += [row(k, count, protocol=o, method="detectors", model=m) for k, count in counts.items()]
        rows.append(row("detectors", 20*v, protocol=o, method="rotated", model=m))
    record(study, "network_dissection", rows)


def accuracy(study: str, **changed):
    "Runs of zero_shot and retrieval; `changed` accuracies are keyed model_metric."
    value = lambda m, k: changed.get(f"{m}_{k}", 1-GROW[m] if k == "clean" else GROW[m]/2)
    sets, budgets = ("shapes", "average", "average_valid"), ("clean", "robust_2", "robust_4")
    record(study, "zero_shot", [row(k, value(m, k), protocol=p, method=d, model=m)
                                for m, p, d, k in itertools.product(GROW, ("paper", "reference"), sets, budgets)])
    attacks, recalls = ("clean 0", "embedding 2", "embedding 4", "margin 2"), ("t2i_r1", "t2i_r5", "i2t_r1", "i2t_r5")
    models = ("clip", "aft1", "aft4")
    record(study, "retrieval", [row(k, GROW[m], protocol=g, method=a, model=m)
                                for m, a, g, k in itertools.product(models, attacks, ("all", "64"), recalls)])


def roar(study: str):
    "A run of roar."
    areas = {("random", "none"): .8, ("simple_gradient", "clip"): .6, ("simple_gradient", "aft4_rn"): .4,
             ("gradcam", "clip"): .6,
             ("gradcam", "aft4_rn"): .6}
    record(study, "roar", [row("area", v, protocol=d, method=k, model=m) for (k, m), v in areas.items()
                           for d in ("shapes", "parts")],
           dict(models=["clip", "aft4_rn"], methods=["simple_gradient", "gradcam"], data=["shapes", "parts"]))


def dual(study: str):
    "A run of dual_aft."
    means = dict(aft4=[.1]*3, aft8=[.1]*3, aft4_pgd10=[.2]*3, aft4_long=[.2]*3, dual4_long=[.4]*3, dual1=[.5, .2, .2],
                 dual4=[.4, .3, .3],
                 dual16=[.3, .4, .4], dual64=[.2, .5, .5])
    rows = [row(k, v, protocol="probe and maps", method="simple_gradient", model=m)
            for m, values in means.items() for k, v in zip(("clean", "robust_2", "energy"), values, strict=True)]
    rows += [row("PG-energy", .3, protocol="maps", method=e, model=m, interval="normal", chance=.14) for m in means
             for e in METHODS[:2]]
    rows += [row("price", 1., protocol="price", method="training", model=m, low=None, high=None) for m in means]
    record(study, "dual_aft", rows, dict(pgd=["aft4", "aft8"], dual=["dual1", "dual4", "dual16", "dual64"],
                                         variants=["aft4_pgd10", "aft4_long", "dual4_long"]))


def legrad_values() -> dict[tuple, float]:
    "The paper's own numbers as fractions, keyed by table, method and metric, with made-up areas of random pixels."
    names, both = dict(negative="negative_target", positive="positive_target"), ("negative_target", "positive_target")
    values = {}
    for n in (6, 7, 9):
        cells = table(f"legrad.table{n}").fractions.set_index("method").rename(columns=names).stack()
        values |= {(n, m, k): v for (m, k), v in cells.items()}
        values |= {(n, "random", k): v for k, v in zip(both, (.3, .4), strict=True)}
    kind = {(False, False): "legrad:one_layer:no_relu", (True, False): "legrad:one_layer",
            (False, True): "legrad:slope1.0",
            (True, True): "legrad"}
    for _, r in table("legrad.table8").fractions.query("model == 'ViT-L-14'").iterrows():
        values |= {(8, kind[r.relu, r.all_layers], k): r[k.removesuffix("_target")] for k in both}
    for _, r in table("legrad.table10").fractions.iterrows():
        values |= {(10, f"legrad:slope{r.slope}" if r.slope else "legrad", k): r[k.removesuffix("_target")]
                   for k in both}
    return values


def legrad(study: str, **changed):
    "Runs of the LeGrad half with the paper's own numbers; `changed` values are keyed table/method/metric."
    model = {6: "clip", 7: "siglip", 8: "clip", 9: "classifier", 10: "clip"}
    rows = [row(k, changed.get(f"{n}/{m}/{k}", v), protocol=f"legrad.table{n}", method=m, model=model[n])
            for (n, m, k), v in legrad_values().items()]
    record(study, "legrad_perturbation", [r for r in rows if r["metric"] != "p_miou"])
    record(study, "legrad_open_vocabulary", [r for r in rows if r["metric"] == "p_miou"])
    birds = table("legrad.table11").frame.replace("chefer_lrp", "transformer_attribution").set_index("method").stack()
    record(study, "funnybirds", [row(k, v, protocol="Co-12", method=m, model="classifier_parts")
                                 for (m, k), v in birds.items()])
    shares = {"first block": .2, "block -2": .3, "last block": .5, "led by first block": 4/24,
              "led by last block": 20/24}
    models = ["clip", "siglip"]
    record(study, "layer_gradients", [row(k, v, protocol="classes", method="legrad", model=m)
                                      for m in models for k, v in shares.items()], dict(models=models))


def gallery(study: str, models=("clip", "aft4", "epg0.6"), methods=("simple_gradient", "grad_eclip")):
    "A finished gallery without pictures."
    explainers = ["legrad", "chefer", "gradcam", "attention_cam", "raw_attention", "rollout", "textspan"]
    config = dict(models=models, methods=methods, six=True, ood=["lesions", "films", "animals", "tunnels"],
                  explainers=explainers)
    sets = (("out_of_distribution", "films"), ("out_of_distribution", "all"), ("six_class_probe", "shapes"))
    rows = [row(k, GROW[m], protocol=p, method=d, model=m, n=192) for m in models if m in ("clip", "aft4")
            for p, d in sets
            for k in ("PG-energy", "concentration")]
    record(study, "saliency_gallery", rows, config, figures=[])


def make(study: str, shift: float):
    "A study with all its runs."
    for name in CLEAN: train(study, name)
    localise(study, shift=shift)
    gallery(study)
    concepts(study)
    accuracy(study)
    dual(study)
    roar(study)
    legrad(study)
    finish_run(start_run(study, "tradeoff", "tradeoff", {}), dict(points=[dict(model=m) for m in SWEEP]))
    for name, job in study_jobs("tiny").items():   # the rest leaves nothing that is judged
        if not has_run(study, name) and name != "report": finish_run(start_run(study, name, job.notebook, {}), {})


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    "Folder of the complete studies made so far."
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def complete(kept, runs):
    "Makes a study with all its runs, once; from then on it is copied."
    def copied(study: str = "tiny/quick-seed0", shift: float = 0) -> str:
        first = kept/f"{shift:g}"/study
        if not first.exists():
            make(study, shift)
            shutil.copytree(runs/study, first)
        else: shutil.copytree(first, runs/study)
        return study
    return copied


def judged(report: dict) -> dict[str, str]:
    "Verdict of each finding."
    return {f["id"]: f["verdict"] for f in report["findings"]}


def verdicts(*studies) -> dict[str, str]: return judged(report_json(studies))


def status(report: dict) -> dict[str, str]:
    "Status of each table and figure."
    return {c["id"]: c["status"] for c in report["coverage"]}


def texts(report: dict) -> str:
    "All that a reader sees."
    return "\n".join(sections(report).values())


# Complete, partial, empty

def test_complete_study(complete):
    report = report_json([complete()])
    assert report["missing"] == {"tiny/quick-seed0": []}
    found = judged(report)
    assert {*found.values()} == {"holds", "reported"}
    claims = ("claim1", "claim2", "claim3", "claim4", "epg", "legrad", "dual")
    assert {c["id"]: c["verdict"] for c in report["claims"]} == dict.fromkeys(claims, "holds")
    known = status(report)
    assert known.keys() == {i for ids in EXPERIMENTS.values() for i in ids}
    networks = {f"legrad.fig{n}" for n in (9, 10, *range(12, 19))}  # not in the embedded world
    few = {"re.table4", "legrad.table8"}  # one data set instead of five; one CLIP instead of two
    assert {i for i, s in known.items() if s == "partly measured"} == few | networks
    assert {*known.values()} == {"measured", "partly measured"}


def test_values_stand_beside_the_paper(complete):
    report = report_json([complete()])
    t1 = comparison_table(report, "re.table1").query("protocol == 'zero_shot' and saliency == 'simple_gradient'")
    assert [*zip(t1["model"], t1["source"], t1["PG"])] == [
        ("clip", "paper", "9.5"), ("clip", "measured, tiny", "30.0 [28.0, 32.0]"),
        ("aft1", "measured, tiny", "35.0 [33.0, 37.0]"),
        ("aft4", "paper", "33.3"), ("aft4", "original authors", "33.3"),
        ("aft4", "measured, tiny", "50.0 [48.0, 52.0]")]
    t6 = comparison_table(report, "re.table6").query("w_s == 0.6 and saliency == 'grad_eclip'")
    assert [*t6["IoU"]] == ["21.5", "74.0 [72.0, 76.0]"]
    t4 = comparison_table(report, "re.table4").query("eps_255 == 2 and model == 'aft4'")
    assert [*t4["average"]] == ["28.6", "28.0", "15.0 [13.0, 17.0]"]
    assert [*t4["shapes"]] == ["–", "–", "15.0 [13.0, 17.0]"]
    t2 = comparison_table(report, "re.table2").query("similarity == 'cos' and model == 'aft4'")
    assert [*zip(t2["source"], t2["median"])] == [("paper", "0.4996"), ("measured, tiny", "0.3 [0.28, 0.32]")]
    t3 = comparison_table(report, "re.table3").query("model == 'aft4'")
    assert [*t3["detectors"]] == ["263", "258", "28.8 [28.78, 28.82]"]
    assert t3["percent_of_neurons"].iloc[2].startswith("30 ")
    t5 = comparison_table(report, "re.table5").query("eps_255 == 4 and model == 'clip'")
    assert [*t5["t2i_r1"]] == ["0.2", "10.0 [8.0, 12.0]"]
    assert comparison_table(report, "re.table7")["w_s"].nunique() == 4
    assert (comparison_table(report, "re.table1")["saliency"] == "center").sum() == 1  # a control looks at no model
    assert [*tradeoff(report)["model"]] == ["clip", "aft1", "aft4", *SWEEP, "epg_from_clip", "epg_from_clip_guarded"]
    assert weight_sweep(report)["w_s"].tolist() == [0, .2, .4, .6]


def test_every_table_says_protocol_preset_and_images(complete):
    text = sections(report_json([complete()]))
    for heading in ("[Re] Table 1", "[Re] Table 6"):
        assert "Protocol of `localisation`. upsampling: bilinear" in text[heading]
        assert "tiny/quick-seed0" in text[heading]
        assert "n = 384" in text[heading] and "Chance: PG 14.0" in text[heading]
    notebooks = {2: "clip_dissect", 3: "network_dissection", 4: "zero_shot", 5: "retrieval", 7: "network_dissection"}
    for n, notebook in notebooks.items():
        body = text[f"[Re] Table {n}"]
        assert f"Protocol of `{notebook}`. rule: made up" in body and "n = 96" in body
    assert "PGD-10" in text["Trade-off"] and "n = 192 to 384" in text["Trade-off"]


def test_partial_study_says_what_is_missing():
    study = "tiny/quick-seed0"
    train(study, "clip")
    train(study, "aft4")
    report = report_json([study])
    missing = {*report["missing"][study]}
    assert {"aft1", "epg0.0", "localisation"} <= missing and not {"clip", "report"} & missing
    found = judged(report)
    assert found["aft_robust"] == "holds" and found["aft4_clean"] == "reported"
    assert found["aft_pg"] == found["epg_from_clip"] == found["aft1_clean"] == "not measured"
    assert "missing: localisation of clip and aft4" in texts(report) and status(report)["re.table1"] == "not measured"
    localise(study, ["clip", "epg0.2"])
    gallery(study, models=("clip",))
    report = report_json([study])
    assert status(report)["re.table1"] == status(report)["re.table6"] == "partly measured"
    assert status(report)["re.fig1"] == status(report)["re.fig5"] == "not measured"  # a gallery without AFT and EPG
    assert judged(report)["epg_energy"] == "not measured" and len(weight_sweep(report)) == 1


def test_empty_study(runs):
    (runs/"tiny/quick-seed0").mkdir(parents=True)
    start_run("tiny/quick-seed0", "clip", "train_clip", {})  # begun, not finished
    report = report_json(["tiny/quick-seed0"])
    assert {f["verdict"] for f in report["findings"]} == {c["verdict"] for c in report["claims"]} == {"not measured"}
    assert {*status(report).values()} == {"not measured"} and report["runs"] == [] and tradeoff(report).empty
    assert "Nothing measured in tiny/quick-seed0" in texts(report)


def test_unknown_study_is_named(complete, runs):
    complete()
    words = r"no study 'tiny/full-seed0' in .*found: \['tiny/quick-seed0'\].*make reproduce"
    with pytest.raises(FileNotFoundError, match=words):
        report_json(["tiny/quick-seed0", "tiny/full-seed0"])
    shutil.rmtree(runs)
    with pytest.raises(FileNotFoundError, match="found: none"): report_json(["tiny/quick-seed0"])


def test_presets_do_not_mix(complete):
    studies = [complete(), complete("tiny/smoke-seed0")]
    with pytest.raises(ValueError, match="one preset and world"): report_json(studies)


def test_corrupt_metrics_are_named(complete, runs):
    complete()
    (runs/"tiny/quick-seed0/aft4/metrics.json").write_text('{"clean": .')
    with pytest.raises(ValueError, match="aft4/metrics.json is not valid JSON"): report_json(["tiny/quick-seed0"])


def test_legrad_stands_beside_the_paper(complete):
    report = report_json([complete()])
    t8 = comparison_table(report, "legrad.table8").query("relu and all_layers")
    assert [*zip(t8["model"], t8["source"], t8["positive"].str[:4])] == [
        ("ViT-L-14", "paper", "15.2"), ("ViT-L-14", "measured, tiny", "15.2"), ("ViT-H-14", "paper", "18.3")]
    t11 = comparison_table(report, "legrad.table11").query("method == 'chefer_lrp'")
    assert [*t11["ts"]] == ["95.0", "95.0 [93.0, 97.0]"]
    text, reason = sections(report), {c["id"]: c["reason"] for c in report["coverage"]}
    assert "on siglip" in text["LeGrad Table 7"] and "n = 96" in text["LeGrad Table 7"]
    assert "rule: made up" in text["LeGrad Table 11"]
    assert "8 of 16 published cells" in reason["legrad.table8"] and "ViT-H-14" in reason["legrad.table8"]
    assert reason["legrad.fig16"] == "layer_gradients: clip, siglip instead of ViT-L-14@openai"


def test_dual_over_seeds_from_the_file_alone(complete, runs):
    report = json.loads(json.dumps(report_json([complete(f"tiny/quick-seed{i}") for i in range(2)])))
    shutil.rmtree(runs)
    rows = dual_table(report).set_index("model")
    curves = ["aft4", "aft8", "dual1", "dual4", "dual16", "dual64"]
    assert [*rows.index] == [*curves, "aft4_pgd10", "aft4_long", "dual4_long"]
    assert rows.loc["dual64", ["clean", "robust 2/255", "PG-energy, gradcam", "price"]].tolist() == [
        "20.0 [20.0, 20.0]", "50.0 [50.0, 50.0]", "30.0 [30.0, 30.0]", "1.0 [1.0, 1.0]"]
    assert len(plot_dual(report).axes) == 2 and "dual16" in sections(report)["Dual AFT"]


@pytest.mark.parametrize("seed", range(4))
def test_any_subset_of_runs_makes_a_report(complete, runs, seed):
    studies, draw = [complete(f"tiny/quick-seed{i}") for i in range(2)], random.Random(seed)
    gone = {s: sorted(n for n in study_jobs("tiny") if n != "report" and draw.random() < .5) for s in studies}
    for s in studies:
        for name in gone[s]: shutil.rmtree(runs/s/name)
    report = report_json(studies)
    assert {s: sorted(names) for s, names in report["missing"].items()} == gone
    text = texts(json.loads(json.dumps(report, allow_nan=False)))
    assert not {"nan", "None"} & {*text.replace("|", " ").split()} and all(f"missing in {s}" in text for s in studies)


def test_a_file_without_newer_keys_still_shows(complete):
    report = report_json([complete()])
    del report["dual"]
    report["tables"] = {id: rows for id, rows in report["tables"].items() if not id.startswith("legrad")}
    text = sections(report)
    assert "Dual AFT" not in text and "LeGrad Table 6" not in text and "[Re] Table 1" in text


# Undefined values and seeds

@pytest.mark.parametrize("undefined", [math.nan, None])
def test_undefined_values_are_missing_values(complete, undefined):
    study = complete()
    train(study, "aft4", robust_2=undefined)
    localise(study, **{"aft4/simple_gradient/energy_pointing": math.nan})
    report = report_json([study])
    found = judged(report)
    assert found["aft_robust"] == found["aft_energy"] == "not measured" and found["aft_pg"] == "holds"
    assert status(report)["re.table1"] == "partly measured"
    assert "nan" not in texts(report).lower().split() and "None" not in texts(report).split()
    row = comparison_table(report, "re.table1").query(
        "protocol == 'zero_shot' and saliency == 'simple_gradient' and model == 'aft4' and source == 'measured, tiny'")
    assert row["PG-energy"].item() == "–"
    json.dumps(report, allow_nan=False)


def test_three_seeds_give_mean_and_range(complete):
    studies = [complete(f"tiny/quick-seed{i}", shift) for i, shift in enumerate((-.1, 0, .04))]
    report = report_json(studies)
    assert report["seeds"] == [0, 1, 2]
    row = next(r for r in report["models"] if r["model"] == "aft4" and r["metric"] == "iou")
    assert [round(row[k], 3) for k in ("mean", "low", "high")] == [.48, .4, .54] and row["interval"] == "range of seeds"
    assert {k: round(v, 2) for k, v in row["per_seed"].items()} == dict(zip(studies, (.4, .5, .54)))
    assert "lowest and highest seed" in texts(report) and "over images" not in texts(report)


def test_one_seed_may_lack_a_run(complete, runs):
    studies = [complete(f"tiny/quick-seed{i}") for i in range(2)]
    shutil.rmtree(runs/studies[1]/"aft4")
    report = report_json(studies)
    f = next(f for f in report["findings"] if f["id"] == "aft_robust")
    assert f["verdict"] == "holds" and [*f["per_seed"]] == studies[:1]
    assert report["missing"] == {studies[0]: [], studies[1]: ["aft4"]}


def test_the_mean_of_the_seeds_decides(complete):
    studies = [complete(f"tiny/quick-seed{i}") for i in range(3)]
    localise(studies[0], **{"aft4/simple_gradient/pointing_game": .25})  # one seed against: -5, +20, +20
    assert verdicts(studies[0])["aft_pg"] == "fails" and verdicts(*studies)["aft_pg"] == "holds"


def test_protocols_that_differ_are_both_shown(complete):
    studies = [complete(f"tiny/quick-seed{i}") for i in range(2)]
    run = start_run(studies[1], "localisation", "localisation", {}, dict(upsampling="nearest"))
    finish_run(run, dict(table=[]))
    assert sections(report_json(studies))["[Re] Table 1"].count("Protocol of `localisation`") == 2


# Rules

@pytest.fixture(scope="module")
def before(tmp_path_factory) -> dict[str, str]:
    "Verdicts of a complete study that nobody has changed."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIP_RUNS", str(tmp_path_factory.mktemp("before")))
        make("tiny/quick-seed0", 0)
        return verdicts("tiny/quick-seed0")


FLIPS = {
    "aft_pg": dict(maps={"aft4/simple_gradient/pointing_game": .29}),
    "aft_energy": dict(maps={"aft4/simple_gradient/energy_pointing": .36}),  # +6 points, 6.95 are needed
    "aft_gradcam": dict(maps={"aft4/gradcam/average_precision": .29}),
    "aft_grad_eclip": dict(maps={"aft4/grad_eclip/iou": .29}),
    "aft_robust": dict(name="aft4", robust_2=.23),  # +13 points, 13.3 are needed
    "apgd_robust": dict(accuracy={"aft1_robust_4": .04}),
    "clean_order": dict(accuracy={"aft4_clean": .85}),
    "epg_ap_grows": dict(maps={"epg0.4/simple_gradient/average_precision": .57}),
    "epg_energy_grows": dict(maps={"epg0.2/simple_gradient/energy_pointing": .49}),
    "epg_from_clip": dict(name="epg_from_clip", clean=.41),
    "epg_guarded": dict(name="epg_from_clip_guarded", epg=.80),
    "legrad_first_table9": dict(legrad={"9/chefer/negative_target": .57}),
    "legrad_points_table7": dict(legrad={"7/gradcam/p_miou": .26}),
    "legrad_random": dict(legrad={"7/random/positive_target": .17}),
    "legrad_layers": dict(legrad={"8/legrad:one_layer/positive_target": .15}),
    "legrad_slope": dict(legrad={"10/legrad:slope0.5/negative_target": .52}),
}


@pytest.mark.parametrize("id", FLIPS)
def test_one_number_flips_one_verdict(complete, before, id):
    study, change = complete(), dict(FLIPS[id])
    assert before[id] == "holds"
    if "maps" in change: localise(study, **change["maps"])
    elif "accuracy" in change: accuracy(study, **change["accuracy"])
    elif "legrad" in change: legrad(study, **change["legrad"])
    else: train(study, **change)
    assert {k: v for k, v in verdicts(study).items() if v != before[k]} == {id: "fails"}


@pytest.mark.parametrize("metric", ["energy_pointing", "average_precision"])
def test_epg_must_beat_its_control(complete, metric):
    study = complete()
    localise(study, **{f"{m}/simple_gradient/{metric}": .5+.001*i for i, m in enumerate(reversed(SWEEP))})
    report = report_json([study])
    found, short = judged(report), {"energy_pointing": "energy", "average_precision": "ap"}[metric]
    assert found[f"epg_{short}"] == found[f"epg_{short}_grows"] == "fails"
    claim = next(c for c in report["claims"] if c["id"] == "epg")
    assert claim["verdict"] == "partly"


@pytest.mark.parametrize("changed", [dict(aft=.05), dict(epg=.4)])
def test_epg_from_clip_fails_only_on_all_three_counts(complete, changed):
    study = complete()
    train(study, "epg_from_clip", **changed)
    assert verdicts(study)["epg_from_clip"] == "fails"


def test_margins_belong_to_the_embedded_world(complete):
    margins = {w: {f["id"]: f["margin"] for f in report_json([complete(f"{w}-seed0")])["findings"]}
               for w in ("tiny/smoke", "tiny/full", "paper/quick")}
    ids = ("aft_energy", "aft_robust", "epg_energy")
    assert [margins["tiny/smoke"][i] for i in ids] == [.059/2, .099/2, .079/2]
    assert [margins["tiny/full"][i] for i in ids] == [.188/2, .26/2, .122/2]
    assert [margins["paper/quick"][i] for i in ids] == [0, 0, 0] and margins["tiny/full"]["aft_pg"] == 0


def test_protocols_are_judged_apart(complete):
    study = complete()
    localise(study, protocols=["linear_probe"])
    found = verdicts(study)
    assert found["probe_maps"] == "holds" and found["aft_pg"] == "not measured"


def test_a_run_without_rows_measures_nothing(complete, runs):
    study = complete()
    for name in ("retrieval", "clip_dissect", "funnybirds"): finish_run(start_run(study, name, name, {}), {})
    shutil.rmtree(runs/study/"legrad_open_vocabulary")
    known = status(report_json([study]))
    assert known["re.table5"] == known["re.table2"] == known["legrad.table11"] == "not measured"
    assert known["legrad.table9"] == "measured" and known["legrad.table6"] == "partly measured"


def test_rows_of_an_older_version_are_named(complete):
    study = complete()
    old = dict(model="clip", method="random", metric="area", mean=.5)
    finish_run(start_run(study, "roar", "roar", {}), dict(table=[old]))
    with pytest.raises(ValueError, match="quick-seed0/roar: a row has no column protocol, .*run the experiment again"):
        report_json([study])


# Rows of the experiments

def calls(notebook: str) -> set[str]:
    "Names of the functions that a notebook calls."
    nb = nbformat.read(ROOT/"nbs"/f"{notebook}.ipynb", nbformat.NO_CONVERT)
    trees = [ast.parse(c.source) for c in nb.cells if c.cell_type == "code"]
    return {n.func.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


@pytest.mark.parametrize("experiment", RECORDED)
def test_experiments_check_their_rows(experiment):
    "Trainings other than train_clip go through `reclip_nb.training`, which records their rows."
    wanted = "report_rows" if experiment not in TRAINING else "training_rows" if experiment == "train_clip" else "train"
    assert wanted in calls(experiment)


@pytest.fixture(scope="module")
def real_study(tmp_path_factory) -> Path:
    "The smallest study of the embedded world, run by Snakemake."
    folder = tmp_path_factory.mktemp("real")
    graph = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--quiet", "--config", "world=smoke"]
    run = subprocess.run(graph, cwd=ROOT, env=os.environ | dict(RECLIP_RUNS=str(folder)), capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder/"tiny"/"smoke-seed0"


@pytest.mark.slow
@pytest.mark.graph
@pytest.mark.parametrize("experiment", RECORDED)
def test_real_experiments_record_the_columns(real_study, experiment):
    runs = [p.parent for p in real_study.glob("*/run.json") if json.loads(p.read_text())["experiment"] == experiment]
    assert runs
    for run in runs: assert check_rows(json.loads((run/"metrics.json").read_text())["table"], run.name)


# The file and the notebooks

def test_report_is_deterministic_and_holds_no_path(complete, runs, tmp_path):
    studies = [complete(f"tiny/quick-seed{i}") for i in range(2)]
    report = report_json(studies)
    first, second = json.dumps(report), json.dumps(report_json(studies))
    assert first == second and str(tmp_path) not in first
    assert sections(json.loads(first)) == sections(report)  # the JSON is enough to show everything


@pytest.mark.graph
def test_report_notebook_writes_its_files(complete, tmp_path):
    for i in range(2): complete(f"tiny/quick-seed{i}")
    out = tmp_path/"out.ipynb"
    papermill.execute_notebook(ROOT/"nbs"/"report.ipynb", out, dict(seeds=2), progress_bar=False)
    folder = runs_root()/"tiny"/"quick"/"report"
    assert json.loads((folder/"report.json").read_text()) == report_json(["tiny/quick-seed0", "tiny/quick-seed1"])
    assert (folder/"report.md").read_text().startswith("## Claims") and (folder/"sweep.png").stat().st_size > 5000
    assert json.loads((folder/"metrics.json").read_text())["findings"]["aft_pg"] == "holds"


@pytest.mark.graph
def test_results_page_needs_only_its_file(complete, tmp_path, monkeypatch):
    write_json(tmp_path/"nbs"/"results"/"tiny_quick.json", report_json([complete()]))
    shutil.copy(ROOT/"nbs"/"results"/"bench_explainers.json", tmp_path/"nbs"/"results")
    monkeypatch.setenv("RECLIP_ROOT", str(tmp_path))
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path/"nothing"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures into the page
    monkeypatch.setenv("PYTHONPATH", str(ROOT)+os.pathsep+os.environ.get("PYTHONPATH", ""))
    papermill.execute_notebook(ROOT/"nbs"/"results.ipynb", tmp_path/"out.ipynb", progress_bar=False)
    text = (tmp_path/"out.ipynb").read_text()
    assert "50.0 [48.0, 52.0]" in text and "image/png" in text
