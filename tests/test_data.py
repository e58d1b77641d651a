"""Readers, decoding and sampling, with inputs that nobody would write into a notebook."""
import io
import math
import os
import re
import struct
import tempfile
import warnings
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from PIL import Image

from domainmix import datasets, layouts, readers, records
from domainmix.batches import (
    AugmentConfig, PKSampler, TrainSet, augment, flip_and_shift, augmentation_numbers, erase_boxes, train_set, union,
)
from domainmix.backbone import build_backbone
from domainmix.bodies import BackboneConfig
from domainmix.images import load_images, normalise
from domainmix.core import DomainMixError, expect_error, generator
from domainmix.loading import BatchLoader, toy_train_set
from domainmix.records import DataSet, Records, find_images
from domainmix.layouts import guess_layouts
from domainmix.readers import (
    merge_splits, read_market1501, read_msmt17, read_randperson, write_cuhk03np, write_market1501, write_msmt17,
    write_randperson,
)
from domainmix.datasets import read_dataset, read_folder
from domainmix.schedule import DomainConfig
from domainmix.training import train_invariant

few = settings(max_examples=25, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def pictures(n, seed=0, size=(16, 8)):
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator(seed, "pictures"))


def flat(n, size=(16, 8)):
    "One colour a picture, so that JPEG keeps it."
    return (torch.arange(n) * 37 % 256).byte()[:, None, None, None].expand(n, 3, *size).contiguous()


rows = st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 5), st.sampled_from(records.SPLITS)), min_size=1, max_size=12)


def same(dataset, root, names, pid, camera, split, images):
    "Is every picture that was written read back, with its identity, camera, split and pixels?"
    number = {n: i for i, n in enumerate(names)}
    read = {s: [number[p] for p in r.path] for s, r in dataset.splits.items()}
    assert {s: sorted(i) for s, i in read.items()} == {s: [i for i, t in enumerate(split) if t == s] for s in set(split)}
    for s, r in dataset.splits.items():
        assert r.pid.tolist() == [pid[i] for i in read[s]] and r.camera.tolist() == [camera[i] for i in read[s]]
        assert r.path.tolist() == sorted(r.path)
        loaded, kept = load_images(r, 16, 8)
        assert len(kept) == len(r) and (loaded.int() - images[read[s]].int()).abs().max() <= 2


@few
@given(rows)
@pytest.mark.parametrize("layout", ["market1501", "cuhk03np-detected", "msmt17"])
def test_layouts_round_trip(layout, rows):
    pid, camera, split = zip(*rows)
    images = flat(len(rows))
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp) / "set" / ("detected" if "cuhk" in layout else "")
        write = {"market1501": write_market1501, "cuhk03np-detected": write_cuhk03np, "msmt17": write_msmt17}[layout]
        names = write(root, images, pid, camera, split)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "(?s).*one camera")
            dataset = read_dataset(f"{layout}:{tmp}/set")   # its own counts.json: no warning
        same(dataset, root, names, pid, camera, split, images)
        assert guess_layouts(tmp + "/set")[0] == layout


@few
@given(st.lists(st.tuples(st.integers(0, 999_999), st.integers(0, 18)), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_randperson_round_trip(rows, full, older):
    pid, camera = zip(*rows)
    with tempfile.TemporaryDirectory() as tmp:
        names = write_randperson(Path(tmp) / "rp", images := flat(len(rows)), pid, camera, full, older)
        same(read_randperson(Path(tmp) / "rp"), tmp, names, pid, camera, ["train"] * len(rows), images)


names = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20)


@few
@given(st.lists(st.tuples(names, names), min_size=1, max_size=6))
def test_any_file_name_is_read(places):
    with tempfile.TemporaryDirectory() as tmp:
        wanted = set()
        for folder, name in places:
            if folder.startswith(".") or folder == "__MACOSX" or name.startswith("."):
                continue
            path = Path(tmp) / folder / f"{name}.PNG"
            try:
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (2, 4)).save(path)
            except OSError:
                continue  # too long for this file system
            wanted.add(f"{folder}/{name}.PNG")
        assume(wanted)
        found = read_folder(tmp).train
        assert set(found.path) == wanted and len(load_images(found, 4, 2)[0]) == len(wanted)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9 \xff.jpg"
    try:
        with open(name, "wb") as f:
            f.write(b"no picture")
    except OSError:
        pytest.skip("this file system takes text alone")
    found = read_folder(tmp_path).train
    assert len(found) == 1 and os.path.exists(found.files()[0])
    with pytest.raises(DomainMixError) as e:
        load_images(found)
    assert str(e.value).encode("utf-8") and "caf" in str(e.value)   # can be printed
    with pytest.raises(DomainMixError):
        load_images(found, cache=tmp_path / "cache")


def test_hidden_files_links_and_loops(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (2, 4)).save(tmp_path / "a/1.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert [p.rsplit("/")[-1] for p in find_images(tmp_path)] == ["1.jpg", "lost.jpg"]
    expect_error(lambda: load_images(read_folder(tmp_path).train), "1 of 2", "lost.jpg", "No such file")


@pytest.mark.parametrize("path", ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg", "..\\secret.jpg", "C:\\secret.jpg",
                                  "link/0_0_01_.jpg", "0_0_01_link.jpg", "0_0_01_\0.jpg"])
