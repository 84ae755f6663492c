"""The published data sets on stand-ins in their publishers' layouts, and real out-of-distribution photographs."""
import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from reclip_nb.data import NATIVE, batches, caption_pairs, class_prompts, open_dataset, step_batches
from reclip_nb.data.folders import stratified, vtab_order
from reclip_nb.data.photos import Unreadable, read_rgb
from reclip_nb.data.prompts import EUROSAT, IMAGENETTE
from reclip_nb.evaluations import prompts_of

quiet = pytest.mark.filterwarnings("ignore:left out")
KINDS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def photo(path, size=(60, 40), mode="RGB", colour="teal"):
    "Write a small photograph; its folders are created."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def noise(*shape): return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


# Arrays

@pytest.fixture
def any_sum(monkeypatch):
    "Accept any checksum: torchvision's are those of the real archives."
    accept = lambda path, *_: path is not None
    for module in ("cifar", "stl10"): monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", accept)


def test_cifar10(tmp_path, any_sum):
    folder = tmp_path/"cifar-10-batches-py"
    folder.mkdir()
    pixels = noise(60, 3072)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = pixels[10*k:10*k+10]
        (folder/name).write_bytes(pickle.dumps(dict(data=rows, labels=list(range(10)))))
    (folder/"batches.meta").write_bytes(pickle.dumps(dict(label_names=KINDS)))
    ignored = dict(world="smoke", seed=3, kind="zero_shot")
    train, test = (open_dataset("cifar10", tmp_path, s, **ignored) for s in ("train", "val"))
    assert (len(train), len(test), test.classes) == (50, 10, KINDS)
    assert torch.equal(test[4]["image"], torch.from_numpy(pixels[54].reshape(3, 32, 32))/255)
    assert test[4]["label"] == 4
    assert prompts_of(test, "paper")[3] == ["a photo of a cat."] and len(prompts_of(test)[3]) == 18


def test_cifar10_with_another_check_sum_is_not_unpickled(tmp_path):
    (tmp_path/"cifar-10-batches-py").mkdir()
    (tmp_path/"cifar-10-batches-py"/"test_batch").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(Unreadable, match="incomplete or damaged.*archive again"): open_dataset("cifar10", tmp_path)


def test_stl10(tmp_path, any_sum):
    folder = tmp_path/"stl10_binary"
    folder.mkdir()
    columns = noise(4, 3, 96, 96)  # STL-10 stores columns first
    for part in ("train", "test"):
        columns.tofile(folder/f"{part}_X.bin")
        np.array([1, 3, 10, 8], np.uint8).tofile(folder/f"{part}_y.bin")
    data = open_dataset("stl10", tmp_path)
    assert [data[i]["label"] for i in range(4)] == [0, 2, 9, 7] and data.classes[7] == "monkey"
    assert torch.equal(data[2]["image"], torch.from_numpy(columns[2]).mT/255)
    assert open_dataset("stl10", tmp_path, size=32)[0]["image"].shape == (3, 32, 32) and len(prompts_of(data)[0]) == 2


def test_fgvc_aircraft(tmp_path):
    data = tmp_path/"fgvc-aircraft-2013b"/"data"
    for k in ("0034309", "0034958", "1042824"): photo(data/"images"/f"{k}.jpg")
    (data/"variants.txt").write_text("707-320\nBoeing 717\nDHC-8-100\n")
    (data/"images_variant_test.txt").write_text("0034309 Boeing 717\n0034958 707-320\n")
    (data/"images_variant_trainval.txt").write_text("1042824 DHC-8-100\n")
    train, test = (open_dataset("fgvc_aircraft", tmp_path, s, size=32) for s in ("train", "val"))
    assert [test.classes[test[i]["label"]] for i in range(2)] == ["Boeing 717", "707-320"] and train[0]["label"] == 2
    assert prompts_of(test)[1][1] == "a photo of the Boeing 717, a type of aircraft."
    (data/"images_variant_test.txt").write_text("0034309 Concorde\n")
    with pytest.raises(Unreadable, match="Concorde"): open_dataset("fgvc_aircraft", tmp_path)


# Folders

