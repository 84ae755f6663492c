"""The pages of the site, as nbdev processes them for Quarto: every page builds, and every link has a target."""
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from pages import fill, fill_all, text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "Folder of processed notebooks, built from a copy. As in the real build, only exported cells and imports run."
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".*"))
    for file in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT/file, folder)
    # os._exit: the shells that nbdev opens take long to close
    process = "import os; from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True); os._exit(0)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", process], cwd=folder, env=env, check=True)
    return folder/"_proc"


def pages(site: Path) -> dict[str, str]:
    "Markdown of every page, by its path in the site."
    return {str(p.relative_to(site)): markdown(p) for p in site.rglob("*.ipynb")}


def markdown(path: Path) -> str:
    "Prose and markdown outputs of a processed notebook."
    parts = []
    for cell in json.loads(path.read_text())["cells"]:   # nbformat would complain about the keys nbdev adds
        if cell["cell_type"] != "code": parts.append(cell["source"])
        else: parts += [o.get("data", {}).get("text/markdown", "") for o in cell["outputs"]]
    return "\n\n".join("".join(p) for p in parts)


def front_matter(text: str) -> dict:
    "The YAML block nbdev puts on top of a page."
    return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}


def anchors(text: str) -> set[str]:
    "Identifiers of a page's headings, made as pandoc makes them, and the ones given by hand."
    heads = re.findall(r"^#+ +(.+?)(?: *\{.*\})?$", text, re.M)
    slugs = (re.sub(r"[^\w\s.-]", "", h.lower()).strip().replace(" ", "-") for h in heads)
    return {re.sub(r"^[^a-z]+", "", s) for s in slugs} | set(re.findall(r"\{#([\w.:-]+)", text))


def links(text: str) -> list[str]:
    "Targets of markdown and HTML links and images."
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
    return re.findall(r"\]\(<?([^)\s>]+)", prose) + re.findall(r"(?:href|src)=\"([^\"]+)\"", prose)


def test_every_notebook_becomes_a_page(site):
    made = set(pages(site))
    assert made == {str(p.relative_to(ROOT/"nbs")) for p in (ROOT/"nbs").rglob("*.ipynb")}


def prose(path: Path) -> list[str]:
    "Lines of a notebook's markdown, without the links that nbdev puts around back-ticked names."
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return [line.strip() for line in re.sub(r"\[(`[^`]+`)\]\(https?:[^)]*\)", r"\1", text).split("\n") if line.strip()]


def test_no_prose_is_lost(site):
    "Title and description of a notebook are in the head of its page, every other line in its body."
    lost = {}
    for page, page_text in pages(site).items():
        head = front_matter(page_text)
        kept = {f"# {head.get('title')}", f"> {head.get('description')}", *prose(site/page)}
        if missing := [line for line in prose(ROOT/"nbs"/page) if line not in kept]:
            lost[page] = missing
    assert not lost


def test_pages_hold_no_traceback(site):
    "What nbdev runs while it makes a page, the tables of arguments above all."
    failed = [p for p in site.rglob("*.ipynb") if "Traceback (most recent call last)" in p.read_text()]
    assert not [str(p.relative_to(site)) for p in failed]


def test_pages_have_addresses_of_their_own(site):
    found = [(str(Path(p).parent), front_matter(t).get("output-file", p)) for p, t in pages(site).items()]
    assert len(set(found)) == len(found)


def addresses(texts: dict[str, str]) -> dict[str, str]:
    "Markdown of every page by its source and by its address in the rendered site."
    rendered = {}
    for path, prose in texts.items():
        name = front_matter(prose).get("output-file", f"{Path(path).stem}.html")
        rendered[str(Path(path).with_name(name))] = prose
    return texts | rendered


def test_relative_links_lead_somewhere(site):
    texts, broken = pages(site), []
    known = addresses(texts)
    for page, prose in texts.items():
        for link in links(prose):
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", link): continue
            file = os.path.normpath(Path(page).parent/target) if target else page
            if file not in known and not (site/file).exists() or anchor and anchor not in anchors(known.get(file, "")):
                broken.append(f"{page}: {link}")
    assert not broken


