"""The recorded study: its report, the picture of the front page, and what each experiment notebook shows.

`make record` runs this after the study. A cell tagged `shown` keeps the first table or picture of its run; the first
such cell of a notebook opens with a line that names the run. No other cell of an experiment has an output."""
import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient
from pages import ROOT, SHOWN_RUN, is_experiment
from PIL import Image

from reclip_nb.study import digest, runs_root

NBS = ROOT/"nbs"
RECORD = NBS/"results"/"tiny_quick.json"
GALLERY = NBS/"images"/"gallery.jpg"
STUDY = "tiny/quick"
READERS = ("results", "protocols", "index")   # pages whose outputs come from the recorded JSON
PICTURE = 85_000      # bytes of a picture, at most
NOTEBOOK = 150_000    # bytes of an experiment notebook, at most
ALL = 4_000_000       # bytes of all experiment notebooks, at most
RICH = ("text/html", "text/markdown", "image/png", "image/jpeg")
LINE = re.compile(r"Recorded: study `(?P<study>.+)`, run `(?P<run>.+)`, (?P<date>[\d-]+), revision `(?P<revision>\w+)`"
                  r"(?P<changes> with local changes)?, code `(?P<code>\w+)`\.")


# Notebooks and their cells

def experiments() -> list[Path]:
    "Notebooks that papermill runs."
    return [p for p in sorted(NBS.glob("*.ipynb")) if is_experiment(p.stem)]


def tags(cell) -> set[str]:
    "Tags of a cell."
    return {*cell.metadata.get("tags", [])}


def code_cells(nb) -> list:
    "Code cells of a notebook, without the one that papermill injects."
    return [c for c in nb.cells if c.cell_type == "code" and "injected-parameters" not in tags(c)]


def shown_cells(nb) -> list:
    "Cells whose output is recorded."
    return [c for c in code_cells(nb) if "shown" in tags(c)]


def code_digest(nb) -> str:
    "Names the code behind what a notebook shows: its parameters and its shown cells, without their comments."
    sources = [c.source for c in code_cells(nb) if tags(c) & {"parameters", "shown"}]
    return digest([re.sub(r"\s*# .*", "", line) for source in sources for line in source.splitlines()])


# What a cell shows

def output(kind: str, content: str):
    "A cell's output of one kind."
    return nbformat.v4.new_output("display_data", {kind: content})


def first_rich(cell) -> tuple[str, str] | None:
    "Kind and content of the first table or picture of an executed cell."
    return next(((kind, o.data[kind]) for o in cell.outputs for kind in RICH if kind in o.get("data", {})), None)


def columns(kind: str, content: str) -> list[str]:
    "Names in the head of a table, HTML or markdown; of a picture, none."
    if kind.startswith("image"):
        return []
    if kind == "text/markdown":
        return [name.strip() for name in content.splitlines()[0].strip("|").split("|")]
    head = re.search(r"<thead>(.*?)</thead>", content, re.S)[1]
    names = re.findall(r"<th\b[^>]*>(.*?)</th>", head, re.S)
    texts = (re.sub(r"<[^>]*>|&nbsp;", "", name).strip() for name in names)
    return [name for name in texts if name]


def small(picture: str) -> tuple[str, str]:
    "Kind and base64 of a picture of at most PICTURE bytes: a PNG of 256 colours, else a JPEG, else fewer pixels."
    image, scale = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA"), 1.
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    while True:
        scaled = image.resize([round(scale*side) for side in image.size], Image.Resampling.LANCZOS)
        for kind, version, options in (("png", scaled.quantize(256), {}), ("jpeg", scaled, dict(quality=80))):
            file = io.BytesIO()
            version.save(file, kind, optimize=True, **options)
            if file.tell() <= PICTURE:
                return f"image/{kind}", base64.b64encode(file.getvalue()).decode()
        scale *= .9


# Recording

def line(run: Path, nb) -> str:
    "The sentence that says which run made the outputs of a notebook."
    info = json.loads((run/"run.json").read_text())
    origin = info["provenance"]
    changes = " with local changes" if origin["modified"] else ""
    return (f"Recorded: study `{info['study']}`, run `{run.name}`, {origin['time'][:10]}, "
            f"revision `{origin['revision'][:12] or 'unknown'}`{changes}, code `{code_digest(nb)}`.")


def recorded(notebook: Path, run: Path):
    "The notebook with what a finished run of it shows. Exits when the run is of other code, or shows nothing."
    nb, executed = (nbformat.read(file, nbformat.NO_CONVERT) for file in (notebook, run/"notebook.ipynb"))
    if [c.source for c in code_cells(nb)] != [c.source for c in code_cells(executed)]:
        sys.exit(f"{run} was made by other code than {notebook.name} has now: run `make reproduce`")
    for cell, source in zip(code_cells(nb), code_cells(executed)):
        cell.outputs = []
        if "shown" not in tags(cell):
            continue
        rich = first_rich(source)
        if rich is None:
            sys.exit(f"{run}: the shown cell {cell.id} has neither a table nor a picture")
        cell.outputs = [output(*small(rich[1]))] if rich[0].startswith("image") else [output(*rich)]
    shown_cells(nb)[0].outputs.insert(0, output("text/markdown", line(run, nb)))
    size = len(nbformat.writes(nb).encode())
    if size > NOTEBOOK:
        sys.exit(f"{notebook.name} would have {size:,} bytes, {NOTEBOOK:,} are allowed: show less")
    return nb


def report(seeds: int) -> Path:
    "Run folder of the report over all seeds; over one, the graph has made it."
    if seeds == 1:
        return runs_root()/f"{STUDY}-seed0"/"report"
    folder = runs_root()/STUDY/"report"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(world=STUDY.partition("/")[2], seeds=seeds)
    papermill.execute_notebook(NBS/"report.ipynb", folder/"notebook.ipynb", parameters, progress_bar=False)
    return folder


def execute(page: Path) -> None:
    "Run a page that reads the recorded JSON, in place."
    nb = nbformat.read(page, nbformat.NO_CONVERT)
    resources = dict(metadata=dict(path=page.parent))
    NotebookClient(nb, kernel_name="python3", record_timing=False, resources=resources).execute()
    nbformat.write(nb, page)


def record(seeds: int) -> None:
    "Write everything that is recorded, and nothing before every notebook is known to be complete."
    study, summary = runs_root()/f"{STUDY}-seed0", report(seeds)
    runs = {p: study/SHOWN_RUN.get(p.stem, p.stem) for p in experiments()} | {NBS/"report.ipynb": summary}
    notebooks = {path: recorded(path, run) for path, run in runs.items()}
    for path, nb in notebooks.items():
        nbformat.write(nb, path)
    shutil.copy(summary/"report.json", RECORD)
    gallery = Image.open(study/"saliency_gallery"/"simple_gradient.png").convert("RGB")
    gallery.thumbnail((1000, 1000))
    gallery.save(GALLERY, quality=85, optimize=True)
    for page in READERS:
        execute(NBS/f"{page}.ipynb")
    megabytes = sum(path.stat().st_size for path in notebooks)/1e6
    print(f"recorded {len(notebooks)} notebooks, {megabytes:.1f} MB, the report, and {', '.join(READERS)}")


if __name__ == "__main__":
    record(int(sys.argv[1]))