def test_imagenette_has_three_kinds_of_names(tmp_path):
    for k in (0, 3, 9): photo(tmp_path/"imagenette2-160"/"val"/IMAGENETTE[k]/"a.JPEG", mode="L")
    data = open_dataset("imagenette", tmp_path, size=32)
    assert [data[i]["label"] for i in range(3)] == [0, 3, 9] and data[0]["image"].shape == (3, 32, 32)
    assert prompts_of(data, "paper")[3] == ["a photo of a n03000684."]
    assert prompts_of(data, "synsets")[3] == ["a photo of a ('chain saw', 'chainsaw')."]
    assert prompts_of(data)[3][0] == "a bad photo of a chainsaw." and len(prompts_of(data)[3]) == 80
    real = torchvision.datasets.Imagenette(tmp_path, "val", "160px", loader=str)
    assert list(data.namings["paper"]) == list(IMAGENETTE) and real.wnids == [IMAGENETTE[k] for k in (0, 3, 9)]
    photo(tmp_path/"imagenette2-160"/"val"/"n02123045"/"a.JPEG")
    with pytest.raises(ValueError, match="n02123045.*no classes of imagenette"): open_dataset("imagenette", tmp_path)


def test_eurosat_split_is_the_last_fifth_in_tensorflow_order(tmp_path):
    for c in EUROSAT:
        for k in range(1, 6): photo(tmp_path/"2750"/c/f"{c}_{k}.jpg", (64, 64))
    train, val, both = (open_dataset("eurosat", tmp_path, s) for s in ("train", "val", "all"))
    assert (len(train), len(val), len(both)) == (40, 10, 50) and not set(train.names) & set(val.names)
    keys = ["train"+name.replace("/", "_") for name in both.names]
    hashes = [int(hashlib.md5(key.encode()).hexdigest(), 16) for key in keys]
    assert hashes == sorted(hashes) and train.names+val.names == both.names
    for row in range(len(val)):
        folder = val.names[row].split("/")[0]
        assert val.namings["paper"][val[row]["label"]] == folder and val.classes[val[row]["label"]] == EUROSAT[folder]
    assert val[0]["image"].shape == (3, 64, 64)
    assert "a centered satellite photo of the lake or sea." in prompts_of(val)[9]


