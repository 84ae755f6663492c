"""Data sets on stand-ins (broken files, colour modes, crowds, empty masks, empty folders) and on real photographs."""
import hashlib
import io
import json
import pickle
import traceback

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from reclip_nb.data import (
    DATASETS,
    IMAGENET_TEMPLATES,
    ORIGINS,
    SPLITS,
    WNIDS,
    Geometry,
    batches,
    class_prompts,
    data_root,
    imagenet_names,
    open_dataset,
    step_batches,
)
from reclip_nb.data.photos import Unreadable
from reclip_nb.worlds import ShapesDataset, World

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools under NumPy 2
quiet = pytest.mark.filterwarnings("ignore:left out")


def jpeg(width=60, height=40, mode="RGB", seed=0):
    "Bytes of a noisy JPEG."
    noise = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    "Two classes; row 2 is truncated, row 3 is not an image."
    for split in ("train", "val"):
        (cats, dogs) = (tmp_path/split/name for name in ("cat", "dog"))
        cats.mkdir(parents=True)
        dogs.mkdir()
        (cats/"0.jpg").write_bytes(jpeg())
        (cats/"1.jpg").write_bytes(jpeg(mode="L"))
        (cats/"2.jpg").write_bytes(jpeg()[:-900])
        (cats/"3.jpg").write_bytes(b"<html>404</html>")
        Image.new("RGBA", (50, 50), (255, 0, 0, 128)).save(dogs/"4.png")
        Image.new("P", (50, 70)).save(dogs/"5.png")
        (dogs/"6.jpg").write_bytes(jpeg(mode="CMYK"))
        (dogs/"notes.txt").write_text("not a photograph")
    return tmp_path


@quiet
def test_every_colour_mode_and_every_broken_file(folder):
    data = open_dataset("imagefolder", folder, size=32)
    items = [data[i] for i in range(len(data))]
    assert data.classes == ["cat", "dog"] and len(data) == 7
    images = torch.stack([x["image"] for x in items])
    assert images.shape == (7, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert [x["index"] for x in items] == [0, 1, 4, 4, 4, 5, 6]
    assert list(data.skipped) == ["cat/2.jpg", "cat/3.jpg"] and "truncated" in data.skipped["cat/2.jpg"]
    with pytest.raises(IndexError): data[7]
    strict = open_dataset("imagefolder", folder, on_error="raise")
    with pytest.raises(Unreadable, match="3.jpg.*skip"): strict[3]


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_do_not_shift_the_order(folder, workers):
    data = open_dataset("imagefolder", folder, split="train", size=16)

    def steps(start, workers):
        batches = step_batches(data, 3, 0, start, 6, workers)
        return [(step, b["id"], b["image"].sum((1, 2, 3)).tolist()) for step, b in batches]
    uninterrupted = steps(0, 0)
    assert [s for s, *_ in uninterrupted] == list(range(6))
    assert len({i for _, ids, _ in uninterrupted for i in ids}) == 5
    for start in range(1, 6) if workers == 0 else (1, 4):  # an epoch has two steps
        assert uninterrupted[start:] == steps(start, workers)
    assert set(data.skipped) == {"cat/2.jpg", "cat/3.jpg"}, "known in the main process"


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_nothing_twice(folder, workers):
    data = open_dataset("imagefolder", folder, size=16)
    ids = [i for b in batches(data, 2, workers=workers) for i in b["id"]]
    assert ids == ["cat/0.jpg", "cat/1.jpg", "dog/4.png", "dog/5.png", "dog/6.jpg"]
    assert len(data.skipped) == 2
    assert [b["index"].tolist() for b in batches(data, 2, rows=[6, 2, 0])] == [[6], [0]]


class Odd(torch.utils.data.Dataset):
    "Row 2 raises an unexpected error; the other rows contain the number of threads of the process that read them."
    names = ["a.jpg", "b.jpg", "c.jpg"]
    def __len__(self): return 3
    def __getitem__(self, i): return dict(id=self.names[i], threads=torch.get_num_threads(), zero=1//(2-i))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unforeseen_error_names_the_photograph(workers):
    with pytest.raises(ZeroDivisionError) as e: list(batches(Odd(), 1, workers=workers))
    assert "row 2 c.jpg" in "".join(traceback.format_exception(e.value))


def test_loader_processes_have_one_thread_and_leave_cuda_alone():
    before = torch.cuda.is_initialized()
    batch = next(batches(Odd(), 2, rows=[0, 1], workers=1))
    assert batch["threads"].tolist() == [1, 1] and torch.cuda.is_initialized() == before


@pytest.mark.gpu
def test_batches_are_pinned_where_cuda_is_used():
    torch.zeros(1, device="cuda")
    assert [next(batches(Odd(), 2, rows=[0, 1], workers=w))["threads"].is_pinned() for w in (1, 0)] == [True, False]


def test_a_folder_without_any_readable_file_is_an_error(tmp_path):
    (tmp_path/"val"/"cat").mkdir(parents=True)
    for i in range(3): (tmp_path/"val"/"cat"/f"{i}.jpg").write_bytes(b"")
    data = open_dataset("imagefolder", tmp_path)
    with pytest.warns(UserWarning), pytest.raises(Unreadable, match="complete"): data[0]


def square(x, y, side): return [[x, y, x+side, y, x+side, y+side, x, y+side]]


@pytest.fixture
def coco_folder(tmp_path):
    "Official layout: 1 polygons and crowd, 2 RLE, 3 only a crowd, 4 no annotation, 5 outside the crop, 6 no file."
    for name in ("annotations", "val2017"): (tmp_path/name).mkdir()
    images = [dict(id=i, file_name=f"{i}.jpg", width=80, height=40) for i in range(1, 7)]
    for i in range(1, 6): (tmp_path/"val2017"/f"{i}.jpg").write_bytes(jpeg(80, 40))
    mask = np.zeros((40, 80), np.uint8)
    mask[10:20, 30:50] = 1
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat))+1
    counts = np.diff([0, *edges, flat.size]).tolist()
    crowd = dict(size=[40, 80], counts=[0, 3200])
    rows = [(1, square(25, 5, 10), 0), (1, square(30, 10, 10), 0), (1, crowd, 1), (3, crowd, 1),
            (2, dict(size=[40, 80], counts=counts), 0), (5, square(0, 5, 8), 0), (6, square(30, 5, 10), 0)]
    annotations = [dict(id=k, image_id=i, category_id=1, segmentation=s, iscrowd=c, area=1, bbox=[0, 0, 1, 1])
                   for k, (i, s, c) in enumerate(rows, 1)]
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="cat")])
    (tmp_path/"annotations"/"instances_val2017.json").write_text(json.dumps(content))
    texts = [dict(id=k, image_id=i, caption=f"text {k}") for k, i in enumerate((1, 1, 2, 4), 1)]
    captions = json.dumps(dict(images=images, annotations=texts))
    (tmp_path/"annotations"/"captions_val2017.json").write_text(captions)
    return tmp_path


