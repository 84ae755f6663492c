"Data are never code, and names found in data never lead out of their folder."
import ast
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from reclip_nb.benchmarks.pointwise import PointPhotos
from reclip_nb.data import FunnyBirds, Photos, open_dataset
from reclip_nb.data.photos import Unreadable, path_inside
from reclip_nb.dissect import BrodenFolder, make_broden
from reclip_nb.study import graph

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT/"reclip_nb").rglob("*.py")), *sorted((ROOT/"nbs").rglob("*.ipynb")), *sorted((ROOT/"tools").glob("*.py")), ROOT/"setup.py"]


# Nothing runs what it reads

NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load",
         "joblib.load", "marshal.loads", "pd.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pd.eval",
         "torch.hub.load", "runpy.run_path", "shelve.open"}
ONCE = {"torch.jit.load": ("weights.py", "weights.ipynb")}   # OpenAI's releases of the weights are TorchScript archives


def code(path: Path) -> str:
    "Python of a file, magics left out."
    if path.suffix == ".py": return path.read_text()
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    text = "\n".join("".join(c["source"]) for c in cells)
    return "\n".join("pass" if re.match(r"[%!]", line) else line for line in text.split("\n"))


def runs_data(source: str) -> list[str]:
    "Calls that run or could run what they are given."
    found = []
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if (name in NEVER or name in ONCE or given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False"
                or name == "torch.load" and given.get("weights_only") != "True"
                or name.endswith((".eval", ".query")) and not all(isinstance(a, ast.Constant) for a in call.args)): found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert [call for call in runs_data(code(path)) if path.name not in ONCE.get(call, ())] == []


def test_notebooks_have_no_shell_magics():
    for path in SOURCES:
        if path.suffix == ".ipynb":
            cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
            assert not [c for c in cells if re.search(r"^\s*(!|%%?(sh|bash|script|system|sx)\b)", "".join(c["source"]), re.M)], path.name


@pytest.mark.parametrize("bad", ["eval(x)", "yaml.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
                                 "subprocess.run(x, shell=True)", "pickle.load(f)", "frame.query(text)", "os.system(x)", "exec(x)"])
def test_the_search_finds_it(bad): assert runs_data(bad)


@pytest.mark.parametrize("good", ["model.eval()", "frame.query('n > 3')", "yaml.safe_load(f)", "torch.load(f, weights_only=True)", "np.load(f)", "robust_eval(f, x)"])
def test_the_search_finds_no_more(good): assert not runs_data(good)


EVIL = '!!python/object/apply:os.system ["touch pwned"]'


def test_settings_are_data(tmp_path, monkeypatch):
    "The graph and the settings of a job, as Snakefile, notebooks and papermill read them."
    from papermill.iorw import read_yaml_file
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECLIP_ROOT", str(tmp_path))
    (tmp_path/"configs").mkdir()
    for name in ("configs/graph.yaml", "settings.yaml"): (tmp_path/name).write_text(f"clip: {EVIL}\n")
    for read in (lambda: graph.study_jobs("tiny"), lambda: read_yaml_file(str(tmp_path/"settings.yaml"))):
        with pytest.raises(yaml.constructor.ConstructorError, match="os.system"): read()
    assert not (tmp_path/"pwned").exists()


@pytest.mark.parametrize("text", ['"); import os; os.system("touch pwned"); ("', "a\nimport os\nos.system('touch pwned')", "{__import__('os')}", "'''\"\"\"\\"])
def test_parameters_are_data(text):
    "Papermill writes them into a cell as constants."
    from papermill.translators import translate_parameters
    cell = ast.parse(translate_parameters("python3", "python", dict(name=text, names=[text]), "Parameters"))
    assert all(isinstance(n, ast.Assign) for n in cell.body)
    assert [ast.literal_eval(n.value) for n in cell.body] == [text, [text]]


def test_the_shell_of_the_graph_gets_quoted_words():
    "Every value that Snakemake puts into a command is quoted, or a path below nbs/."
    command = (ROOT/"Snakefile").read_text().split("shell:")[1]
    assert set(re.findall(r"{([^}]*)}", command)) == {"params.python:q", "input.notebook", "params.executed:q", "params.settings:q",
                                                      "params.study:q", "params.own:q", "log:q"}


def test_arrays_are_data(tmp_path):
    "An archive of pickled objects in the place of a data set."
    np.savez(tmp_path/"cifar10_small.npz", jpeg=np.array([{}], object), offsets=[0, 1], labels=[0], classes=["a"], is_test=[True])
    with pytest.raises(Unreadable, match="cifar10_small.npz is damaged or contains more.*allow_pickle=False"): open_dataset("cifar10_small", tmp_path)


# Names in data stay in their folder

def photo(path: Path) -> Path:
    "A small photograph at a path whose folders are made."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), "teal").save(path)
    return path


def coco(d, name):
    photo(d/"images"/"a.jpg")
    note = dict(id=1, image_id=1, category_id=1, iscrowd=0, area=4, bbox=[0, 0, 2, 2], segmentation=[[0, 0, 0, 9, 9, 9]])
    (d/"instances.json").write_text(json.dumps(dict(images=[dict(id=1, file_name=f"{name}.jpg", width=40, height=40)], annotations=[note],
                                                    categories=[dict(id=1, name="cat")])))
    return lambda: open_dataset("coco", d, "all")[0]