def test_eurosat_split_sizes_of_the_real_set():
    counts = dict(zip(EUROSAT, (3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000)))
    names = [f"{c}/{c}_{k}.jpg" for c, n in counts.items() for k in range(1, n+1)]
    order = vtab_order(names)
    test = order[len(names)*80//100:]
    share = np.bincount([list(counts).index(names[k].split("/")[0]) for k in test])/len(test)
    assert len(test) == 5400 and np.abs(share-np.array(list(counts.values()))/27000).max() < .01


def test_caltech256(tmp_path):
    base = tmp_path/"256_ObjectCategories"
    for c in ("001.ak47", "056.dog", "251.airplanes-101", "257.clutter"):
        for k in range(5): photo(base/c/f"{c[:3]}_{k+1:04d}.jpg", mode="L" if k == 2 else "RGB")
    photo(base/"056.dog"/"greg"/"056_0099.jpg")  # a stray folder of the real archive
    (base/"056.dog"/"RENAME2").write_text("")
    train, val, both = (open_dataset("caltech256", tmp_path, s, size=32) for s in ("train", "val", "all"))
    assert (len(train), len(val), len(both)) == (12, 3, 15) and np.bincount(val.labels).tolist() == [1, 1, 1]
    assert sorted(train.names+val.names) == both.names and both.classes == ["ak47", "dog", "airplanes"]
    assert all(both[i]["image"].shape == (3, 32, 32) for i in range(15))
    assert prompts_of(val, "paper")[0] == ["a photo of a 001.ak47."] and len(prompts_of(val)[0]) == 34


def test_stratified_parts():
    labels = np.random.default_rng(0).integers(7, size=500).tolist()
    a, b = stratified(labels)
    assert sorted(a+b) == list(range(500)) and stratified(labels) == (a, b) != stratified(labels, seed=1)
    for k in range(7): assert sum(labels[i] == k for i in a) == round(.8*labels.count(k))


# Shards

def add_members(tar, files):
    "Append members (name -> bytes) to an open tar file."
    for name, content in files.items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def pack(path, **files):
    "Write a tar file with these members (name -> bytes)."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar: add_members(tar, files)


@pytest.fixture
def packed(tmp_path):
    "Twelve photographs in class folders, and the same photographs in two shards."
    for k in range(12):
        path = tmp_path/"folder"/"train"/"ab"[k//6]/f"{k:02}.jpg"
        photo(path, colour=(20*k, 255-20*k, 99))
        Image.open(path).rotate(k).save(path)
    for k, folder in enumerate(sorted((tmp_path/"folder"/"train").iterdir())):
        members = {}
        for f in sorted(folder.iterdir()): members |= {f.name: f.read_bytes(), f"{f.stem}.cls": b"%d" % k}
        pack(tmp_path/"train"/f"{k}.tar", **members)
    (tmp_path/"classes.txt").write_text("a\nb\n")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_return_the_items_of_the_folder(packed, workers):
    folder = open_dataset("imagefolder", packed/"folder", "train", size=32)
    shards = open_dataset("shards", packed, "train", size=32)
    assert shards.classes == folder.classes and not shards.skipped and shards.names[6] == "1.tar/06.jpg"
    expected = list(step_batches(folder, 4, 0, 0, 6))
    for start in (0, 2, 4) if workers else range(6):
        resumed = step_batches(shards, 4, 0, start, 6, workers)
        for (step, a), (shard_step, b) in zip(expected[start:], resumed, strict=True):
            assert step == shard_step
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


def test_the_list_of_shards_is_kept_until_they_change(packed, monkeypatch):
    first = open_dataset("shards", packed, "train", size=32)
    monkeypatch.setattr("reclip_nb.data.tars.read_shard", lambda path: pytest.fail(f"{path} was read again"))
    assert open_dataset("shards", packed, "train", size=32).names == first.names
    monkeypatch.undo()
    (packed/"train"/"shards.json").write_text("[1, 2")
    assert open_dataset("shards", packed, "train", size=32).names == first.names
    first_photo = (packed/"folder"/"train"/"a"/"00.jpg").read_bytes()
    pack(packed/"train"/"1.tar", **{"x.jpg": first_photo, "x.json": b'{"label": 0}'})
    data = open_dataset("shards", packed, "train", size=32)
    assert data.names[6:] == ["1.tar/x.jpg"] and data[6]["label"] == 0
    assert torch.equal(data[6]["image"], data[0]["image"])
    assert len(pickle.loads(pickle.dumps(data))) == 7


@quiet
@pytest.mark.parametrize("damage, row, why", [
    (dict(cut=9000), "1.tar", "truncated"),
    (dict(cut=0), "1.tar", "truncated"),
    (dict(cut=-10240), "1.tar", "truncated"),
    ({"../06.jpg": b"?"}, "1.tar/../06.jpg", "leads out"),
    ({"/06.jpg": b"?"}, "1.tar//06.jpg", "leads out"),
    ({"x.jpg": b"?"}, "1.tar/x.jpg", "no label"),
    ({"06.cls": b"dog"}, "1.tar/06.cls", "ValueError"),
    ({"06.json": b"["*10**5}, "1.tar/06.json", "RecursionError"),
    ({"06.json": b'{"label": true}'}, "1.tar/06.json", "no class index")])
def test_damaged_shards_are_counted(packed, damage, row, why):
    path = packed/"train"/"1.tar"
    good = open_dataset("shards", packed, "train", size=32)
    if "cut" in damage: path.write_bytes(path.read_bytes()[:damage["cut"]])
    else:
        with tarfile.open(path, "a") as tar: add_members(tar, damage)
    data = open_dataset("shards", packed, "train", size=32)
    assert why in data.skipped[row] and data.names == good.names[:len(data)] and 6 <= len(data)
    assert all(torch.equal(data[i]["image"], good[i]["image"]) for i in (0, 5))
    with pytest.raises(Unreadable, match="repair"): open_dataset("shards", packed, "train", on_error="raise")


@quiet
def test_a_broken_photograph_in_a_shard_is_a_row_left_out(packed):
    data = open_dataset("shards", packed, "train", size=32)
    with open(packed/"train"/"0.tar", "r+b") as f:
        f.seek(data.offset[2])
        f.write(bytes(data.size[2]))
    assert data[2]["index"] == 3 and list(data.skipped) == ["0.tar/02.jpg"]
    (packed/"train"/"1.tar").unlink()
    assert data[7]["index"] == 0 and "FileNotFound" in data.skipped["1.tar/07.jpg"]


def test_labels_of_shards(packed):
    (packed/"classes.txt").write_text("a\n")
    with pytest.raises(ValueError, match="up to 1, class names to 0.*one per line"):
        open_dataset("shards", packed, "train")
    net = open_dataset("imagenet", packed, "train", size=32)
    assert net[7]["label"] == 1 and net.classes[1] == "goldfish" and len(prompts_of(net)[0]) == 80
    content = (packed/"folder"/"train"/"a"/"00.jpg").read_bytes()
    for k in range(2): pack(packed/"val"/f"{k}.tar", **{"a.png": content, "a.txt": b"no class"})
    unlabelled = open_dataset("shards", packed, "val", size=32)
    assert unlabelled.names == ["0.tar/a.png", "1.tar/a.png"]
    assert "label" not in unlabelled[1] and not unlabelled.skipped
    with pytest.raises(FileNotFoundError, match="no .cls or .json in the shards"):
        open_dataset("imagenet", packed, "val")


# Captions

@pytest.fixture
def flickr(tmp_path):
    "Token file with five photographs, one of them without a file; JSON with four."
    for k in (1, 2, 3, 5): photo(tmp_path/"flickr30k-images"/f"{k}.jpg")
    lines = [f"{k}.jpg#{n}\tWörter {k} {n} ." for k in (3, 1, 2, 4, 5) for n in range(5 if k < 5 else 3)]
    (tmp_path/"results_20130124.token").write_text("\n".join(lines)+"\n", encoding="utf-8")
    rows = [dict(filename=f"{k}.jpg", split=s, sentences=[dict(raw=f" text {k} {n}") for n in range(5)])
            for k, s in ((1, "train"), (2, "test"), (3, "val"), (4, "test"))]
    (tmp_path/"dataset_flickr30k.json").write_text(json.dumps(dict(images=rows, dataset="flickr30k")))
    return tmp_path


@quiet
def test_flickr30k_splits_and_captions(flickr):
    splits = ("all", "karpathy", "train", "val", "test")
    sizes = {s: len(open_dataset("flickr30k", flickr, s, size=20)) for s in splits}
    assert sizes == dict(all=5, karpathy=4, train=1, val=1, test=2)
    data = open_dataset("flickr30k", flickr, "all", size=20)
    assert data[0]["captions"] == [f"Wörter 1 {n} ." for n in range(5)] and data[0]["caption"] == "Wörter 1 0 ."
    rows = torch.cat([b["index"] for b in batches(data, 2)])
    assert rows.tolist() == [0, 1, 2, 4] and "FileNotFound" in data.skipped["4.jpg"]
    texts, places = caption_pairs(data, rows)
    assert places.tolist() == [0]*5+[1]*5+[2]*5+[3]*3 and texts[-1] == "Wörter 5 2 ."
    assert not [t for t in texts if " 4 " in t[:9]]
    assert caption_pairs(data)[1].tolist() == np.repeat(range(5), [5, 5, 5, 5, 3]).tolist()


def test_captions_without_an_image_and_malformed_captions(flickr):
    data = open_dataset("flickr30k", flickr, "val", size=20)
    with pytest.raises(ValueError, match="point to no image: rows .7. of 1"): caption_pairs(data, [0, 7])
    with pytest.raises(ValueError, match="no captions"): caption_pairs(torch.utils.data.TensorDataset(torch.zeros(2)))
    (flickr/"results_20130124.token").write_text("1.jpg#0\tfine\n2.jpg a caption without a tab\n")
    with pytest.raises(ValueError, match="line 2.*expected"): open_dataset("flickr30k", flickr, "all")
    (flickr/"dataset_flickr30k.json").write_text('{"images": [{"file": 1}]}')
    with pytest.raises(ValueError, match="not Karpathy's"): open_dataset("flickr30k", flickr, "test")


def test_captions_of_the_embedded_world():
    data = open_dataset("shapes", world="smoke", kind="zero_shot")
    texts, places = caption_pairs(data, [5, 3])
    assert texts == [data.captions[5], data.captions[3]] and places.tolist() == [0, 1]


# Out of distribution

def lesion_folder(folder):
    "ISIC's official test folders: three images, two masks."
    images, masks = (folder/f"ISIC-2017_Test_v2_{k}" for k in ("Data", "Part1_GroundTruth"))
    masks.mkdir(parents=True)
    for name in ("a", "b", "c", "a_superpixels", "b_superpixels", "c_superpixels"):
        photo(images/f"ISIC_{name}.{'png' if 'super' in name else 'jpg'}")
    mask = Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), ((10, 10), (20, 20))))
    for k in "ab": mask.save(masks/f"ISIC_{k}_segmentation.png")
    table = folder/"ISIC-2017_Test_v2_Part3_GroundTruth.csv"
    table.write_text("image_id,melanoma,seborrheic_keratosis\nISIC_a,1.0,0.0\nISIC_b,0.0,1.0\nISIC_c,0.0,0.0\n")
    return table


