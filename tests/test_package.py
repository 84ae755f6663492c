"""How the package is built: rooms, imports, one meaning per name, documented arguments, short functions."""
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
           if p.name != "_modidx.py" and p != PACKAGE/"__init__.py"}
each_module = pytest.mark.parametrize("module", MODULES)


ROOMS = ("paper", "study", "worlds", "data", "models", "attacks", "explain", "objectives", "evaluations", "training",
         "benchmarks", "dissect", "show", "report", "cli")  # a room imports only from rooms before it


def notebooks() -> dict[str, Path]:
    "The notebook of each module, by what its first cell exports."
    first = {p: nbformat.read(p, nbformat.NO_CONVERT).cells[0].source for p in (ROOT/"nbs"/"api").rglob("*.ipynb")}
    return {re.match(r"#\| *default_exp +([\w.]+)", text)[1].removesuffix(".__init__"): p for p, text in first.items()}


def imports(module: str) -> set[str]:
    "Dotted names a module imports, its own package's as `reclip_nb.x`."
    parents = ["reclip_nb", *module.split(".")]
    if MODULES[module].name != "__init__.py": parents = parents[:-1]
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        base = node.module
        if node.level: base = ".".join([*parents[:len(parents)+1-node.level], *filter(None, [node.module])])
        names |= {base} | {f"{base}.{a.name}" for a in node.names}
    return names


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
    if isinstance(node, ast.FunctionDef): return [node]
    return [m for m in node.body if getattr(m, "name", "") == "__init__"]


def test_notebooks_mirror_the_package():
    "nbs/api/models/clip.ipynb exports reclip_nb.models.clip; a room's index.ipynb exports its __init__."
    assert notebooks().keys() == MODULES.keys()
    for module, path in notebooks().items():
        parts = path.relative_to(ROOT/"nbs"/"api").with_suffix("").parts
        assert ".".join(parts).removesuffix(".index") == module


def test_rooms_are_the_plan():
    assert {m.split(".")[0] for m in MODULES} == set(ROOMS)


@each_module
def test_imports_only_from_rooms_above(module):
    room = module.split(".")[0]
    below = [m for m in siblings(module) if ROOMS.index(m.split(".")[0]) > ROOMS.index(room)]
    assert not below, f"{module} is in the room {room}; it may not import {below}"


@each_module
def test_rooms_import_modules_not_front_pages(module):
    "Only users import from a room's __init__: inside the package that would make circles."
    fronts = {m for m in MODULES if MODULES[m].name == "__init__.py"}
    assert MODULES[module].name == "__init__.py" or not siblings(module) & fronts


def test_no_circles():
    TopologicalSorter({m: siblings(m) for m in MODULES}).prepare()   # raises CycleError


@each_module
def test_package_needs_no_notebook_tools(module):
    tools = {"nbdev", "fastcore", "execnb", "IPython"}
    assert not {n.split(".")[0] for n in imports(module)} & tools


@each_module
def test_arguments_are_documented(module):
    "nbdev reads the comment behind each argument: one argument a line, each with its meaning, shape or unit."
    lines = MODULES[module].read_text().split("\n")
    missing = []
    for f in itertools.chain.from_iterable(map(called, public(module))):
        a = f.args
        args = [x for x in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if x and x.arg != "self"]
        ends = [x.end_lineno for x in args]
        missing += [f"{f.name}({x.arg})" for x in args
                    if ends.count(x.end_lineno) > 1 or "#" not in lines[x.end_lineno-1]]
    assert not missing


@each_module
def test_public_names_have_docstrings(module):
    assert not [n.name for n in public(module) if not ast.get_docstring(n)]


def test_public_names_have_one_meaning():
    "No two modules define the same public function, class or constant."
    places = {}
    for module in MODULES:
        for node in ast.parse(MODULES[module].read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): defined = [node.name]
            elif isinstance(node, ast.Assign): defined = [t.id for t in node.targets if isinstance(t, ast.Name)]
            else: continue
            for name in defined: places.setdefault(name, set()).add(module)
    assert not {n: m for n, m in places.items() if len(m) > 1 and not n.startswith("_")}


def test_modules_are_short():
    "At most 300 lines of code, comments and documentation; the paper's tables are data."
    assert not {m: n for m, p in MODULES.items() if m != "paper" and (n := len(p.read_text().splitlines())) > 300}


def test_functions_are_short():
    "Nine of ten functions have a body of at most 18 lines (signature and docstring, which document, do not count)."
    bodies = itertools.chain.from_iterable(map(functions, MODULES))
    lengths = [f.end_lineno-f.body[bool(ast.get_docstring(f))*(len(f.body) > 1)].lineno+1 for f in bodies]
    assert statistics.quantiles(lengths, n=10)[-1] <= 18
