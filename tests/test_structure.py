"""The shape of the notebooks, of their settings, and of the repository around them."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from readme import build

from reclip_nb.study import study_jobs

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
API = sorted(NBS.rglob("api/**/*.ipynb"))
READ = ("index", "results", "benchmarks", "equations", "protocols", "paper_scale", "faq")  # pages without parameters
PAGES = [NBS/f"{page}.ipynb" for page in READ]
EXPERIMENTS = sorted(set(NBS.glob("*.ipynb"))-set(PAGES))
NOTEBOOKS = sorted(NBS.rglob("*.ipynb"))
SETTINGS = sorted(p for preset in ("tiny", "sample", "paper") for p in ROOT.glob(f"configs/{preset}/**/*.yaml"))


def name(path: Path) -> str:
    "Test id of a file."
    return str(path.relative_to(ROOT))


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
each_api = pytest.mark.parametrize("path", API, ids=name)
each_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=name)


def cells(path: Path, kind: str = "code") -> list:
    "Cells of one kind."
    return [c for c in nbformat.read(path, nbformat.NO_CONVERT).cells if c.cell_type == kind]


def tree(cell) -> ast.Module:
    "Syntax tree of a code cell, magics left out."
    return ast.parse("\n".join("" if re.match(r"\s*[%!]", line) else line for line in cell.source.split("\n")))


def flags(cell) -> set[str]:
    "nbdev directives of a cell: export, hide, gpu ..."
    return set(re.findall(r"^#\|\s*(\w+)", cell.source, re.M))


def parameters(path: Path) -> dict[str, ast.AnnAssign]:
    "Annotated names of a notebook's parameters cell."
    tagged = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    return {a.target.id: a for c in tagged for a in tree(c).body if isinstance(a, ast.AnnAssign)}


def repository() -> list[Path]:
    "Every file that is or would be committed."
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [p for p in (ROOT/f for f in listed.split("\0") if f) if p.is_file()]


# Notebooks

@each_notebook
def test_notebook_is_clean(path):
    nb = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5)
    assert nb.metadata.kernelspec.name == "python3"
    assert len({c.id for c in nb.cells}) == len(nb.cells), "two cells share an id"
    assert not {k for c in nb.cells for k in c.metadata}-{"tags"}, "cell metadata other than tags"


@each_notebook
def test_notebook_is_small(path):
    budget = 300 if path in API else 1000
    assert path.stat().st_size <= budget*1000, f"over {budget} kB: smaller figures, fewer outputs"


@each_notebook
def test_first_markdown_cell_is_title_and_description(path):
    "nbdev takes the two for the head of the page and drops the cell: whatever else it holds is lost."
    assert re.fullmatch(r"# .+\n+> .+\n*", cells(path, "markdown")[0].source)


@each_api
def test_api_notebook_opens_with_its_module_and_title(path):
    first, second = nbformat.read(path, nbformat.NO_CONVERT).cells[:2]
    assert re.match(r"#\| *default_exp +[\w.]+", first.source)
    heading = re.match(r"# .+\n+> (.+)", second.source)
    assert second.cell_type == "markdown" and heading, "the second cell is an H1 and one line after '> '"
    assert not set(heading[1]) & set("\\$"), "the '> ' line becomes the module's docstring: no TeX"


@each_api
def test_imports_stand_alone(path):
    "The site's build runs every cell that holds an import, without the cells before it."
    for cell in cells(path):
        if flags(cell) & {"export", "exports", "exporti"}: continue
        imports = [n for n in ast.walk(tree(cell)) if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not imports or len(imports) == len(tree(cell).body), f"import mixed with code:\n{cell.source}"


@each_api
def test_cuda_cells_are_flagged(path):
    for cell in cells(path):
        if flags(cell) & {"export", "exports", "exporti", "gpu"}: continue
        assert not re.search(r"(device=|\.to\()[\"']cuda|\.cuda\(", cell.source), f"needs '#| gpu':\n{cell.source}"


@each_notebook
def test_cross_references_have_labels_on_the_page(path):
    text = "\n".join(c.source for c in nbformat.read(path, nbformat.NO_CONVERT).cells)
    for label in re.findall(r"@((?:fig|eq|tbl)-[\w-]+)", text):
        assert re.search(rf"(#|label: *){label}\b", text), f"@{label} has no label"


# Experiments and their settings

@each_experiment
def test_parameters_cell(path):
    code = cells(path)
    tagged = ["parameters" in c.metadata.get("tags", []) for c in code]
    assert tagged == [True]+[False]*(len(code)-1), "the first code cell has the parameters, and no other"
    known, lines = parameters(path), code[0].source.split("\n")
    assert len(known) == len(tree(code[0]).body), "annotated assignments only"
    assert {"study", "world", "seed"} <= known.keys()
    for key, node in known.items():
        ast.literal_eval(node.value)
        assert "#" in lines[node.end_lineno-1], f"{key} has no '# meaning'"


@each_experiment
def test_figures_are_drawn_by_pyplot_and_shown(path):
    "IPython prints the name of a figure, not its picture, until pyplot has made one. What is saved is also displayed."
    for cell in cells(path):
        calls = {ast.unparse(n.func) for n in ast.walk(tree(cell)) if isinstance(n, ast.Call)}
        assert not calls & {"Figure", "matplotlib.figure.Figure"}
        if "savefig(" in cell.source:
            assert "display" in calls or isinstance(tree(cell).body[-1], ast.Expr)


@each_experiment
def test_last_line_is_the_run(path):
    "One line about the run ends the page; the value of `finish_run`, all its numbers, would fill it."
    assert cells(path)[-1].source.split("\n")[-1] == "run"


@pytest.mark.parametrize("path", SETTINGS, ids=name)
def test_settings_are_parameters(path):
    # train_aft_cifar is a variant of train_aft
    named = [p for p in EXPERIMENTS if path.stem == p.stem or path.stem.startswith(p.stem+"_")]
    if not named: pytest.skip(f"no notebook {path.stem} is written yet")
    known = {k: ast.unparse(v.annotation) for k, v in parameters(named[0]).items()}
    given = yaml.safe_load(path.read_text()) or {}
    assert given.keys() <= known.keys()
    text = {k for k, v in given.items() if isinstance(v, str) and "str" not in known[k]}
    assert not text, f"text where a number is meant (write 1.0e-3, not 1e-3): {text}"


@each_experiment
def test_experiment_is_in_the_graph(path):
    assert path.stem in {job.notebook for job in study_jobs("tiny", sweeps=True).values()}


@pytest.mark.parametrize("path", SETTINGS, ids=name)
def test_settings_are_not_empty(path):
    assert yaml.safe_load(path.read_text()), "a notebook without settings needs no file"


@pytest.mark.parametrize("preset", ["tiny", "sample", "paper"])
def test_graph_resolves(preset):
    "Snakemake finds every notebook and every settings file of the preset."
    if not EXPERIMENTS: pytest.skip("no experiment notebook is written yet")
    dry = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--quiet", "--config", f"preset={preset}"]
    run = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_cluster_profile():
    "Snakemake accepts the profile and finds a job for every run."
    # the SLURM plugin itself is not needed for this
    dry = [sys.executable, "-m", "snakemake", "--profile", "configs/slurm", "--executor", "local", "--dry-run",
           "--forceall", "--config", "preset=paper", "world=imagenet"]
    run = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {*re.findall(r"Job \d+: paper/imagenet-seed0/(\S+)", run.stdout)} == study_jobs("paper").keys()


def test_resources_name_notebooks():
    table = yaml.safe_load((ROOT/"configs"/"resources.yaml").read_text())
    for preset, entries in table.items():
        assert entries.keys() <= {"default", *(job.notebook for job in study_jobs(preset).values())}
        assert all(e.keys() == {"threads", "gpu", "mem", "runtime"} for e in entries.values())


# The package and the site

@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    "A copy of the sources, in which nbdev wrote everything it writes."
    folder = tmp_path_factory.mktemp("generated")
    for file in repository():
        if file == ROOT/"settings.ini" or file.suffix == ".ipynb" and file.is_relative_to(NBS):
            copy = folder/file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    write = ("from nbdev.doclinks import nbdev_export; from nbdev.quarto import refresh_quarto_yml; "
             "nbdev_export.__wrapped__(); refresh_quarto_yml()")
    subprocess.run([sys.executable, "-c", write], cwd=folder, check=True)
    return folder


def test_package_is_in_step(generated):
    "The package is what the notebooks export: no edit by hand, no module without a notebook."
    def package(folder): return {str(p.relative_to(folder)): p.read_text() for p in (folder/"reclip_nb").rglob("*.py")}
    exported, committed = package(generated), package(ROOT)
    assert exported.keys() == committed.keys()
    assert [k for k in exported if exported[k] != committed[k]] == [], "run nbdev_export"


def test_nbdev_yml_is_in_step(generated):
    assert (NBS/"nbdev.yml").read_text() == (generated/"nbs"/"nbdev.yml").read_text()


def sidebar(entry) -> list[str]:
    "Files and globs below one entry of the sidebar."
    if isinstance(entry, str): return [entry]
    return [f for e in (entry if isinstance(entry, list) else [entry["contents"]]) for f in sidebar(e)]


def test_sidebar_lists_every_notebook_once():
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    entries = sidebar(site["website"]["sidebar"]["contents"])
    listed = [p for entry in entries for p in sorted(NBS.glob(entry)) or [NBS/entry]]
    assert sorted(listed) == NOTEBOOKS
    assert site["metadata-files"] == ["nbdev.yml"] and (NBS/"nbdev.yml").exists()


def test_quarto_file_is_a_link():
    assert os.readlink(NBS/"_quarto.yml") == "../_quarto.yml" and (NBS/"_quarto.yml").exists()


def test_readme_is_the_index():
    assert (ROOT/"README.md").read_text() == build(), "run `make readme`"


# The repository

def test_no_machine_paths():
    "No file names a folder of somebody's machine."
    pattern = re.compile(br"(?<![\w.~:/-])/(?:work|tmp|root|home|Users)/(?!\*)")
    matches = {name(p): pattern.search(p.read_bytes()) for p in repository()}
    assert not {path: match[0].decode() for path, match in matches.items() if match}


def test_no_package_host():
    "Installing is pip's business: no page or setting names a package host."
    hosts = re.compile(rb"\bpypi\b|pythonhosted|anaconda\.org|download\.pytorch", re.I)
    assert not [name(p) for p in repository() if p != Path(__file__) and hosts.search(p.read_bytes())]