def test_isic(tmp_path):
    table = lesion_folder(tmp_path)
    data = open_dataset("isic", tmp_path, size=40)
    assert [data[i]["mask"].sum().item() for i in range(2)] == [400, 400] and data[0]["mask"][10:30, 10:30].all()
    assert [data.classes[data[i]["label"]] for i in range(2)] == ["melanoma", "benign skin lesion"]
    assert data[0]["caption"] == "a dermoscopy image of a melanoma." and data.skipped == {"ISIC_c.jpg": "no mask"}
    table.write_text("name,diagnosis\nISIC_a,melanoma\n")
    with pytest.raises(ValueError, match="expected are image_id and melanoma"): open_dataset("isic", tmp_path)
    table.unlink()
    unlabelled = open_dataset("isic", tmp_path)
    assert "label" not in unlabelled[0] and unlabelled[0]["caption"] == "a dermoscopy image of a skin lesion."
    for file in (tmp_path/"ISIC-2017_Test_v2_Part1_GroundTruth").iterdir(): file.unlink()
    with pytest.raises(FileNotFoundError, match="masks named like"): open_dataset("isic", tmp_path)


def test_kvasir_masks_are_jpeg(tmp_path):
    photo(tmp_path/"Kvasir-SEG"/"images"/"x.jpg", (60, 40))
    (tmp_path/"Kvasir-SEG"/"masks").mkdir()
    mask = np.pad(np.full((20, 20, 3), 255, np.uint8), ((10, 10), (20, 20), (0, 0)))
    Image.fromarray(mask).save(tmp_path/"Kvasir-SEG"/"masks"/"x.jpg", quality=60)
    data = open_dataset("kvasir", tmp_path, "all", size=40)
    assert abs(data[0]["mask"].sum().item()-400) <= 10 and prompts_of(data) == [["a colonoscopy image of a polyp."]]
    with pytest.raises(ValueError, match="choose one of .'all'"): open_dataset("kvasir", tmp_path)