@quiet
def test_coco_masks_are_unions_without_crowds(coco_folder):
    data = open_dataset("coco", coco_folder, size=40)
    assert list(data.names) == ["1.jpg", "2.jpg", "5.jpg", "6.jpg"] and data.classes == ["cat"]
    assert data[0]["mask"].sum() == 100+100-25 and data[1]["mask"].sum() == 200  # crop: columns 20 to 60
    assert data[1]["mask"][10:20, 10:30].all()
    ids = [i for b in batches(data, 4) for i in b["id"]]
    assert ids == ["1.jpg", "2.jpg"] and sorted(data.skipped) == ["3.jpg", "4.jpg", "5.jpg", "6.jpg"]
    assert "no mask inside" in data.skipped["5.jpg"] and "FileNotFound" in data.skipped["6.jpg"]
    assert open_dataset("coco", coco_folder, size=40, mode="squash")[2]["index"] == 2  # all in view


def test_coco_captions(coco_folder):
    data = open_dataset("coco", coco_folder, size=40, masks=False, captions=True)
    assert [data[i]["captions"] for i in range(3)] == [["text 1", "text 2"], ["text 3"], ["text 4"]]
    batch = next(batches(data, 3))
    assert batch["caption"] == ["text 1", "text 3", "text 4"] and "mask" not in batch
    with pytest.raises(ValueError, match="at least one"): open_dataset("coco", coco_folder, masks=False)


def test_coco_names_stay_in_their_folder(coco_folder):
    file = coco_folder/"annotations"/"instances_val2017.json"
    file.write_text(file.read_text().replace("1.jpg", "../../secret.jpg"))
    with pytest.raises(ValueError, match="leads out"): open_dataset("coco", coco_folder)[0]


@quiet
def test_a_mask_of_another_size_is_not_stretched(coco_folder):
    (coco_folder/"val2017"/"1.jpg").write_bytes(jpeg(60, 40))
    data = open_dataset("coco", coco_folder, size=40)
    assert data[0]["index"] == 1 and "photograph is (40, 60)" in data.skipped["1.jpg"]


