"""Outputs for the site's experiment pages, from the copies that the graph executed: `make docs` runs this between nbdev and Quarto.
Without a study the pages keep the outputs that are committed, those of the recorded study (tools/record.py)."""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN_RUN = {"train_clip": "clip", "train_aft": "aft4", "train_dual": "dual16", "train_epg": "epg0.6", "train_classifier": "classifier"}   # of several
WIDGET = "application/vnd.jupyter.widget-view+json"   # alive only in a notebook


def text(cell: dict) -> str:
    "Source of a cell, however it is stored."
    return "".join(cell["source"]).strip()


def shown(cell: dict) -> list[dict]:
    "Outputs that a page can show: no widgets, no warnings."
    return [o for o in cell["outputs"] if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"]


def note(study: str, run: Path | None, recorded: bool) -> dict:
    "The cell that says where the outputs come from: a run of the study at hand, the recorded study, or nowhere."
    words = "The outputs of this page are not built: run `make reproduce`, then `make docs`."
    if recorded: words = ("This page shows a table and a figure of the recorded study, as the line above the first of them says. For every "
                          "output: `make reproduce`, then `make docs`.")
    if run: words = f"Outputs: study `{study}`, run `{run.name}`, {json.loads((run/'run.json').read_text())['provenance']['time'][:10]}."
    source = ["::: {.callout-note}\n", f"{words}\n", ":::"]   # Quarto reads lines: a single string would lose its newlines
    return dict(cell_type="markdown", id="outputs-from", metadata={}, source=source)


def executed_cells(file: Path) -> list[dict]:
    "Cells of an executed notebook. Exits with what to do when a kill cut it, which papermill may leave beside a finished result."
    try: return json.loads(file.read_text())["cells"]
    except (ValueError, KeyError) as e: sys.exit(f"{file} is damaged ({type(e).__name__}): delete its folder and run `make reproduce`")


def fill(page: Path, study: Path) -> bool:
    """Put the outputs of the finished run that belongs to a processed page into it; False where there is none, and the page keeps what
    is recorded. Outputs of the two never stand on one page: a cell that the run does not have is empty."""
    run = study/SHOWN_RUN.get(page.stem, page.stem)
    done = (run/"notebook.ipynb").exists() and (run/"metrics.json").exists()
    nb = json.loads(page.read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    if done:
        outputs = {text(c): shown(c) for c in executed_cells(run/"notebook.ipynb") if c["cell_type"] == "code"}
        for cell in code: cell["outputs"] = outputs.get(text(cell), [])
    first = next(i for i, c in enumerate(nb["cells"]) if c["cell_type"] == "markdown")
    nb["cells"].insert(first+1, note("/".join(study.parts[-2:]), run if done else None, any(c["outputs"] for c in code)))
    page.write_text(json.dumps(nb))
    return done


def is_experiment(page: str) -> bool:
    "Whether a notebook of nbs/ has a parameters cell, which papermill fills."
    cells = json.loads((ROOT/"nbs"/f"{page}.ipynb").read_text())["cells"]
    return any("parameters" in c["metadata"].get("tags", []) for c in cells)


def fill_all(folder: Path, study: Path) -> dict[str, bool]:
    "Every page of an experiment: whether it has outputs."
    pages = [p for p in sorted(folder.glob("*.ipynb")) if is_experiment(p.stem)]
    return {p.stem: fill(p, study) for p in pages}


if __name__ == "__main__":
    runs = Path(os.environ.get("RECLIP_RUNS", ROOT/"runs"))
    filled = fill_all(ROOT/"_proc", runs/(sys.argv[1] if len(sys.argv) > 1 else "tiny/quick-seed0"))
    without = ", ".join(p for p, ok in filled.items() if not ok)
    print(f"{sum(filled.values())} of {len(filled)} experiment pages have the outputs of this study; without: {without or '–'}")