@pytest.mark.parametrize("split", records.SPLITS)
def test_lists_cannot_lead_out(tmp_path, path, split):
    write_msmt17(tmp_path / "set", pictures(3), [1, 1, 1], [0, 1, 0], records.SPLITS)
    folder = tmp_path / "set" / ("train" if split == "train" else "test")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (2, 4)).save(tmp_path / "elsewhere/0_0_01_.jpg")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "0_0_01_link.jpg").symlink_to(tmp_path / "elsewhere/0_0_01_.jpg")
    with open(tmp_path / "set" / layouts.LIST_FILES[split][0], "a") as f:
        f.write(f"{path} 1\n")
    expect_error(lambda: read_msmt17(tmp_path / "set"), "outside the data set", "list_")


def test_links_within_a_list_are_fine(tmp_path):
    write_msmt17(tmp_path / "set", pictures(3), [1, 1, 1], [0, 1, 0], records.SPLITS)
    first = next((tmp_path / "set/train").rglob("*.jpg"))
    (first.parent / "0001_900_04_x.jpg").symlink_to(first)
    with open(tmp_path / "set/list_train.txt", "a") as f:
        f.write("0001/0001_900_04_x.jpg\t1\r\n")
    (tmp_path / "home").symlink_to(tmp_path / "set")
    assert read_msmt17(tmp_path / "home").train.camera.tolist() == [0, 3]


def test_one_picture_with_two_identities_is_refused(tmp_path):
    write_msmt17(tmp_path / "set", pictures(3), [1, 1, 1], [0, 1, 0], records.SPLITS)
    line = (tmp_path / "set/list_train.txt").read_text()
    (tmp_path / "set/list_val.txt").write_text(line)
    assert len(read_msmt17(tmp_path / "set").train) == 1            # twice the same: once
    (tmp_path / "set/list_val.txt").write_text(line.replace(" 1", " 2"))
    expect_error(lambda: read_msmt17(tmp_path / "set"), "two identities")


def test_every_layout_under_every_other_name(tmp_path):
    "Reading a set under another's name is an error that says what it is."
    split = np.array(["train", "query", "gallery"] * 2)
    rest = (pictures(6), [1, 1, 1, 2, 2, 2], [0, 1, 1, 0, 1, 1])
    write_market1501(tmp_path / "market1501", *rest, split)
    write_msmt17(tmp_path / "msmt17", *rest, split)
    write_randperson(tmp_path / "randperson", *rest)
    write_cuhk03np(tmp_path / "cuhk03np-detected/detected", *rest, split)
    for real in ("market1501", "msmt17", "randperson", "cuhk03np-detected"):
        for said in datasets.READERS:
            if said == "folder":
                continue
            if said == real:
                assert read_dataset(f"{said}:{tmp_path}/{real}").train is not None
            else:
                expect_error(lambda: read_dataset(f"{said}:{tmp_path}/{real}"), f"looks like {real}", {"msmt17": "http", "crops": "domainmix crop"}.get(said, "https"))
        expect_error(lambda: read_dataset(f"{tmp_path}/{real}"), f"looks like {real}")


def test_published_counts_do_not_warn():
    for name, layout in layouts.LAYOUTS.items():
        for i in range(max(map(len, (layout.counts or {}).values()), default=0)):
            splits = {}
            for split, releases in layout.counts.items():
                n, ids = releases[i]
                splits[split] = Records(np.full(n, "x"), np.arange(n) % ids, np.arange(n) % layout.cameras)
            assert layouts.count_problems(DataSet(name, "x", **splits), layout.counts, layout.cameras) == []


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception):
        readers.write_images(tmp_path / "set", ["a.jpg", "b.unknown"], pictures(2))
    assert list(tmp_path.iterdir()) == []
    write_market1501(tmp_path / "set", pictures(2), [1, 2], [0, 0])
    expect_error(lambda: write_market1501(tmp_path / "set", pictures(2), [1, 2], [0, 0]), "not empty")
    for bad in (dict(pid=[1]), dict(camera=[-1, 0]), dict(split=["train", "val"]), dict(images=pictures(2).float())):
        given = dict(root=tmp_path / "new", images=pictures(2), pid=[1, 2], camera=[0, 0]) | bad
        with pytest.raises(DomainMixError):
            write_market1501(**given)
        with pytest.raises(DomainMixError):
            write_msmt17(**given)
    expect_error(lambda: write_msmt17(tmp_path / "new", pictures(1), [-1], [0]), "identity is -1")


def test_merge_keeps_people_apart(tmp_path):
    write_msmt17(tmp_path / "ms", pictures(4), [0, 1, 0, 0], [0, 1, 0, 1], ["train", "train", "query", "gallery"])
    both = merge_splits(read_msmt17(tmp_path / "ms"))
    assert both.n_ids == 3 and len(both) == 4
    write_market1501(tmp_path / "ma", pictures(4), [0, 1, 2, 2], [0, 1, 0, 1], ["gallery", "train", "query", "gallery"])
    assert merge_splits(read_market1501(tmp_path / "ma")).pid.tolist() == [1, 2, 2]