def test_chest_films(tmp_path):
    for k in ("images_001/images/1.png", "images_002/images/2.png"): photo(tmp_path/k, mode="L")
    table = "Image Index,Finding Labels\n1.png,Cardiomegaly|Effusion\n2.png,No Finding\n"
    (tmp_path/"Data_Entry_2017_v2020.csv").write_text(table)
    data = open_dataset("chest_xray", tmp_path, "all", size=32)
    assert data[0]["caption"] == "a chest X-ray showing cardiomegaly and effusion."
    assert data[1]["caption"] == "a normal chest X-ray."
    assert data[0]["image"].shape == (3, 32, 32) and "label" not in data[0]


def test_films_of_16_bits_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(Unreadable, match="more than 8 bits"): read_rgb(buffer)


def test_wildlife(tmp_path):
    for name in ("red_fox/1.jpg", "tapir/2.png"): photo(tmp_path/name)
    data = open_dataset("wildlife", tmp_path, "all", size=32)
    assert data[0]["caption"] == "a photo of a red fox." and prompts_of(data) == class_prompts(["red fox", "tapir"])


# All of them

def test_small_pictures_stay_small():
    assert NATIVE == dict(cifar10=32, cifar10_small=32, eurosat=64, stl10=96)


def test_loaders_go_to_spawned_workers(flickr):
    lesion_folder(flickr)
    for data in (open_dataset("flickr30k", flickr, "val"), open_dataset("isic", flickr, size=40)):
        assert len(pickle.loads(pickle.dumps(data))) == len(data)


@pytest.mark.sample
def test_real_out_of_distribution_photographs(sample_data):
    folder = sample_data/"ood_medical"
    skin = open_dataset("isic", folder/"isic2017", "all", mode="squash", size=64)
    polyps = open_dataset("kvasir", folder/"kvasir", "all", size=64)
    film = open_dataset("chest_xray", folder/"chest_xray", "all", size=64)
    animals = open_dataset("wildlife", sample_data/"coco_ccby_small"/"images", "all", size=32)
    assert (len(skin), len(polyps), len(film), len(animals)) == (100, 3, 1, 104)
    assert np.bincount(skin.labels).tolist() == [50, 50]
    assert "mask" not in skin[0] and skin[0]["caption"].startswith("a dermoscopy image of a ")
    for item in map(polyps.__getitem__, range(3)): assert .01 < item["mask"].float().mean() < .9
    assert film[0]["image"].std() > .1 and film[0]["caption"] == "a chest X-ray."
