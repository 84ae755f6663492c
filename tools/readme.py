"""README.md from nbs/index.ipynb: `make readme` writes it, a test compares. (nbdev_readme would need Quarto.)"""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def outputs(cell) -> list[str]:
    "Markdown or fenced text of a code cell's outputs."
    data = [o.get("data", {"text/plain": o.get("text", "")}) for o in cell.outputs]
    return [d.get("text/markdown") or f"```\n{d['text/plain'].rstrip()}\n```" for d in data]


def build() -> str:
    "The index page as GitHub markdown; links that are relative to nbs/ become relative to the root."
    parts = ["<!-- written by `make readme` from nbs/index.ipynb -->"]
    for cell in nbformat.read(ROOT/"nbs"/"index.ipynb", 4).cells:
        if cell.cell_type == "code" and re.match(r"#\| *hide", cell.source): continue
        if cell.cell_type == "code" and re.match(r"#\| *echo: *false", cell.source): parts += outputs(cell)
        elif cell.cell_type == "code": parts += [f"```python\n{cell.source}\n```", *outputs(cell)]
        else: parts.append(re.sub(r"\]\((?!\w+:|#)", "](nbs/", cell.source))
    return "\n\n".join(parts)+"\n"


if __name__ == "__main__":
    (ROOT/"README.md").write_text(build(), encoding="utf-8")