@pytest.fixture
def imagenet_s_folder(tmp_path):
    "50 class folders, three masks; photographs of two of them in an ImageNet folder."
    masks = tmp_path/"s"/"ImageNetS50"/"validation-segmentation"
    for wnid in WNIDS[:50]: (masks/wnid).mkdir(parents=True)
    for k, name in ((0, "a"), (49, "b"), (49, "test_only")):
        rgb = np.zeros((40, 40, 3), np.uint8)
        rgb[10:20] = (k+1, 0, 0)  # its own class
        rgb[20:25] = (232, 3, 0)  # ignore
        rgb[30:] = (k+2, 0, 0)  # another class
        Image.fromarray(rgb).save(masks/WNIDS[k]/f"{name}.png")
    for k, name in ((0, "a"), (49, "b")):
        photos = tmp_path/"imagenet"/"ILSVRC2012_img_val"/WNIDS[k]
        photos.mkdir(parents=True)
        (photos/f"{name}.JPEG").write_bytes(jpeg(40, 40))
    return tmp_path


def test_imagenet_s_ids_ignore_and_intersection(imagenet_s_folder):
    photos = imagenet_s_folder/"imagenet"
    data = open_dataset("imagenet_s", imagenet_s_folder/"s", size=40, subset=50, imagenet_root=photos)
    assert [data[i]["label"] for i in range(len(data))] == [0, 49] and data.classes[0] == "tench"
    for i in range(2):
        assert data[i]["mask"][10:20].all() and data[i]["mask"].sum() == 400
        assert data[i]["ignore"][20:25].all() and data[i]["ignore"].sum() == 200
    assert data.skipped == {f"{WNIDS[49]}/test_only.png": "no photograph"}
    with pytest.raises(FileNotFoundError, match="no validation in .*ImageNetS50"):
        open_dataset("imagenet_s", imagenet_s_folder/"s", subset=50)


def test_imagenet_s_refuses_missing_classes(imagenet_s_folder):
    (imagenet_s_folder/"s"/"ImageNetS50"/"validation-segmentation"/WNIDS[7]).rmdir()
    with pytest.raises(ValueError, match="49 class folders, not 50"):
        open_dataset("imagenet_s", imagenet_s_folder/"s", subset=50)


def test_imagenet_labels_do_not_depend_on_what_is_there(imagenet_s_folder):
    data = open_dataset("imagenet", imagenet_s_folder/"imagenet", size=32)
    assert [data[i]["label"] for i in range(2)] == [0, 49] and len(data.classes) == 1000
    (imagenet_s_folder/"imagenet"/"ILSVRC2012_img_val"/"cats").mkdir()
    with pytest.raises(ValueError, match="cats"): open_dataset("imagenet", imagenet_s_folder/"imagenet")


def test_imagenet_names_are_unique():
    names = imagenet_names(WNIDS)
    assert len(set(names)) == len(names) == 1000
    changed = {k: new for k, (old, new) in enumerate(zip(open_clip.IMAGENET_CLASSNAMES, names)) if old != new}
    assert changed == {744: "projectile, missile", 837: "sunglasses, dark glasses"}
    assert len(class_prompts(names, IMAGENET_TEMPLATES)) == 1000  # it refuses duplicates


@pytest.mark.parametrize("name", DATASETS)
def test_missing_data_say_how_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as e: open_dataset(name, split=SPLITS.get(name, ["val"])[-1])
    text = str(e.value)
    assert all(part in text for part in (str(tmp_path/name), *ORIGINS[name], "RECLIP_DATA"))


