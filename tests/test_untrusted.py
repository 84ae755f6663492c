"Data are never executed, and file names in data never lead out of their folder."
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
SOURCES = [*sorted((ROOT/"reclip_nb").rglob("*.py")), *sorted((ROOT/"nbs").rglob("*.ipynb")),
           *sorted((ROOT/"tools").glob("*.py")), ROOT/"setup.py"]


# No source executes the data that it reads

NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
         "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads", "pd.read_pickle", "yaml.load",
         "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pd.eval", "torch.hub.load", "runpy.run_path",
         "shelve.open"}
ONLY_IN = {"torch.jit.load": ("weights.py", "weights.ipynb")}  # OpenAI publishes its weights as TorchScript archives


def code(path: Path) -> str:
    "Python code of a file, without magics."
    if path.suffix == ".py": return path.read_text()
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    text = "\n".join("".join(c["source"]) for c in cells)
    return "\n".join("pass" if re.match(r"[%!]", line) else line for line in text.split("\n"))


def may_execute(call: ast.Call) -> bool:
    "Whether a call executes its arguments, or could do so."
    name = ast.unparse(call.func)
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in NEVER or name in ONLY_IN: return True
    if keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False": return True
    if name == "torch.load": return keywords.get("weights_only") != "True"
    return name.endswith((".eval", ".query")) and not all(isinstance(a, ast.Constant) for a in call.args)


def executing_calls(source: str) -> list[str]:
    "Names of the calls that execute their arguments, or could do so."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return [ast.unparse(call.func) for call in calls if may_execute(call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path):
    assert [call for call in executing_calls(code(path)) if path.name not in ONLY_IN.get(call, ())] == []


def test_notebooks_have_no_shell_magics():
    shell = re.compile(r"^\s*(!|%%?(sh|bash|script|system|sx)\b)", re.M)
    for path in SOURCES:
        if path.suffix != ".ipynb": continue
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert not [c for c in cells if shell.search("".join(c["source"]))], path.name


@pytest.mark.parametrize("bad", [
    "eval(x)", "yaml.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
    "subprocess.run(x, shell=True)", "pickle.load(f)", "frame.query(text)", "os.system(x)", "exec(x)"])
def test_the_search_finds_executing_calls(bad): assert executing_calls(bad)


@pytest.mark.parametrize("good", [
    "model.eval()", "frame.query('n > 3')", "yaml.safe_load(f)", "torch.load(f, weights_only=True)", "np.load(f)",
    "robust_eval(f, x)"])
def test_the_search_accepts_harmless_calls(good): assert not executing_calls(good)


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


@pytest.mark.parametrize("text", [
    '"); import os; os.system("touch pwned"); ("', "a\nimport os\nos.system('touch pwned')", "{__import__('os')}",
    "'''\"\"\"\\"])
def test_parameters_are_data(text):
    "Papermill writes parameters into a cell as constants."
    from papermill.translators import translate_parameters
    cell = ast.parse(translate_parameters("python3", "python", dict(name=text, names=[text]), "Parameters"))
    assert all(isinstance(n, ast.Assign) for n in cell.body)
    assert [ast.literal_eval(n.value) for n in cell.body] == [text, [text]]


def test_the_shell_command_of_the_graph_is_quoted():
    "Every value that Snakemake inserts into a command is quoted, or a path below nbs/."
    command = (ROOT/"Snakefile").read_text().split("shell:")[1]
    assert set(re.findall(r"{([^}]*)}", command)) == {
        "params.python:q", "input.notebook", "params.executed:q", "params.settings:q", "params.study:q",
        "params.own:q", "log:q"}


def test_arrays_are_data(tmp_path):
    "An archive of pickled objects instead of a data set."
    pickled = np.array([{}], object)
    np.savez(tmp_path/"cifar10_small.npz", jpeg=pickled, offsets=[0, 1], labels=[0], classes=["a"], is_test=[True])
    with pytest.raises(Unreadable, match="cifar10_small.npz is damaged or contains more.*allow_pickle=False"):
        open_dataset("cifar10_small", tmp_path)


# File names in data stay in their folder

def photo(path: Path) -> Path:
    "Write a small photograph; its folders are created."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), "teal").save(path)
    return path


