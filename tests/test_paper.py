"The papers' numbers: their identities, and each cell compared with the papers' text if it is available."
import dataclasses
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from reclip_nb.paper import (
    AFT_CODE,
    AFT_PAPER,
    CLAIMS,
    EPG_PAPER,
    EXPERIMENTS,
    FIGURES,
    implied_area,
    preset,
    table,
    tables,
)

ZERO_SHOT = ["cifar10", "stl10", "eurosat", "fgvc_aircraft", "imagenette"]


def test_ids_are_unique_and_every_reference_exists():
    ids = [t.id for t in tables()] + [f.id for f in FIGURES]
    assert len(ids) == len(set(ids))
    assert {i for v in EXPERIMENTS.values() for i in v} <= set(ids)
    assert {i for c in CLAIMS for i in c.evidence} <= set(ids)
    assert [c.id for c in CLAIMS] == ["claim1", "claim2", "claim3", "claim4"]


def test_every_numbered_table_and_figure_of_both_papers_is_here():
    numbered = {f"re.table{i}" for i in range(1, 9)} | {f"legrad.table{i}" for i in range(6, 12)}
    assert numbered <= {t.id for t in tables()}
    assert {f.id for f in FIGURES if f.id.startswith("re.")} == {f"re.fig{i}" for i in range(1, 6)}
    assert {f.id for f in FIGURES if f.id.startswith("legrad.")} == {f"legrad.fig{i}" for i in range(7, 19)}
    assert all(f.id in EXPERIMENTS[f.notebook] for f in FIGURES)


@pytest.mark.parametrize("t", tables(), ids=lambda t: t.id)
def test_table_is_tidy(t):
    f = t.frame
    assert list(f)[:len(t.index)] == list(t.index) and t.metrics
    assert not f.duplicated(list(t.index)).any()
    assert all(f[m].dtype.kind in "if" for m in t.metrics), "a misaligned row turns a column into text"
    assert set(t.higher_is_better) <= set(t.metrics)
    if t.unit in ("percent", "fraction"): assert t.fractions[list(t.metrics)].stack().between(0, 1).all()


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match="re.table1, "): table("re.table0")
    with pytest.raises(KeyError, match="legrad"): tables("aft")
    with pytest.raises(KeyError, match="aft_code"): preset("aft")
    with pytest.raises(ValueError, match="score"): _ = table("re.table2").fractions


def test_table4_average_is_the_mean_of_the_five_sets():
    t = table("re.table4").frame
    assert (t[ZERO_SHOT].mean(axis=1) - t.average).abs().max() < .0051


@pytest.mark.parametrize("id", ["re.table3", "re.table7"])
def test_percent_of_768_neurons(id):
    t = table(id).frame
    assert (t.detectors/768*100 - t.percent_of_neurons).abs().max() <= .05


def test_table2_rises_with_aft_and_only_cos_has_mean_below_median():
    t = table("re.table2").frame
    for _, g in t.groupby("similarity"):
        assert g["mean"].is_monotonic_increasing and g["median"].is_monotonic_increasing
    assert set(t[t["mean"] < t["median"]].similarity) == {"cos"}


def test_mask_areas_implied_by_pixel_accuracy_and_iou():
    t1, t6 = table("re.table1").fractions, table("re.table6").fractions
    t1["area"], t6["area"] = (implied_area(t.pixel_accuracy, t.iou) for t in (t1, t6))
    assert t6.area.between(.29, .33).all() and t1[t1.protocol == "linear_probe"].area.between(.29, .33).all()
    inflated = t1[t1.area > .5]
    assert set(zip(inflated.protocol, inflated.saliency, inflated.model)) == {
        ("zero_shot", "gradcam", "aft4"), ("zero_shot", "gradcam", "aft4_original")}


def test_legrad_tables_share_cells():
    t8, t10 = table("legrad.table8").frame, table("legrad.table10").frame
    l14 = t8[(t8.model == "ViT-L-14") & t8.all_layers].sort_values("relu", ascending=False)
    assert l14[["negative", "positive"]].to_numpy().tolist() == t10.iloc[[0, -1], 1:].to_numpy().tolist()
    for id in ("legrad.table7", "legrad.table9"):
        t = table(id).frame.set_index("method").loc[["rollout", "raw_attention"]]
        for c in ("negative", "positive"): assert (t[f"{c}_predicted"] == t[f"{c}_target"]).all()


