"""How the package is built: floors, imports, documented arguments, short functions."""
import ast
import itertools
import re
import statistics
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/"reclip_nb"
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
           for p in sorted(PACKAGE.rglob("*.py"))
           if p.name != "_modidx.py" and p != PACKAGE/"__init__.py" and p.read_text().strip()}   # empty: a folder's __init__
each_module = pytest.mark.parametrize("module", MODULES)


def floors() -> dict[str, int]:
    "Floor of each module: the number of the notebook that exports it."
    found = {}
    for path in (ROOT/"nbs"/"api").glob("*.ipynb"):
        first = nbformat.read(path, nbformat.NO_CONVERT).cells[0].source
        module = re.match(r"#\| *default_exp +([\w.]+)", first)[1]
        found[module.removesuffix(".__init__")] = int(path.name.split("_")[0])
    return found


def imports(module: str) -> set[str]:
    "Dotted names a module imports, its own package's as `reclip_nb.x`."
    parents = ["reclip_nb", *module.split(".")]
    if MODULES[module].name != "__init__.py": parents = parents[:-1]
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*parents[:len(parents)+1-node.level], *filter(None, [node.module])]) if node.level else node.module
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return found


def siblings(module: str) -> set[str]:
    "Modules of the package that a module imports."
    return {n.removeprefix("reclip_nb.") for n in imports(module)} & MODULES.keys() - {module}


def functions(module: str) -> list[ast.FunctionDef]:
    "Every function and method of a module."
    return [n for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, ast.FunctionDef)]


def public(module: str) -> list[ast.FunctionDef | ast.ClassDef]:
    "What a reader imports: the functions and classes at the top of a module."
    body = ast.parse(MODULES[module].read_text()).body
    return [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]


def called(node: ast.FunctionDef | ast.ClassDef) -> list[ast.FunctionDef]:
    "The function, or the class's constructor."
    return [node] if isinstance(node, ast.FunctionDef) else [m for m in node.body if getattr(m, "name", "") == "__init__"]


def test_every_module_has_a_floor():
    assert floors().keys() == MODULES.keys()


@each_module
def test_imports_only_lower_floors(module):
    level, package = floors(), module.split(".")[0]
    above = [m for m in siblings(module) if level[m] >= level[module] and m.split(".")[0] != package]
    assert not above, f"{module} is on floor {level[module]}; it may not import {above}"


def test_no_circles():
    TopologicalSorter({m: siblings(m) for m in MODULES}).prepare()   # raises CycleError


@each_module
def test_package_needs_no_notebook_tools(module):
    tools = {"nbdev", "fastcore", "execnb", "IPython"}
    assert not {n.split(".")[0] for n in imports(module)} & tools


@each_module
def test_arguments_are_documented(module):
    "nbdev reads the comment behind each argument: one argument a line, each with its meaning, shape or unit."
    lines, missing = MODULES[module].read_text().split("\n"), []
    for f in itertools.chain.from_iterable(map(called, public(module))):
        a = f.args
        args = [x for x in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if x and x.arg != "self"]
        ends = [x.end_lineno for x in args]
        missing += [f"{f.name}({x.arg})" for x in args if ends.count(x.end_lineno) > 1 or "#" not in lines[x.end_lineno-1]]
    assert not missing


@each_module
def test_public_names_have_docstrings(module):
    assert not [n.name for n in public(module) if not ast.get_docstring(n)]


def test_functions_are_short():
    "Nine of ten functions have a body of at most 25 lines (signature and docstring, which document, do not count)."
    bodies = itertools.chain.from_iterable(map(functions, MODULES))
    lengths = [f.end_lineno-f.body[bool(ast.get_docstring(f))*(len(f.body) > 1)].lineno+1 for f in bodies]
    assert statistics.quantiles(lengths, n=10)[-1] <= 25