def flickr_tokens(d, name):
    photo(d/"flickr30k-images"/"a.jpg")
    (d/"results_20130124.token").write_text(f"{name}.jpg#0\ta text\n")
    return lambda: open_dataset("flickr30k", d, "all")[0]


def flickr_karpathy(d, name):
    photo(d/"flickr30k-images"/"a.jpg")
    (d/"dataset_flickr30k.json").write_text(json.dumps(dict(images=[dict(filename=f"{name}.jpg", split="val", sentences=[dict(raw="a")])])))
    return lambda: open_dataset("flickr30k", d, "val")[0]


def aircraft(d, name):
    data = d/"fgvc-aircraft-2013b"/"data"
    photo(data/"images"/"a.jpg")
    (data/"variants.txt").write_text("707-320\n")
    deep = name if name.startswith("/") else "../../../"+name
    for part in ("test", "trainval"): (data/f"images_variant_{part}.txt").write_text(f"{deep} 707-320\n")
    return lambda: open_dataset("fgvc_aircraft", d)[0]


def points(d, name):
    photo(d/"validation"/"a.jpg")
    (d/"oidv7-val-annotations-point-labels.csv").write_text(
        f"ImageId,X,Y,Label,EstimatedYesNo,TextLabel\n{name},0.5,0.5,/m/1,yes,cat\n")
    return lambda: PointPhotos(d, 32)[0]


def broden(d, name, column):
    folder = make_broden(d/"broden", "smoke", images=2)
    with open(folder/"index.csv", newline="") as f: rows = list(csv.DictReader(f))
    for row in rows: row[column] = f"{name}.jpg"
    with open(folder/"index.csv", "w", newline="") as f: (w := csv.DictWriter(f, rows[0])).writeheader(), w.writerows(rows)
    return lambda: BrodenFolder(folder)[0]


def broden_category(d, name):
    folder = make_broden(d/"broden", "smoke", images=2)
    with open(folder/"category.csv", "a") as f: f.write(f"x/../../{name},1,2,1,1\n")
    return lambda: BrodenFolder(folder)


def bird(d, name):
    photo(d/"test"/"0"/"000000.png")
    for file, content in (("classes", [dict(class_idx=name, parts={})]), ("parts", {}), ("dataset_test", [dict(class_idx=name, bg_objects="")])):
        (d/f"{file}.json").write_text(json.dumps(content))
    return lambda: FunnyBirds(d)[0]


def photos(d, name): return lambda: Photos(d/"photos", [f"{name}.jpg"], None)[0]


LOADERS = dict(coco=coco, flickr_tokens=flickr_tokens, flickr_karpathy=flickr_karpathy, aircraft=aircraft, points=points,
               broden_image=lambda d, n: broden(d, n, "image"), broden_mask=lambda d, n: broden(d, n, "object"),
               broden_category=broden_category, funnybirds=bird, photos=photos)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("loader, way", [(k, w) for k in LOADERS for w in ("up", "absolute", "in and out")
                                         if (k, w) != ("broden_category", "absolute")])   # becomes a name below the folder
def test_no_loader_leaves_its_folder(tmp_path, loader, way):
    "The file is there and could be read."
    secret, folder = photo(tmp_path/"secret.jpg"), tmp_path/"data"/"set"
    folder.mkdir(parents=True)
    name = {"up": "../../../secret", "absolute": str(secret.with_suffix("")), "in and out": "a/../../../../secret"}[way]
    words = "class_idx.*secret" if loader == "funnybirds" else r"secret.* leads out of .*data.*set"
    with pytest.raises(ValueError, match=words): LOADERS[loader](folder, name)()


@pytest.mark.parametrize("name", [5, None, "", ["a.jpg"]])
def test_a_name_is_a_text(name):
    with pytest.raises(ValueError, match="no file name"): path_inside(Path("data"), name)


def test_links_lead_where_the_owner_put_them(tmp_path):
    "Data on other disks are linked; a name cannot go up from behind a link."
    photo(tmp_path/"disk"/"below"/"a.jpg"), photo(tmp_path/"disk"/"b.jpg")
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"linked").symlink_to(tmp_path/"disk"/"below")
    assert path_inside(tmp_path/"set", "linked/a.jpg").exists()
    assert not path_inside(tmp_path/"set", "linked/../b.jpg").exists(), "set/b.jpg, not disk/b.jpg"
    with pytest.raises(ValueError, match="leads out"): path_inside(tmp_path/"set", "linked/../../b.jpg")


@pytest.mark.parametrize("name, table", [("isic", "labels.csv"), ("chest_xray", "Data_Entry_2017.csv")])
def test_tables_of_labels_open_no_file(tmp_path, name, table):
    "Their names are looked up among the files found."
    secret, folder = photo(tmp_path/"secret.png"), tmp_path/"set"
    photo(folder/"a.png")
    head = "file,melanoma" if name == "isic" else "Image Index,Finding Labels"
    (folder/table).write_text(f"{head}\na.png,1\n../secret.png,1\n{secret},1\n")
    data = open_dataset(name, folder, "all", size=32)
    assert data.names == ["a.png"] and data[0]["id"] == "a.png"