@few
@given(st.lists(st.integers(-1, 50), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_labels_do_not_depend_on_order(pid, random):
    label = records.relabel(np.array(pid))
    order = random.sample(range(len(pid)), len(pid))
    assert records.relabel(np.array(pid)[order]).tolist() == label[order].tolist()
    known = sorted({p for p in pid if p >= 0})
    assert [(-1 if p < 0 else known.index(p)) for p in pid] == label.tolist()


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("L", "jpg"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("CMYK", "tif"),
                                          ("1", "png"), ("LA", "png"), ("I;16", "png"), ("I;16", "tif"), ("RGB", "webp"), ("RGB", "bmp")])
def test_any_mode_becomes_rgb(tmp_path, mode, suffix):
    grey = Image.new("L", (8, 16), 128)
    image = Image.fromarray(np.full((16, 8), 128 * 256, np.uint16)) if mode == "I;16" else grey.convert("RGB").convert(mode, dither=Image.Dither.NONE)
    image.save(tmp_path / f"a.{suffix}")
    loaded, _ = load_images(read_folder(tmp_path).train, 16, 8)
    expected, near = {"1": (255, 0), "P": (128, 26)}.get(mode, (128, 3))    # black and white; a coarse palette
    assert (loaded.int() - expected).abs().max() <= near


@few
@given(st.binary(max_size=200), st.sampled_from(["jpg", "png", "bmp", "webp", "tif"]), st.integers(0, 2))
def test_hostile_bytes_are_named_never_read(junk, suffix, how):
    "Junk alone, a picture cut short, a picture with junk in its middle: an error with the name, or a whole picture."
    with tempfile.TemporaryDirectory() as tmp:
        whole = io.BytesIO()
        Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
        whole = whole.getvalue()
        content = [junk, whole[:len(junk)], whole[:30] + junk + whole[30 + len(junk):]][how]
        Path(tmp, f"odd one.{suffix}").write_bytes(content)
        try:
            images, _ = load_images(read_folder(tmp).train, 16, 8)
        except DomainMixError as e:
            assert "odd one" in str(e)
        else:
            assert images.shape == (1, 3, 16, 8) and how == 2 or content == whole


def test_cache_of_another_set_is_never_taken(tmp_path):
    for i in range(2):
        write_market1501(tmp_path / str(i), pictures(4, seed=i), [1, 1, 2, 2], [0, 1, 0, 1])
    a, b = (load_images(read_market1501(tmp_path / str(i)).train, 16, 8, cache=tmp_path / "cache")[0] for i in range(2))
    assert not torch.equal(a, b) and len(list((tmp_path / "cache").glob("*.npy"))) == 2
    for damaged in (tmp_path / "cache").glob("*.json"):
        damaged.write_text("{")
    assert torch.equal(load_images(read_market1501(tmp_path / "1").train, 16, 8, cache=tmp_path / "cache")[0], b)


@few
@given(st.integers(1, 6), st.sampled_from([(8, 4), (64, 32), (31, 7), (5, 9), (1, 1)]), st.floats(0, 1), st.integers(0, 300), st.integers(0, 9))
def test_augmented_pixels_come_from_the_picture(n, size, flip, pad, seed):
    config = AugmentConfig(flip=flip, pad=pad)
    images, u = pictures(n, size=size) | 1, augmentation_numbers(n, generator(seed))
    moved = flip_and_shift(images, u, config)
    assert moved.shape == images.shape
    for a, b in zip(moved, images):
        assert set(a.flatten().tolist()) <= set(b.flatten().tolist()) | {0}
    top, left, bottom, right = erase_boxes(u, *size, config)
    out = augment(images, config, generator(seed))
    area = ((bottom - top) * (right - left)).tolist()
    plain = normalise(moved)
    assert [int((o != p).any(0).sum()) for o, p in zip(out, plain)] == area
    assert (out == 0).all(1).flatten(1).sum(1).tolist() == area     # no byte is the mean itself


people = st.lists(st.tuples(st.integers(-1, 6), st.integers(-1, 3)), min_size=1, max_size=40)


@few
@given(people, st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_batches_keep_the_rules(rows, p, k, once, seed):
    label, camera = (np.array(c) for c in zip(*rows))
    ids = set(label[label >= 0])
    if len(ids) < p:
        return expect_error(lambda: PKSampler(label, camera, p=p, k=k), f"needs {p} identities", "lower p")
    sampler = PKSampler(label, camera, p=p, k=k, singletons_once=once)
    for e in range(5):
        batch = sampler.sample(generator(seed, e)).tolist()
        assert batch == sampler.sample(generator(seed, e)).tolist()
        groups, rest = [], batch
        while rest:
            n = 1 if once and (label == label[rest[0]]).sum() == 1 else k
            groups, rest = [*groups, rest[:n]], rest[n:]
        assert len(groups) == p == len({label[g[0]] for g in groups}) and all(label[i] >= 0 for i in batch)
        for first, *others in groups:
            mine = set(np.flatnonzero(label == label[first]).tolist())
            may = {i for i in mine if camera[i] != camera[first]} or mine - {first} or {first}
            assert set(others) <= may
            if len(may) >= k - 1:
                assert len(set(others)) == len(others)


@few
@given(st.lists(people, min_size=1, max_size=3))
def test_union_keeps_classes_and_cameras_apart(sets):
    parts = []
    for d, rows in enumerate(sets):
        label, camera = (np.array(c) for c in zip(*rows))
        parts.append(TrainSet(pictures(len(rows)), records.relabel(label), camera, [d] * len(rows)))
    both, at = union(*parts), 0
    seen_label, seen_camera = set(), set()
    for part in parts:
        rows = slice(at, at := at + len(part))
        for whole, own, seen in ((both.label[rows], part.label, seen_label), (both.camera[rows], part.camera, seen_camera)):
            assert torch.equal(whole < 0, own < 0)
            new = set(whole[whole >= 0].tolist())
            assert len(new) == len(set(own[own >= 0].tolist())) and not new & seen
            seen |= new
    assert sorted(seen_label) == list(range(both.n_classes)) if both.n_classes else True


def test_real_photographs():
    "The development part of Market-1501, where it lies beside the checkout."
    from domainmix.files import reference_folder
    root = reference_folder() and reference_folder() / "data/market1501_dev"
    if root is None or not root.is_dir():
        pytest.skip("no development photographs here")
    with pytest.warns(UserWarning, match="1,453 images of 179 identities, expected 12,936 of 751"):
        dataset = read_dataset(f"market1501:{root}")
    assert [len(r) for r in dataset.splits.values()] == [1453, 268, 896]
    images, kept = load_images(dataset.query[:32], 64, 32)
    assert train_set(images, kept, 1).n_classes == dataset.query[:32].n_ids


# --- what users really bring: other toolboxes' layouts, cameras from 0, odd kinds and ranges, the same file twice

DUKE = {"bounding_box_train": [(1, 1), (1, 2), (2, 0), (2, 3)], "query": [(3, 0), (4, 1)],
        "bounding_box_test": [(3, 0), (3, 1), (4, 2), (-1, 2), (0, 1)]}
NAMES = {"duke": "{p:04d}_c{c}_f{i:07d}.jpg", "veri": "{p:04d}_c{c:03d}_{i:08d}_0.jpg", "msmt": "{p:04d}_c{c}_{i:04d}.png",
         "market": "{p:04d}_c{c}s1_{i:06d}_00.jpeg", "own": "cam{c}-person{p}-{i}.JPG"}
FOLDERS = {"boxes": ("bounding_box_train", "query", "bounding_box_test"), "plain": ("train", "query", "gallery"),
           "veri": ("image_train", "image_query", "image_test"), "test": ("Train", "Query", "test"),
           "last": ("train", "test/query", "test/gallery")}
PATTERN = {"own": r"cam(?P<camera>\d+)-person(?P<pid>-?\d+)"}
GENERAL = r"(?P<pid>-1|\d+)_c(?P<camera>\d+)"


def lay_out(root, names, folders, also=()):
    "A data set of `DUKE`'s people: {split: [(path, pid, camera), ...]}, junk and all."
    wanted, i = {}, 0
    for split, folder, people in zip(records.SPLITS, folders, DUKE.values()):
        for p, c in people:
            name = f"{folder}/" + (names.format(p=p, c=c, i=i) if p >= 0 else names.replace("{p:04d}", "{p}").format(p=p, c=c, i=i))
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 8), (9 * i + 20, 0, 90)).save(root / name)
            wanted.setdefault(split, []).append((name, p, c))
            i += 1
    for name in also:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8), (255, 0, 90)).save(root / name)
    return wanted


