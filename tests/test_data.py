"""Readers, decoding and sampling, with inputs that nobody would write into a notebook."""
import io
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from PIL import Image

from domainmix import datasets, layouts, readers, records
from domainmix.batches import (
    AugmentConfig, PKSampler, TrainSet, augment, flip_and_shift, augmentation_numbers, erase_boxes, train_set, union,
)
from domainmix.images import load_images, normalise
from domainmix.core import DomainMixError, expect_error, generator
from domainmix.records import DataSet, Records, find_images
from domainmix.layouts import guess_layouts
from domainmix.readers import (
    merge_splits, read_market1501, read_msmt17, read_randperson, write_cuhk03np, write_market1501, write_msmt17,
    write_randperson,
)
from domainmix.datasets import read_dataset, read_folder

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