def test_presets():
    assert preset("aft_code") is AFT_CODE and preset("aft_paper") is AFT_PAPER and preset("epg") is EPG_PAPER
    names = [f.name for f in dataclasses.fields(AFT_CODE)]
    assert names == ("model pretrained data eps_255 alpha_255 attack_steps start step_rule penalty eta_255 "
                     "sigma_255 n_noise outer_noise loss normalize objective lr beta1 beta2 weight_decay "
                     "wd_exclude_1d warmup first_step_peak steps batch_size").split()
    assert [f.name for f in dataclasses.fields(EPG_PAPER)] == names + "w_s normalizer mask geometry init".split()
    assert (AFT_CODE.beta2, AFT_PAPER.beta2, EPG_PAPER.lr, EPG_PAPER.warmup) == (.999, .95, 5e-6, 100)
    with pytest.raises(dataclasses.FrozenInstanceError): EPG_PAPER.w_s = 0


# The papers' own text, if the files are available

PAPERS = Path(os.environ.get("RECLIP_PAPERS", Path(__file__).resolve().parents[2]/"shared"/"papers"))
TITLES = {"re": "[Re] Boosting the Visual Interpretability", "legrad": "LeGrad: An Explainability Method"}


@pytest.fixture(scope="module")
def texts():
    "Paper -> text. Skips unless the folder (`$RECLIP_PAPERS`, default ../shared/papers) contains both."
    files = [p.read_text() for p in sorted(PAPERS.glob("*.txt"))]
    text_of = {k: t for k, title in TITLES.items() for t in files if title in t[:200]}
    if set(text_of) != set(TITLES): pytest.skip(f"no text of both papers in {PAPERS}")
    return text_of


def printed_rows(text, n, caption_below):
    "The purely numeric cells of each row of table n; captions are above the tables in [Re], below them in LeGrad."
    lines = text.split("\n")
    at = next(i for i, l in enumerate(lines) if re.match(rf"Table {n}[.:] ", l))
    step = -1 if caption_below else 1
    while not lines[at + step].strip(): at += step
    rows = []
    while lines[at + step].strip():
        at += step
        numbers = [number(cell.strip()) for cell in lines[at].split("\t")]
        rows.append([x for x in numbers if x is not None])
    return [r for r in rows[::step] if r]


def number(cell):
    "A cell as a float, or None: 9.53, 0., 115/768, 15.0%, 31K, 1.28M."
    m = re.fullmatch(r"([\d.]*\d\.?)(/768|%|K|M)?", cell)
    if not m: return None
    return round(float(m[1])*{"K": 1e3, "M": 1e6}.get(m[2], 1), 6)


def typed_rows(t):
    "Metric values of each row as typed."
    return [[round(float(v), 6) for v in r if v == v] for r in t.frame[list(t.metrics)].to_numpy()]


def contains(row, part):
    "Whether `part` is a contiguous part of `row`."
    return any(row[i:i + len(part)] == part for i in range(len(row)))


@pytest.mark.sample
@pytest.mark.parametrize("id", [t.id for t in tables() if re.search(r"table\d", t.id)])
def test_cells_equal_the_printed_table(texts, id):
    t = table(id)
    printed, typed = printed_rows(texts[t.paper], id.split("table")[1], t.paper == "legrad"), typed_rows(t)
    keys = [round(float(v), 6) for c in t.index if t.frame[c].dtype.kind in "if" for v in t.frame[c]]
    missing = Counter(sum(printed, [])) - Counter(sum(typed, [])) - Counter(keys)
    assert not missing, f"printed there, not typed here: {missing}"
    left = {"re.table1": 9, "legrad.table8": 4}.get(id, len(typed))  # rows of the left of two blocks side by side
    for block in (typed[:left], typed[left:]):
        rows = iter(printed)  # consumed row by row, so that the order must agree too
        for part in block: assert any(contains(r, part) for r in rows), f"typed here, not printed there: {part}"


@pytest.mark.sample
@pytest.mark.parametrize("paper, sentence", [
    ("re", "34.6 hours**, the experiments consumed **28.7 kWh**"),
    ("re", "**7.7 kg of CO₂e"),
    ("re", "**4.97 kWh**"),
    ("re", "**1.33 kg CO₂e**"),
    ("re", "**11.9 hours** of compute and **9.89 kWh**"),
    ("re", "**2.65 kg CO₂e**"),
    ("re", "original: 42→159"),
    ("re", "13.29 versus their 2.16"),
    ("re", "only a 2.84% drop"),
    ("re", "(277-298)"),
    ("legrad", "p-mIoU of 25.4, significantly surpassing GradCAM’s 7.0"),
    ("legrad", "AUC of 53.1 versus 43.0"),
])
def test_numbers_in_sentences(texts, paper, sentence):
    assert sentence in texts[paper].replace("\n", " ")


@pytest.mark.sample
def test_claims_are_quoted(texts):
    body = texts["re"].replace("’", "'").replace(r"$\epsilon = 1/255$", "epsilon = 1/255")
    for c in CLAIMS: assert f"({c.title}):** {c.statement}" in body
