"""Outputs for the site's experiment pages, from the copies that the graph executed.

`make docs` runs this between nbdev and Quarto. Without a study the pages keep the outputs that are committed, those of
the recorded study (tools/record.py)."""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# of the several runs of a training, the one its page shows
SHOWN_RUN = {"train_clip": "clip", "train_aft": "aft4", "train_dual": "dual16", "train_epg": "epg0.6",
             "train_classifier": "classifier"}
WIDGET = "application/vnd.jupyter.widget-view+json"   # alive only in a notebook


def text(cell: dict) -> str:
    "Source of a cell, however it is stored."
    return "".join(cell["source"]).strip()


def shown(cell: dict) -> list[dict]:
    "Outputs that a page can show: no widgets, no warnings."
    return [o for o in cell["outputs"] if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"]


def source_of_outputs(study: Path, run: Path | None, recorded: bool) -> str:
    "Says where the outputs of a page come from: a run of the study at hand, the recorded study, or nowhere."
    if run is not None:
        time = json.loads((run/"run.json").read_text())["provenance"]["time"]
        return f"Outputs: study `{'/'.join(study.parts[-2:])}`, run `{run.name}`, {time[:10]}."
    if recorded:
        return ("Table and figure are those of the recorded study, as the line above them says. "
                "For every output of this page: `make reproduce`, then `make docs`.")
    return "The outputs of this page are not built: run `make reproduce`, then `make docs`."


def callout(words: str) -> dict:
    "A note on the page. Its source is a list of lines: Quarto's reader drops the newlines of a single string."
    source = ["::: {.callout-note}\n", f"{words}\n", ":::"]
    return dict(cell_type="markdown", id="outputs-from", metadata={}, source=source)


def executed_cells(file: Path) -> list[dict]:
    "Cells of an executed notebook. Exits with what to do when a kill, which papermill may survive, cut the file."
    try:
        return json.loads(file.read_text())["cells"]
    except (ValueError, KeyError) as e:
        sys.exit(f"{file} is damaged ({type(e).__name__}): delete its folder and run `make reproduce`")


def fill(page: Path, study: Path) -> bool:
    """Put the outputs of the finished run that belongs to a processed page into it. False where there is none: the page
    then keeps what is recorded. A page never mixes the two; a cell that the run does not have is empty."""
    run = study/SHOWN_RUN.get(page.stem, page.stem)
    done = (run/"notebook.ipynb").exists() and (run/"metrics.json").exists()
    nb = json.loads(page.read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    if done:
        executed = (c for c in executed_cells(run/"notebook.ipynb") if c["cell_type"] == "code")
        outputs = {text(c): shown(c) for c in executed}
        for cell in code:
            cell["outputs"] = outputs.get(text(cell), [])
    words = source_of_outputs(study, run if done else None, any(c["outputs"] for c in code))
    first = next(i for i, c in enumerate(nb["cells"]) if c["cell_type"] == "markdown")
    nb["cells"].insert(first+1, callout(words))
    page.write_text(json.dumps(nb))
    return done


def is_experiment(page: str) -> bool:
    "Whether a notebook of nbs/ has a parameters cell, which papermill fills."
    cells = json.loads((ROOT/"nbs"/f"{page}.ipynb").read_text())["cells"]
    return any("parameters" in c["metadata"].get("tags", []) for c in cells)


def fill_all(folder: Path, study: Path) -> dict[str, bool]:
    "Fill the page of every experiment. Returns for each whether the study has its run."
    pages = [p for p in sorted(folder.glob("*.ipynb")) if is_experiment(p.stem)]
    return {p.stem: fill(p, study) for p in pages}


if __name__ == "__main__":
    runs = Path(os.environ.get("RECLIP_RUNS", ROOT/"runs"))
    filled = fill_all(ROOT/"_proc", runs/(sys.argv[1] if len(sys.argv) > 1 else "tiny/quick-seed0"))
    without = ", ".join(page for page, done in filled.items() if not done)
    print(f"{sum(filled.values())} of {len(filled)} experiment pages show this study; without: {without or '–'}")