def coco(d, name):
    photo(d/"images"/"a.jpg")
    image = dict(id=1, file_name=f"{name}.jpg", width=40, height=40)
    annotation = dict(id=1, image_id=1, category_id=1, iscrowd=0, area=4, bbox=[0, 0, 2, 2],
                      segmentation=[[0, 0, 0, 9, 9, 9]])
    content = dict(images=[image], annotations=[annotation], categories=[dict(id=1, name="cat")])
    (d/"instances.json").write_text(json.dumps(content))
    return lambda: open_dataset("coco", d, "all")[0]


def flickr_tokens(d, name):
    photo(d/"flickr30k-images"/"a.jpg")
    (d/"results_20130124.token").write_text(f"{name}.jpg#0\ta text\n")
    return lambda: open_dataset("flickr30k", d, "all")[0]


def flickr_karpathy(d, name):
    photo(d/"flickr30k-images"/"a.jpg")
    image = dict(filename=f"{name}.jpg", split="val", sentences=[dict(raw="a")])
    (d/"dataset_flickr30k.json").write_text(json.dumps(dict(images=[image])))
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
    with open(folder/"index.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return lambda: BrodenFolder(folder)[0]


def broden_category(d, name):
    folder = make_broden(d/"broden", "smoke", images=2)
    with open(folder/"category.csv", "a") as f: f.write(f"x/../../{name},1,2,1,1\n")
    return lambda: BrodenFolder(folder)


def bird(d, name):
    photo(d/"test"/"0"/"000000.png")
    contents = dict(classes=[dict(class_idx=name, parts={})], parts={},
                    dataset_test=[dict(class_idx=name, bg_objects="")])
    for file, content in contents.items(): (d/f"{file}.json").write_text(json.dumps(content))
    return lambda: FunnyBirds(d)[0]


def photos(d, name): return lambda: Photos(d/"photos", [f"{name}.jpg"], None)[0]


LOADERS = dict(coco=coco, flickr_tokens=flickr_tokens, flickr_karpathy=flickr_karpathy, aircraft=aircraft,
               points=points, broden_image=lambda d, n: broden(d, n, "image"),
               broden_mask=lambda d, n: broden(d, n, "object"), broden_category=broden_category, funnybirds=bird,
               photos=photos)
WAYS = [(loader, way) for loader in LOADERS for way in ("up", "absolute", "in and out")
        if (loader, way) != ("broden_category", "absolute")]  # becomes a name below the folder


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("loader, way", WAYS)
def test_no_loader_leaves_its_folder(tmp_path, loader, way):
    "The file outside the folder exists and is readable, but is not read."
    secret, folder = photo(tmp_path/"secret.jpg"), tmp_path/"data"/"set"
    folder.mkdir(parents=True)
    name = {"up": "../../../secret", "absolute": str(secret.with_suffix("")), "in and out": "a/../../../../secret"}[way]
    words = "class_idx.*secret" if loader == "funnybirds" else r"secret.* leads out of .*data.*set"
    with pytest.raises(ValueError, match=words): LOADERS[loader](folder, name)()


@pytest.mark.parametrize("name", [5, None, "", ["a.jpg"]])
def test_a_name_is_a_text(name):
    with pytest.raises(ValueError, match="no file name"): path_inside(Path("data"), name)


def test_links_to_other_disks_are_followed(tmp_path):
    "Links in the folder are followed; a name cannot go up from the target of a link."
    for name in ("below/a.jpg", "b.jpg"): photo(tmp_path/"disk"/name)
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"linked").symlink_to(tmp_path/"disk"/"below")
    assert path_inside(tmp_path/"set", "linked/a.jpg").exists()
    assert not path_inside(tmp_path/"set", "linked/../b.jpg").exists(), "set/b.jpg, not disk/b.jpg"
    with pytest.raises(ValueError, match="leads out"): path_inside(tmp_path/"set", "linked/../../b.jpg")


@pytest.mark.parametrize("name, table", [("isic", "labels.csv"), ("chest_xray", "Data_Entry_2017.csv")])
def test_tables_of_labels_open_no_file(tmp_path, name, table):
    "Names in a table are only compared with the names of the files in the folder."
    secret, folder = photo(tmp_path/"secret.png"), tmp_path/"set"
    photo(folder/"a.png")
    head = "file,melanoma" if name == "isic" else "Image Index,Finding Labels"
    (folder/table).write_text(f"{head}\na.png,1\n../secret.png,1\n{secret},1\n")
    data = open_dataset(name, folder, "all", size=32)
    assert data.names == ["a.png"] and data[0]["id"] == "a.png"