def table(dataset, junk=True):
    return {s: sorted(t for t in zip(r.path.tolist(), r.pid.tolist(), r.camera.tolist()) if junk or t[1] >= 0)
            for s, r in dataset.splits.items()}


@pytest.mark.parametrize("folders", FOLDERS)
@pytest.mark.parametrize("names", NAMES)
def test_splits_and_cameras_of_any_layout(tmp_path, names, folders):
    "With a pattern for both words, without one where the names are of the usual form; c0 is a camera everywhere."
    wanted = lay_out(tmp_path / "set", NAMES[names], FOLDERS[folders], ["gt_bbox/0001_c1_9.jpg"])
    real = {s: sorted(t for t in rows if t[1] >= 0) for s, rows in wanted.items()}
    for where in (tmp_path / "set", tmp_path):
        below = "" if where.name == "set" else "set/"
        for word in ("folder", "market1501"):
            found = read_dataset(f"{word}:{where}", pattern=PATTERN.get(names, GENERAL))
            prefix = below if word == "folder" else ""
            assert table(found) == {s: sorted((prefix + p, i, c) for p, i, c in rows) for s, rows in wanted.items()}
    if names != "own":
        assert table(read_dataset(f"market1501:{tmp_path}/set")) == real
        assert read_dataset(f"market1501:{tmp_path}/set", need=("train",)).train.n_cameras == 4
    with pytest.warns(UserWarning, match="7 of its 12 images are the test"):
        assert len(read_dataset(f"folder:{tmp_path}/set").train) == 12


def test_folders_beside_the_splits(tmp_path):
    lay_out(tmp_path, NAMES["duke"], FOLDERS["boxes"], ["extra/0009_c1_1.jpg", "0008_c1_1.jpg", "multi-query/0003_c1_1.jpg"])
    with pytest.warns(UserWarning, match=r"left out 2 images .* \(in \., extra\)"):
        found = read_dataset(f"folder:{tmp_path}", pattern=GENERAL)
    assert [len(r) for r in found.splits.values()] == [4, 2, 5] and len(found.dropped) == 3
    both = tmp_path / "both"
    for kind in ("detected", "labeled"):
        lay_out(both / kind, NAMES["duke"], FOLDERS["boxes"])
    with pytest.warns(UserWarning, match="several data sets with a test: detected, labeled"):
        assert len(read_dataset(f"folder:{both}", pattern=GENERAL).train) == 22
    layumi = {"train_all/0001": 2, "train/0001": 1, "val/0001": 1, "query/0002": 1, "gallery/0002": 2}
    for folder, n in layumi.items():
        (tmp_path / "pytorch" / folder).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (4, 8)).save(tmp_path / "pytorch" / folder / f"0001_c{i + 1}s1_00000{i}_00.jpg")
    for word in ("folder", "market1501"):
        found = read_dataset(f"{word}:{tmp_path}/pytorch", pattern=GENERAL)
        assert {s: len(r) for s, r in found.splits.items()} == dict(train=2, query=1, gallery=2)


