"""What the experiment notebooks show: it is small, names its run, and belongs to the code and to the recorded study.
`make record` writes it. Tests of executed copies look at the smallest study, where there is one: CI runs it first."""
import ast
import base64
import io
import json
import re

import nbformat
import pytest
import record
import yaml
from nbdev.clean import clean_nb
from pages import SHOWN_RUN
from PIL import Image

from reclip_nb.report import sections
from reclip_nb.study import digest, runs_root, study_jobs
from reclip_nb.study.graph import config_files

EXPERIMENTS = record.experiments()
SMALLEST = runs_root()/"tiny"/"smoke-seed0"
each_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)


def read(path):
    "A notebook as it is stored."
    return nbformat.read(path, nbformat.NO_CONVERT)


def defaults(path) -> dict:
    "Values in the parameters cell of a notebook."
    (cell,) = (c for c in read(path).cells if "parameters" in record.tags(c))
    return {a.target.id: ast.literal_eval(a.value) for a in ast.parse(cell.source).body}


def line_of(nb) -> re.Match:
    "The sentence that names the run of the outputs; fails where nothing is recorded."
    outputs = record.shown_cells(nb)[0].outputs
    assert outputs, "nothing is recorded: run `make record`"
    line = record.LINE.fullmatch(outputs[0].data.get("text/markdown", ""))
    assert line, "the first output does not name its run: run `make record`"
    return line


def shown(nb) -> list[tuple[str, str]]:
    "Kind and content of what each shown cell has recorded."
    return [record.first_rich(c) for c in nbformat.from_dict(without_line(nb))]


def without_line(nb) -> list:
    "Shown cells of a recorded notebook; the line that names the run is left out."
    first, *others = record.shown_cells(nb)
    return [first | dict(outputs=first.outputs[1:]), *others]


# The committed notebooks

@each_experiment
def test_table_and_figure_are_recorded(path):
    "One of each, in the cells tagged `shown`, and no other output."
    nb = read(path)
    line_of(nb)
    assert all(len(c["outputs"]) == 1 for c in without_line(nb))
    assert not any(c.outputs for c in record.code_cells(nb) if c not in record.shown_cells(nb))
    assert sorted(kind.partition("/")[0] for kind, _ in shown(nb)) == ["image", "text"]


@each_experiment
def test_recorded_outputs_are_of_this_code(path):
    "The line carries a digest of the parameters and of the cells that show; comments and prose are free to change."
    nb = read(path)
    assert line_of(nb)["code"] == record.code_digest(nb), "parameters or shown cells have changed: run `make record`"


def test_recorded_outputs_are_of_the_recorded_study():
    "Study, run and revision of every line are those of the recorded JSON."
    report = json.loads(record.RECORD.read_text())
    revisions = {p["revision"][:12] for p in report["provenance"]}
    for path in EXPERIMENTS:
        line = line_of(read(path))
        # the report over several seeds is a study of its own, made when the study is recorded
        several = path.stem == "report" and len(report["studies"]) > 1
        assert line["study"] == (record.STUDY if several else report["studies"][0]), path.stem
        assert line["run"] == SHOWN_RUN.get(path.stem, path.stem)
        assert path.stem == "report" or line["revision"] in revisions, f"{path.stem} is of another recording"


def test_recorded_parameters_are_those_of_today():
    "Every recorded run was given what it would get now from its notebook, the settings of the world and the graph."
    report, jobs, changed = json.loads(record.RECORD.read_text()), study_jobs("tiny", sweeps=True), []
    seeds = dict(zip(report["studies"], report["seeds"]))
    for run in report["runs"]:
        job = jobs[run["run"]]
        config = defaults(record.NBS/f"{job.notebook}.ipynb")
        for file in config_files("tiny", job.notebook, report["world"]):
            config |= yaml.safe_load(file.read_text()) or {}
        config |= dict(study=run["study"], world=report["world"], seed=seeds[run["study"]]) | job.parameters
        recipe = {k: v for k, v in config.items() if k != "processes"}   # recipes leave it out: it changes no number
        if run["digest"] not in (digest(config), digest(recipe)):
            changed.append(f"{run['study']}/{run['run']}")
    assert not changed, "run `make record`"


def test_results_page_shows_the_recorded_study():
    "The tables of the page are those that the recorded JSON gives."
    text = sections(json.loads(record.RECORD.read_text()))
    cells = record.code_cells(read(record.NBS/"results.ipynb"))
    outputs = [o.get("data", {}).get("text/markdown") for c in cells for o in c.outputs]
    for heading in ("Claims", "Findings", "Trade-off", "Dual AFT", "Coverage", "Made by"):
        assert text[heading] in outputs, heading


def test_recorded_outputs_are_small():
    sizes = {p.name: p.stat().st_size for p in EXPERIMENTS}
    assert {n: s for n, s in sizes.items() if s > record.NOTEBOOK} == {}
    assert sum(sizes.values()) <= record.ALL


# The copies that a study executed

def executed(path):
    "The copy that the smallest study executed, when its code is today's."
    file = SMALLEST/SHOWN_RUN.get(path.stem, path.stem)/"notebook.ipynb"
    if not file.exists():
        pytest.skip("not run here: make reproduce WORLD=smoke")
    copy = read(file)
    if [c.source for c in record.code_cells(copy)] != [c.source for c in record.code_cells(read(path))]:
        pytest.skip("the run here is of other code: make reproduce WORLD=smoke")
    return copy