def test_empty_class_folders_are_missing_data(tmp_path):
    (tmp_path/"val"/"cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="photographs"): open_dataset("imagefolder", tmp_path)


def test_roots(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_DATA", "$SCRATCH/sets")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert data_root("coco") == tmp_path/"sets"/"coco" and data_root("coco", "$SCRATCH/x") == tmp_path/"x"
    monkeypatch.delenv("RECLIP_DATA")
    assert data_root("coco").parts[-2:] == ("data", "coco")


def test_unknown_names_and_options(folder):
    good = dict(name="imagefolder", root=folder)
    for bad in (dict(name="mnist"), dict(split="test"), dict(mode="pad"), dict(on_error="ignore")):
        with pytest.raises(ValueError, match="choose"): open_dataset(**good | bad)
    with pytest.raises(TypeError): open_dataset("imagefolder", folder, captions=True)


def test_one_call_for_embedded_and_real_sets(folder):
    embedded = dict(world=World(size=32, per_class=1), seed=3, kind="zero_shot", size=32)
    shapes, real = open_dataset("shapes", **embedded), open_dataset("imagefolder", folder, **embedded)
    assert shapes[0]["image"].shape == real[0]["image"].shape == (3, 32, 32)
    other = open_dataset("shapes", **embedded | dict(seed=4))
    assert not torch.equal(shapes.images, other.images) and len(shapes) == 24
    with pytest.raises(ValueError, match="32 pixels wide, not 48: choose"):
        open_dataset("shapes", **embedded | dict(size=48))


SCENES = {  # hash of everything that is exact; sums of the images by channel and quarter
    ("scenes", "train"): ("63bb31a296d08ed7", [5370311, 5288664, 5491149, 5296986, 5258622, 5290822,
                                               5089328, 5134411, 5067943, 5183851, 5033601, 5164864]),
    ("zero_shot", "val"): ("e2ea5828835504c6", [5437491, 5397510, 5362451, 5356117, 5184012, 5215668,
                                                5141537, 5291310, 5227192, 5103101, 5094375, 5145806])}


@pytest.mark.parametrize("kind, split", SCENES)
def test_scenes_are_those_of_every_earlier_version(kind, split):
    "Models and results of older runs were made with exactly these scenes."
    data = ShapesDataset(World(train=72, per_class=3), split, 5, kind)

    def exact_of(s): return s.colour, s.pattern, s.outline, *(f"{v:.6f}" for v in (*s.centre, s.radius))
    exact = [[exact_of(s) for s in shapes] for shapes in data.shapes]
    text = json.dumps([exact, data.captions, data.content.tolist()]).encode()
    sums = data.images.long().unflatten(3, (2, 24)).unflatten(2, (2, 24)).sum((0, 3, 5)).flatten()
    digest, expected = SCENES[kind, split]
    assert hashlib.sha256(text+data.instances.numpy().tobytes()).hexdigest()[:16] == digest
    assert (sums-torch.tensor(expected)).abs().max() <= 20  # the last bit of a matrix product may change a pixel by one


def test_data_sets_can_go_to_spawned_workers(coco_folder, folder):
    for data in (open_dataset("coco", coco_folder), open_dataset("imagefolder", folder)):
        assert len(pickle.loads(pickle.dumps(data))) == len(data)


def test_steps_over_shapes_resume():
    data = open_dataset("shapes", world=World(size=32, train=300), split="train")
    rows = lambda start: [b["index"].tolist() for _, b in step_batches(data, 64, 3, start, 10)]
    uninterrupted = rows(0)
    assert uninterrupted[7:] == rows(7)
    assert len(set(sum(uninterrupted[:4], []))) == 4*64  # 300 scenes: an epoch has 4 batches without repetition


@pytest.mark.sample
def test_all_coco_photographs(sample_data):
    for mode in ("crop", "squash"):
        data = open_dataset("coco", sample_data/"coco_ccby_small", split="all", mode=mode)
        share = torch.cat([b["mask"].float().mean((1, 2)) for b in batches(data, 26)])
        assert len(data) == len(share) == 104 and not data.skipped
    assert .01 < share.min() and share.max() < .95  # of the whole photographs
    splits = [len(open_dataset("coco", sample_data/"coco_ccby_small", split=s)) for s in ("train", "val")]
    assert splits == [58, 46]


@pytest.mark.sample
def test_coco_crowds_and_captions(sample_data):
    data = open_dataset("coco", sample_data/"coco_ccby_small", split="all", captions=True)
    assert len(data) == 34 and all(len(data.captions[i]) == 5 for i in range(34))
    assert len(data.skipped) == 70 and set(data.skipped.values()) == {"without instances or captions"}
    all_rows = open_dataset("coco", sample_data/"coco_ccby_small", split="all")
    assert sum(len(all_rows.instances(i)) for i in range(104)) == 974-13
    assert {"person", "dog", "chair"} <= set(all_rows.classes) and len(all_rows.classes) == 80


@pytest.mark.sample
def test_cifar(sample_data):
    root = sample_data/"cifar10_small"
    train, val = (open_dataset("cifar10_small", root, split=s) for s in ("train", "val"))
    assert (len(train), len(val)) == (6000, 1500) and np.bincount(val.labels).tolist() == [150]*10
    item = val[3]
    assert item["caption"] == f"a photo of a {val.classes[item['label']]}"
    raw = torch.from_numpy(np.asarray(val.picture(3)).copy()).permute(2, 0, 1)/255
    assert torch.equal(raw, item["image"]) and Geometry(224).image(val.picture(3)).shape == (3, 224, 224)