def test_b_is_the_training_split_alone(tmp_path):
    "A run reads no test image as B, and a target without queries gets them from its test."
    from domainmix.runs.inputs import open_dataset
    from domainmix.runs.settings import configure
    lay_out(tmp_path / "set", NAMES["own"], FOLDERS["plain"])
    config = configure(real=f"folder:{tmp_path}/set", target=f"market1501:{tmp_path}/set", pattern=PATTERN["own"])
    assert all(p.startswith("train/") for p in open_dataset("real", config, config.real).train.path)
    config = configure(target=config.target, pattern=PATTERN["own"])
    assert open_dataset("target", config, config.target).query.path[0].startswith("query/")
    for name in ("train/1_a.jpg", "train/1_b.jpg", "test/2_a.jpg", "test/2_b.jpg", "test/3_a.jpg", "test/3_b.jpg"):
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8)).save(tmp_path / "two" / name)
    config = configure(target=f"folder:{tmp_path}/two", pattern=r"(?P<pid>\d)_(?P<camera>\w)")
    target = open_dataset("target", config, config.target)
    assert set(target.query.pid) == set(target.gallery.pid) == {2, 3}
    lay_out(tmp_path / "no train", NAMES["duke"], FOLDERS["boxes"])
    for image in (tmp_path / "no train/bounding_box_train").iterdir():
        image.unlink()
    assert list(read_dataset(f"market1501:{tmp_path}/no train", need=()).splits) == ["query", "gallery"]
    expect_error(lambda: read_dataset(f"market1501:{tmp_path}/no train", need=("train",)), "bounding_box_train contains no image")
    expect_error(lambda: read_dataset(f"folder:{tmp_path}/no train", GENERAL, ("train",)), "has no train images")


def brute_force_map(query, gallery, q, g):
    "mAP as in the papers, with loops: same identity and same known camera is junk, and so is -1."
    aps = []
    for x, p, c in zip(query, q.pid, q.camera):
        order = np.argsort(-(gallery @ x), kind="stable")
        hits, right, n = 0, [], 0
        for j in order:
            if g.pid[j] < 0 or (g.pid[j] == p and g.camera[j] == c and c >= 0):
                continue
            n += 1
            if g.pid[j] == p:
                hits += 1
                right.append(hits / n)
        if right:
            aps.append(np.mean(right))
    return float(np.mean(aps))


@pytest.mark.parametrize("layout", ["market1501", "cuhk03np-detected", "msmt17", "folder"])
def test_camera_zero_counts_in_the_score(tmp_path, layout):
    from domainmix.evaluation import rank
    g = np.random.default_rng(3)
    pid, camera = np.repeat(np.arange(1, 9), 6), np.tile([0, 0, 1, 1, 2, 3], 8)
    split = np.tile(["query", "gallery", "query", "gallery", "gallery", "gallery"], 8)
    writer = {"msmt17": write_msmt17, "cuhk03np-detected": write_cuhk03np}.get(layout, write_market1501)
    home = tmp_path / "detected" if "cuhk" in layout else tmp_path / "set"
    writer(home, pictures(48), pid, camera, split)
    for f in [f for f in home.rglob("*.*g")]:                      # the writers count from 1, as the data sets do
        step = (lambda m: f"_c{int(m[1]) - 1}") if layout != "msmt17" else (lambda m: f"_{int(m[1]) - 1:02d}_0303")
        f.rename(f.with_name(re.sub(r"_c(\d+)" if layout != "msmt17" else r"_(\d\d)_0303", step, f.name)))
    for f in home.glob("list_*.txt"):
        f.write_text(re.sub(r"_(\d\d)_0303", lambda m: f"_{int(m[1]) - 1:02d}_0303", f.read_text()))
    found = read_dataset(f"{layout}:{tmp_path}" + ("/set" if layout != "cuhk03np-detected" else ""),
                         GENERAL if layout == "folder" else None, ("query", "gallery"))
    assert sorted(set(found.gallery.camera)) == [0, 1, 2, 3] and sorted(set(found.query.camera)) == [0, 1]
    near = g.normal(size=(9, 16))[found.query.pid] + g.normal(size=(16, 16))
    far = g.normal(size=(32, 16)) + g.normal(size=(9, 16))[found.gallery.pid]
    near, far = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (near, far))
    got = rank(near, far, found.query.pid, found.gallery.pid, found.query.camera, found.gallery.camera).mAP
    assert abs(got - brute_force_map(near, far, found.query, found.gallery)) < 1e-6


def test_the_tables_of_sets_without_a_camera_zero_stay(tmp_path):
    "Fingerprints of inputs, and with them the stages of earlier runs, depend on these numbers."
    write_market1501(tmp_path / "m", pictures(4), [1, 1, 2, 2], [0, 1, 0, 1], ["train"] * 4)
    assert read_market1501(tmp_path / "m").train.camera.tolist() == [0, 1, 0, 1]
    (tmp_path / "m/bounding_box_train/-1_c0s1_000001_00.jpg").write_bytes(b"junk of camera 0")
    assert read_dataset(f"market1501:{tmp_path}/m", need=("train",)).train.camera.tolist() == [0, 1, 0, 1]