def test_links_to_the_own_site_lead_somewhere(site):
    "nbdev turns back-ticked names into absolute links to the library's pages."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    home, texts = config["DEFAULT"]["doc_host"]+config["DEFAULT"]["doc_baseurl"]+"/", pages(site)
    to_site = [link for prose in texts.values() for link in links(prose) if link.startswith(home)]
    assert {link.removeprefix(home).partition("#")[0] for link in to_site} <= addresses(texts).keys()


def test_experiment_pages_show_what_a_study_left(site, tmp_path):
    "Outputs go to the cells they belong to; a page without a run says how to make one; widgets and warnings stay away."
    folder, study = tmp_path/"pages", tmp_path/"tiny"/"quick-seed0"
    shutil.copytree(site, folder)
    for page, run in (("localisation", "localisation"), ("train_aft", "aft4")):
        nb = json.loads((ROOT/"nbs"/f"{page}.ipynb").read_text())
        outputs = [dict(output_type="stream", name="stdout", text="seen"),
                   dict(output_type="stream", name="stderr", text="warning"),
                   dict(output_type="display_data", metadata={}, data={"application/vnd.jupyter.widget-view+json": {}})]
        for cell in nb["cells"]: cell |= dict(outputs=outputs) if cell["cell_type"] == "code" else {}
        injected = dict(cell_type="code", source="study = 'x'", outputs=[], execution_count=1,
                        metadata={"tags": ["injected-parameters"]})
        nb["cells"].insert(3, injected)
        (study/run).mkdir(parents=True)
        (study/run/"notebook.ipynb").write_text(json.dumps(nb))
        (study/run/"run.json").write_text(json.dumps(dict(provenance=dict(time="2026-01-02T03:04:05"))))
        (study/run/"metrics.json").write_text("{}")
    found = fill_all(folder, study)
    assert {page for page, ok in found.items() if ok} == {"localisation", "train_aft"}
    for page, ok in found.items():
        cells = json.loads((folder/f"{page}.ipynb").read_text())["cells"]
        code = [c for c in cells if c["cell_type"] == "code"]
        lines = ["".join(c["source"]).splitlines(keepends=True) for c in cells]
        assert [c["source"] for c in cells] == lines, "Quarto's reader drops the newlines of a single string"
        note = text(next(c for c in cells if c.get("id") == "outputs-from"))
        assert re.fullmatch(r"::: {.callout-note}\n.+\n:::", note)
        if ok:
            assert "2026-01-02" in note and all([o["text"] for o in c["outputs"]] == ["seen"] for c in code)
        else:
            assert "make reproduce" in note and ("recorded study" in note) == any(c["outputs"] for c in code)


def test_a_page_never_mixes_two_studies(tmp_path):
    "A page with a run shows that run alone; a page without keeps what is committed, and its note says which."
    cell = dict(cell_type="code", id="a", metadata={}, execution_count=None, source=["frame"])
    seen = [dict(output_type="stream", name="stdout", text="recorded")]
    page, study = tmp_path/"retrieval.ipynb", tmp_path/"tiny"/"quick-seed0"
    opening = dict(cell_type="markdown", source=["# Opening"])
    page.write_text(json.dumps(dict(cells=[opening, cell | dict(outputs=seen)])))
    kept = page.read_text()
    assert not fill(page, study)
    note, code = json.loads(page.read_text())["cells"][1:]
    assert "recorded study" in text(note) and code["outputs"] == seen
    run = study/"retrieval"
    run.mkdir(parents=True)
    (run/"notebook.ipynb").write_text(json.dumps(dict(cells=[cell | dict(source=["frame.round(2)"], outputs=seen)])))
    (run/"run.json").write_text(json.dumps(dict(provenance=dict(time="2026-01-02T03:04:05"))))
    (run/"metrics.json").write_text("{}")
    page.write_text(kept)
    assert fill(page, study)
    note, code = json.loads(page.read_text())["cells"][1:]
    assert "recorded" not in text(note) and not code["outputs"]