@each_experiment
def test_executed_notebook_shows_pictures_and_tables(path):
    "No object prints itself where a picture belongs, no dictionary fills the page; the end is one line about the run."
    cells = record.code_cells(executed(path))
    plain = [o.data["text/plain"] for c in cells for o in c.outputs if o.get("data", {}).keys() == {"text/plain"}]
    assert not [p for p in plain if p.startswith("<")]
    assert not [p[:100] for p in plain if len(p) > 2000]
    assert re.fullmatch(r"Run\(tiny/smoke-seed0/[\w.]+, finished\)", plain[-1])


@each_experiment
def test_recorded_columns_are_those_of_a_run(path):
    "The table in the notebook has the columns that the code gives now."
    now = [record.first_rich(c) for c in record.shown_cells(executed(path))]
    nb = read(path)
    line_of(nb)
    assert [record.columns(*rich) for rich in shown(nb)] == [record.columns(*rich) for rich in now], "run `make record`"


# The tool

TABLE = "<table><thead><tr><th></th><th>model</th><th>PG</th></tr></thead><tbody><tr><th>0</th></tr></tbody></table>"


def picture(size):
    "A PNG of noise in base64: nothing compresses worse."
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def sketch(*outputs):
    "A notebook with a parameters cell, a table, a picture and an end; outputs, if any, by cell."
    code, parameters, shown = nbformat.v4.new_code_cell, dict(tags=["parameters"]), dict(tags=["shown"])
    cells = [code("steps: int = 3 # updates", id="a", metadata=parameters), code("frame", id="b", metadata=shown),
             code("fig # drawn above", id="c", metadata=shown), code("run", id="d")]
    for cell, own in zip(cells, outputs):
        cell.outputs = own
    kernel = dict(name="python3", display_name="python3", language="python")
    return nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))


@pytest.fixture
def ran(tmp_path):
    "A notebook and the folder of its run."
    out, show = nbformat.v4.new_output, record.output
    tables = [out("stream", name="stderr", text="warning"), show("text/html", TABLE), show("text/html", "<table/>")]
    pictures = [out("stream", name="stdout", text="PG"), show("image/png", picture((900, 700)))]
    copy = sketch([], tables, pictures, [out("execute_result", {"text/plain": "Run(s/r)"})])
    copy.cells.insert(1, nbformat.v4.new_code_cell("steps = 5", metadata=dict(tags=["injected-parameters"])))
    run = tmp_path/"runs"/"r"
    run.mkdir(parents=True)
    nbformat.write(copy, run/"notebook.ipynb")
    origin = dict(time="2026-01-02T03:04:05+0000", revision="0123456789abcdef", modified=True)
    (run/"run.json").write_text(json.dumps(dict(study="s", provenance=origin)))
    nbformat.write(sketch([], [], [], [out("stream", name="stdout", text="old")]), tmp_path/"r.ipynb")
    return tmp_path/"r.ipynb", run


def test_recorded_notebook_keeps_one_output_a_shown_cell(ran):
    nb = record.recorded(*ran)
    _, table, figure, end = nb.cells
    line, kept = table.outputs
    assert line.data["text/markdown"] == ("Recorded: study `s`, run `r`, 2026-01-02, revision `0123456789ab` "
                                          f"with local changes, code `{record.code_digest(nb)}`.")
    assert kept.data == {"text/html": TABLE}
    assert [*figure.outputs[0].data] == ["image/jpeg"] and not end.outputs
    again = json.loads(nbformat.writes(nb))
    clean_nb(again, allowed_cell_metadata_keys=["tags"])
    assert again == json.loads(nbformat.writes(nb)), "nbdev_clean has nothing to do"
    assert [(c.id, c.source) for c in nb.cells] == [(c.id, c.source) for c in read(ran[0]).cells]


def test_run_of_other_code_is_not_recorded(ran):
    nb = read(ran[0])
    nb.cells[1].source = "frame.round(2)"
    nbformat.write(nb, ran[0])
    with pytest.raises(SystemExit, match="other code"):
        record.recorded(*ran)


def test_code_digest_follows_code_and_not_comments():
    nb, comment, code, elsewhere = (sketch() for _ in range(4))
    comment.cells[0].source = "steps: int = 3 # number of updates"
    code.cells[0].source = "steps: int = 4 # updates"
    elsewhere.cells[3].source = "run.path"
    same = record.code_digest(nb)
    assert same == record.code_digest(comment) == record.code_digest(elsewhere) != record.code_digest(code)


@pytest.mark.parametrize("size", [(60, 40), (1400, 900)])
def test_pictures_are_made_small(size):
    kind, content = record.small(picture(size))
    data = base64.b64decode(content)
    assert len(data) <= record.PICTURE
    image = Image.open(io.BytesIO(data))
    assert image.get_format_mimetype() == kind
    assert image.width/image.height == pytest.approx(size[0]/size[1], rel=.02)


def test_columns_of_a_markdown_table():
    assert record.columns("text/markdown", "| claim | here |\n| --- | --- |\n| 1 | holds |") == ["claim", "here"]