KINDS = {".jpg": "JPEG", ".JPEG": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".GIF": "GIF",
         ".tif": "TIFF", ".TIFF": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".jp2": "JPEG2000", ".tga": "TGA", ".avif": "AVIF"}


def test_every_kind_in_every_reader(tmp_path):
    "Pillow alone is the other reader; what is not read is counted and named once."
    from PIL import features
    from domainmix.pixels import IMAGE_SUFFIXES
    kinds = {k: f for k, f in KINDS.items() if k != ".avif" or features.check("avif")}
    assert set(map(str.lower, kinds)) <= set(IMAGE_SUFFIXES)
    for word, name in (("market1501", "bounding_box_train/{i:04d}_c{c}s1_000001_00"), ("randperson", "x/{i:06d}_s00_c0{c}_f000001"),
                       ("cuhk03np-detected", "detected/bounding_box_train/{i:04d}_c{c}_1"), ("folder", "some where/{i} {c}")):
        home = tmp_path / word
        for i, (suffix, kind) in enumerate(kinds.items()):
            file = home / (name.format(i=i + 1, c=i % 2) + suffix)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L" if suffix == ".pgm" else "RGB", (4, 8), 30 + 10 * i if suffix == ".pgm" else (30 + 10 * i, 90, 60)).save(file, kind)
        for odd in ("a.heic", "b.CR2", "c.psd", "d.svg", "e.mp4", "f.MOV", "Thumbs.db", ".DS_Store", "labels.txt", "._x.jpg", "g.jxl"):
            (file.parent / odd).write_bytes(b"\0")
        (file.parent / "no extension").write_bytes(next(file.parent.glob("*.jfif")).read_bytes())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read_dataset(f"{word}:{home}", need=("train",)).train
        said = [str(w.message) for w in caught if "not read" in str(w.message)]
        heic = 0 if ".heic" in IMAGE_SUFFIXES else 1
        assert len(said) == 1 and f"{7 + heic} files" in said[0] and all(k in said[0] for k in (".cr2", ".psd", ".svg", ".mp4", ".mov", "(no extension)"))
        if heic:
            assert ".heic" in said[0] and "pillow-heif" in said[0]
        found = found[np.array([not p.endswith(".heic") for p in found.path])]
        assert len(found) == len(kinds)
        for pixels, file in zip(load_images(found, 8, 4)[0], found.files()):
            assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(Image.open(file).convert("RGB"))).max() == 0, file


def png16(path, values):
    "A sixteen-bit PNG of (H, W) or (H, W, 3), written byte by byte."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    h, w = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2 if values.ndim == 3 else 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


RANGES = {  # what a set of images holds, and the same as eight bits, found with whole numbers and fractions
    "10 bits": (np.uint16, 1023, lambda v: v * 256 // 1024), "12 bits": (np.uint16, 4095, lambda v: v * 256 // 4096),
    "14 bits": (np.uint16, 16383, lambda v: v * 256 // 16384), "16 bits": (np.uint16, 65535, lambda v: v * 256 // 65536),
    "8 bits in 16": (np.uint16, 255, lambda v: v), "int32 to 255": (np.int32, 255, lambda v: v),
    "int32 to 1e6": (np.int32, 10**6, lambda v: v * 256 // 2**20), "float to 1": (np.float32, 1, lambda v: np.rint(v * 255)),
    "float to 255": (np.float32, 255, np.rint), "float to 4095": (np.float32, 4095, lambda v: np.clip(np.rint(v / 16), 0, 255)),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_of_any_range(tmp_path, name):
    "The same rule for files, with and without a cache, and for arrays; a dark image stays dark beside a bright one."
    from domainmix.inference import decode_list, list_bits
    kind, high, scaled = RANGES[name]
    right = lambda v: scaled(v.astype(np.int64 if v.dtype.kind in 'iu' else float))
    g = np.random.default_rng(0)
    values = [(g.random((8, 4)) * top).astype(kind) for top in (high, high / 3, high / 9)]
    values[0][0, 0] = high
    rgb = [(g.random((8, 4, 3)) * high).astype(kind) for _ in range(2)]
    for i, v in enumerate(values):
        Image.fromarray(v).save(tmp_path / f"{i}.tif")
        if kind == np.uint16:
            png16(tmp_path / f"{i}.png", v)
    if kind == np.uint16:
        for i, v in enumerate(rgb):
            png16(tmp_path / f"c{i}.png", v)
    Image.new("RGB", (4, 8), (7, 8, 9)).save(tmp_path / "plain.png")
    found = read_folder(tmp_path).train
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        for pixels, path in zip(load_images(found, 8, 4, cache)[0].permute(0, 2, 3, 1).numpy(), found.path):
            wanted = (7, 8, 9) if path == "plain.png" else right(rgb[int(path[1])] if path[0] == "c" else values[int(path[0])][..., None])
            assert np.array_equal(pixels, np.broadcast_to(wanted, pixels.shape)), path
    arrays = [np.repeat(v[..., None], 3, 2) for v in values] + rgb
    for i, pixels in enumerate(decode_list(arrays, 8, 4).permute(0, 2, 3, 1).numpy()):
        assert np.array_equal(pixels, right(arrays[i]))
    bits = list_bits(arrays)                                       # a part of the list is read as the whole
    assert np.array_equal(decode_list(arrays[2:3], 8, 4, 2, bits)[0].permute(1, 2, 0).numpy(), right(arrays[2]))


def test_splits_of_a_set_share_one_range(tmp_path):
    "The query is dark: alone it would be read as ten bits."
    from domainmix.runs.inputs import decode_dataset
    from domainmix.runs.settings import configure
    for name, v in (("query/1_a.png", 900), ("gallery/1_b.png", 4000), ("gallery/2_b.png", 2000)):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        png16(tmp_path / "s" / name, np.full((8, 4), v))
    found = read_dataset(f"folder:{tmp_path}/s", r"(?P<pid>\d)_(?P<camera>\w)")
    parts = decode_dataset(found, configure(height=8, width=4, data=str(tmp_path / "data")))
    assert [p.images[:, 0, 0, 0].tolist() for p in parts] == [[900 // 16], [4000 // 16, 2000 // 16]]


def test_numbers_that_are_no_colours(tmp_path):
    for name, values in (("nan", [0, np.nan]), ("minus", [-1, 5]), ("endless", [np.inf, 1])):
        folder = tmp_path / name
        folder.mkdir()
        Image.fromarray(np.full((8, 2), values, np.float32)).save(folder / "a.tif")
        Image.new("RGB", (4, 8), (9, 99, 9)).save(folder / "b.png")
        expect_error(lambda: load_images(read_folder(folder).train, 8, 4), "1 of 2", "a.tif (it holds")
        assert len(load_images(read_folder(folder).train, 8, 4, skip_bad=True)[1]) == 1
    Image.fromarray(np.full((8, 4), 1.4, np.float32)).save(tmp_path / "c.tif")
    expect_error(lambda: load_images(read_folder(tmp_path).train, 8, 4), "from 0 to", "neither 0 to 1 nor 0 to 255")
    Image.fromarray(np.full((8, 4), 90, np.uint16)).save(tmp_path / "wrong.jpg", "TIFF")
    expect_error(lambda: load_images(read_folder(tmp_path).train[np.array([-1])], 8, 4), "wrong.jpg", "correct its extension")


def test_black_and_white_are_said(tmp_path):
    for i, v in enumerate((0, 12, 128, 250)):
        Image.new("RGB", (4, 8), (v, v, v)).save(tmp_path / f"{i}.png")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_images(read_folder(tmp_path).train, 8, 4, cache)
        said = [str(w.message) for w in caught]
        assert len(said) == 2 and "2 of 4" in said[0] and "all black: 0.png, 1.png." in said[0] and "1 of 4" in said[1] and "all white: 3.png" in said[1]


def test_the_name_of_a_cache_changes_only_where_the_images_do(tmp_path):
    "The first name is that of the version before; caches of eight bits and of full sixteen stay valid."
    from domainmix.core import fingerprint
    from domainmix.images import content_key, size_and_time
    Image.new("RGB", (4, 8)).save(tmp_path / "a.png")
    rows = Records(["a.png"], [1], [0], tmp_path)
    before = fingerprint(dict(paths=rows.path, files=np.array([size_and_time(rows.files()[0])], dtype=np.int64), size=[8, 4], form=2))
    keys = [content_key(rows, 8, 4, b, a) for b in ({}, {"uint16": 16}, {"uint16": 12}, {"float32": 16}) for a in ("stretch", "letterbox")]
    assert keys[0] == keys[2] == before and len(set(keys)) == 6


def test_a_query_never_finds_its_own_file(tmp_path):
    "Gallery and query share files under other names, and there are no cameras: the score of loops that leave them out."
    from domainmix.evaluation import evaluate
    from domainmix.runs.inputs import decode_split, warn_of_same_files
    from domainmix.runs.settings import configure

    class Mean(torch.nn.Module):
        def embed(self, x, feature):
            return torch.nn.functional.normalize(x.flatten(1))
    images = pictures(24, seed=4, size=(8, 4))
    for i, p in enumerate(np.repeat(np.arange(6), 4)):
        for folder in ("query", "gallery") if i % 4 < 2 else ("gallery",):
            path = tmp_path / folder / f"{p}_{folder}_{(i * 7) % 24}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(path)
    found = read_dataset(f"folder:{tmp_path}", r"(?P<pid>\d)_")
    config = configure(height=8, width=4, data=str(tmp_path / "data"))
    q, g = decode_split(found.query, config), decode_split(found.gallery, config)
    scores = evaluate(Mean(), q.images, q.records, g.images, g.records)
    near, far = (Mean().embed(normalise(s.images), "").double().numpy() for s in (q, g))
    content = [[Path(f).read_bytes() for f in s.records.files()] for s in (q, g)]
    aps = []
    for i, x in enumerate(near):
        order = [j for j in np.argsort(-(far @ x)) if content[1][j] != content[0][i]]
        right = g.records.pid[order] == q.records.pid[i]
        aps.append(np.mean([right[:k + 1].mean() for k in np.flatnonzero(right)]))
    assert len(q.records) == 12 and abs(scores["mAP"] - np.mean(aps)) < 1e-6
    with pytest.warns(UserWarning) as said:
        warn_of_same_files(dict(query=[q], gallery=[g], real=[g], synthetic=[q]))
    said = [str(w.message) for w in said]
    assert len(said) == 3 and "12 of 12 query images" in said[0] and "12 of 12 synthetic images" in said[1] and "24 of 24 real images" in said[2]


def test_letterbox_keeps_the_aspect(tmp_path):
    "Another way: the frame by hand around what Pillow resizes."
    image = pictures(1, size=(30, 90))[0].permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "wide.png")
    records_ = read_folder(tmp_path).train
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        boxed = load_images(records_, 64, 32, cache, aspect="letterbox")[0][0].permute(1, 2, 0).numpy()
        inner = np.asarray(Image.fromarray(image).resize((32, 11), Image.Resampling.BICUBIC))
        wanted = np.full((64, 32, 3), (124, 116, 104), np.uint8)
        wanted[26:37] = inner
        assert np.array_equal(boxed, wanted)
    assert not np.array_equal(load_images(records_, 64, 32, tmp_path / "cache")[0][0].permute(1, 2, 0).numpy(), boxed)


def test_colour_floats_in_a_tiff(tmp_path):
    "Pillow does not know them: the message names the package, which reads them where it is installed."
    values = np.random.default_rng(0).random((8, 4, 3)).astype("<f4")
    data, fields = values.tobytes(), [(256, 3, 1, 4), (257, 3, 1, 8), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 0),
                                      (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, len(values.tobytes())), (339, 3, 3, 6)]
    at = 8 + 2 + 12 * len(fields) + 4                              # behind the directory: two rows of three numbers, then the pixels
    place = {258: at, 339: at + 6, 273: at + 12}
    entries = b"".join(struct.pack("<HHII", tag, kind, n, place.get(tag, v)) for tag, kind, n, v in fields)
    head = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(head + struct.pack("<6H", 32, 32, 32, 3, 3, 3) + data)
    found = read_folder(tmp_path).train
    try:
        import tifffile  # noqa: F401
    except ImportError:
        return expect_error(lambda: load_images(found, 8, 4), "a.tif (a TIFF of a kind that needs the package tifffile")
    assert np.array_equal(load_images(found, 8, 4)[0][0].permute(1, 2, 0).numpy(), np.rint(values * 255.))


def test_look_says_what_is_read(tmp_path, monkeypatch, capsys):
    "The command in this process: numbers counted by hand, JSON, a sheet, and bad input that leaves nothing behind."
    import json
    from domainmix.cli import main
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "set", NAMES["own"], FOLDERS["plain"], ["gt_bbox/x.jpg"])
    (tmp_path / "set/train/clip.mp4").touch()
    (tmp_path / "set/query/broken.jpg").write_text("no image")
    png16(tmp_path / "set/gallery/cam1-person9-99.png", np.full((8, 4), 4000))
    command = ["look", f"folder:{tmp_path}/set", "--pattern", PATTERN["own"]]
    assert main(command) == 0
    said = capsys.readouterr().out
    for words in ("train    4 images, 2 identities, 4 cameras", "query    2 images, 2 identities, 2 cameras", "gallery  6 images",
                  "2 gallery images show nobody that a query asks for", "uint16 from 4000 to 4000, read as 12 bits",
                  "left out 2 images", "not read 1 .mp4", "train/cam0-person2-2.JPG -> pid 2, camera 0", "look.png"):
        assert words in said, (words, said)
    assert Image.open("look.png").format == "PNG"
    assert main([*command, "--json", "--out", "other/sheet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["images_of_each_camera"] == {"0": 1, "1": 1, "2": 1, "3": 1} and found["not_read"] == {".mp4": 1}
    assert found["splits"]["gallery"]["unknown_identity"] == 1 and found["sheet"] == "other/sheet.png" and Path("other/sheet.png").exists()
    assert main(["look", f"folder:{tmp_path}/set"]) == 0
    assert "cannot be read: query/broken.jpg (not an image" in capsys.readouterr().out.replace(f"{tmp_path}/set/", "")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "empty").mkdir()
    for wrong, words in ((["folder:nowhere"], "not there"), (["folder:empty"], "contains no image"), ([command[1], "--pattern", "(x"], "not a valid"),
                         ([command[1], "--pattern", "(?P<pid>zz)"], "matches none"), ([command[1], "--sample", "0"], "--sample is 0"),
                         ([command[1], "--out", str(tmp_path)], "is a folder"), ([str(tmp_path / "set")], "write folder:"), (["nothing"], "unknown data set")):
        assert main(["look", *wrong]) == 2 and words in capsys.readouterr().err, words
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "empty"])


@pytest.mark.parametrize("changes", [dict(domains="camera"), dict(camera_ids=2)], ids=["a discriminator of cameras", "batches by camera"])
def test_a_camera_with_one_image_is_trained_on(changes):
    data = union(toy_train_set(0), toy_train_set(1))
    data.camera[0] = 9      # the only image of this camera
    net, drawn = build_backbone(BackboneConfig("small", width=8, stripes=2)), set()
    config = DomainConfig(p=4, k=4, balance="domain", epochs=2, iterations=6, precision="fp32", **changes)
    load = BatchLoader.load_batch
    def watched(loader, index, *more, **options):
        drawn.update(index.tolist())
        return load(loader, index, *more, **options)
    with patch.object(BatchLoader, "load_batch", watched): found = train_invariant(net, data, config, device="cpu")
    assert (0 in drawn) == ("domains" in changes)      # batches by camera need two people in a pair of cameras
    domains = 7 if "domains" in changes else 2      # the union numbers the cameras of both sets: 0, 1, 2 and 9, and three more
    assert found.discriminator.share.shape == (domains,) and found.discriminator.share.min() > 0
    assert all(math.isfinite(line["loss" if "loss" in line else "d"]) for line in found.history)
