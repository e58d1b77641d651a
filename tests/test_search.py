"""Search, thresholds and tables of features: the commands from end to end, and every mistake that a person makes.

Right values are found another way: by a sort of all similarities, by scikit-learn, by reading what was written.
The network is not trained; what is tested is the same for any.
"""
import csv
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_curve

import domainmix
from domainmix import feature_store, gallery
from domainmix.backbone import build_backbone
from domainmix.cli import main, parse_command
from domainmix.evaluation import features_by_camera
from domainmix.files import load_arrays, save_arrays
from domainmix.inference import decode_list, load
from domainmix.readers import write_images, write_market1501
from domainmix.runs.settings import configure
from domainmix.runs.stages import save_net
from domainmix.world import toy_domain

SMALL = {"height": 32, "width": 16, "net.width": 8, "net.stripes": 2, "net.view": "whole", "net.parts": False}
NAMES = r"(?P<pid>\d+)_c(?P<camera>\d)"
KINDS = (".csv", ".html", ".json", ".png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A network in a file, and crops of eight people on three cameras."
    home = tmp_path_factory.mktemp("made")
    images, pid, camera = toy_domain(8, 6, 3, size=(32, 16))
    names = [f"{p:02}_c{c}_{i}.png" for i, (p, c) in enumerate(zip(pid.tolist(), camera.tolist()))]
    write_images(home/"crops", names, images)
    write_market1501(home/"market", images, pid + 1, camera, split=["query", "gallery"] * 24)
    config = configure(SMALL)
    save_net(build_backbone(config.net, 0), config, home)
    return home


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    "A copy of them in the folder in which the commands run."
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(capsys):
    "Run a command: exit code, output, errors."
    def run(*argv):
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()
    return run


SEARCH = ("search", "--model", "model.safetensors", "--gallery", "crops", "--device", "cpu")
THRESHOLD = ("threshold", "--model", "model.safetensors", "--images", "folder:crops", "--device", "cpu")


def features(files):
    return domainmix.load("model.safetensors", device="cpu").embed(files)


def flags_of(command):
    "The flags of a command, as they are typed."
    kind = domainmix.commands.COMMANDS[command][0]
    return {"--" + name.replace("_", "-") for name in kind.__dataclass_fields__} | {"--help"}


def wrong(answer, command, *words):
    "A message with these words, no traceback, and only flags that the command has."
    import domainmix.commands  # noqa: F401
    code, _, error = answer
    assert code == 2 and all(w in error for w in words) and "Traceback" not in error, (code, error)
    named = {f for f in re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"`domainmix [^`]*`", "", error))}
    assert named <= flags_of(command), (named - flags_of(command), error)


def test_search_gives_the_order_of_all_similarities(place, said):
    files = sorted(Path("crops").iterdir())
    (place/"asked").mkdir()
    asked = [Path(shutil.copy(f, place/"asked")) for f in files[::6]]
    code, out, error = said(*SEARCH, "--query", "asked", "--top", 5, "--out", "found", "--pattern", NAMES)
    assert code == 0 and "8 queries" in out and "48 gallery images (8 identities, 3 cameras)" in out, (out, error)
    assert "8 gallery images are the same file as a query" in error
    S = features(asked) @ features(files).T
    S[np.arange(8), np.arange(48)[::6]] = -np.inf
    table = list(csv.DictReader(open("found/answers.csv")))
    assert {str(Path(r["path"]).parent) for r in table} == {"crops"}             # as it was given
    assert len(table) == 8 * 5 and list(table[0]) == ["query", "rank", "path", "similarity", "pid", "camera"]
    for q in range(8):
        rows = table[5*q:5*q + 5]
        assert [int(r["rank"]) for r in rows] == [1, 2, 3, 4, 5] and {Path(r["query"]).name for r in rows} == {asked[q].name}
        np.testing.assert_allclose([float(r["similarity"]) for r in rows], np.sort(S[q])[::-1][:5], atol=2e-6)
        for r in rows:
            name = Path(r["path"]).name
            assert abs(S[q, files.index(Path("crops")/name)] - float(r["similarity"])) < 2e-6
            assert (int(r["pid"]), int(r["camera"])) == (int(name[:2]), int(name[4]))
    record = json.loads(Path("found/answers.json").read_text())
    assert [(q["query"], a["path"]) for q in record["queries"] for a in q["answers"]] == [(r["query"], r["path"]) for r in table]
    assert Image.open("found/answers.png").format == "PNG"
    page = Path("found/answers.html").read_text()
    assert not re.search(r'<script|<link|(?:src|href)="(?!data:)|url\(|@import', page) and page.count("<img ") == 8 * 6


def test_only_new_images_are_embedded(place, said):
    def embedded():
        code, out, error = said(*SEARCH, "--query", "crops/" + sorted(os.listdir("crops"))[3], "--out", "a.json")
        assert code == 0, error
        record = json.loads(Path("a.json").read_text())
        [query] = record["queries"]
        q, g = features([query["query"]]), features([a["path"] for a in query["answers"]])
        np.testing.assert_allclose((q @ g.T)[0], [a["similarity"] for a in query["answers"]], atol=2e-6)
        return int(re.search(r"([\d,]+) images were embedded", out)[1]) - 1, record["gallery_images"]    # 1: the query
    one, two, three, *_ = sorted(Path("crops").iterdir())
    Image.open(two).save(two, format="BMP")                                      # any other such image is as large
    assert embedded() == (48, 48) and embedded() == (0, 48)
    os.remove(one)
    old = two.stat()
    Image.open(three).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(two, format="BMP")       # another image under an old name ...
    os.utime(two, ns=(old.st_atime_ns, old.st_mtime_ns))                         # ... that claims to be as old
    assert two.stat().st_size == old.st_size
    (place/"crops/sub").mkdir()
    write_images(place/"crops/sub/new", ["x.png"], toy_domain(1, 1, 1, size=(32, 16), seed=7)[0])
    assert embedded() == (2, 48)
    os.rename(three, place/"crops/renamed.png")
    assert embedded() == (0, 48)
    [store] = (place/"data/features").rglob("*.npz")
    assert len(load_arrays(store)["path"]) == 48                                 # what is gone has dropped out
    os.rename("crops", "elsewhere"), os.rename("elsewhere", "crops")
    store.write_bytes(store.read_bytes()[:5000])
    assert embedded() == (48, 48)                                                # a damaged store is made again


def test_images_of_more_than_eight_bits_are_read_by_one_range(place, monkeypatch):
    "Twelve-bit images, of which only one is bright: chunks, and images that come later, do not change what is read."
    crops = sorted((place/"crops").glob("*.png"))[:4]
    deep = place/"deep"
    deep.mkdir()
    for k, file in enumerate(crops):
        grey = np.asarray(Image.open(file).convert("L"), np.uint16)
        Image.fromarray(grey * (16 if k == 3 else 2)).save(deep/file.name)      # up to 4080, or 510
    model, store = domainmix.load(place/"model.safetensors"), place/"kept"
    all_at_once = model.embed([str(deep/f.name) for f in crops])
    monkeypatch.setattr(feature_store, "CHUNK", 1)
    (deep/crops[3].name).rename(place/"bright.png")
    before = feature_store.embed_files(model, feature_store.list_source(deep), store)
    (place/"bright.png").rename(deep/crops[3].name)
    for n_new in (4, 0):      # the range is another one: all are embedded again, once
        found = feature_store.embed_files(model, feature_store.list_source(deep), store)
        assert found.n_new == n_new and np.abs(found.features - all_at_once).max() < 1e-5
    assert np.abs(before.features - all_at_once[:3]).max() > 1e-3 and before.contents == found.contents[:3]


def test_cameras_in_a_search(place, said):
    files = sorted(Path("crops").iterdir())
    x, camera = features(files), np.array([int(f.name[4]) for f in files])
    assert said(*SEARCH, "--query", files[7], "--pattern", NAMES, "--other-cameras", "--top", 40, "--out", "a.json")[0] == 0
    found = [Path(a["path"]).name for a in json.loads(Path("a.json").read_text())["queries"][0]["answers"]]
    allowed = np.flatnonzero(camera != camera[7])
    assert len(found) == min(40, len(allowed)) and all(int(n[4]) != camera[7] for n in found)
    assert said(*SEARCH, "--query", "crops", "--pattern", NAMES, "--centre-cameras", "--top", 3, "--out", "b.json")[0] == 0
    centred = x.copy()
    for c in range(3):
        centred[camera == c] -= x[camera == c].mean(0)       # query and gallery are the same images: the same mean
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    S = centred @ centred.T
    np.fill_diagonal(S, -np.inf)
    for q, query in enumerate(json.loads(Path("b.json").read_text())["queries"]):
        np.testing.assert_allclose([a["similarity"] for a in query["answers"]], np.sort(S[q])[::-1][:3], atol=1e-4)


def test_camera_norms_in_a_search(place, said):
    shutil.copytree("crops", "some")
    Path("some/05_c1_99.png").write_bytes(b"no image")
    argv = "search", "--model", "model.safetensors", "--gallery", "some", "--query", "crops", "--pattern", NAMES, "--camera-norms"
    assert "05_c1_99.png" in said(*argv, "--out", "a.json")[2]
    assert said(*argv, "--skip-bad", "--top", 3, "--out", "a.json")[0] == 0
    files, model = sorted(Path("crops").iterdir()), load("model.safetensors", device="cpu")
    pixels = decode_list(list(map(str, files)), model.height, model.width, 0)
    x, = features_by_camera(model.net, [pixels], [np.array([int(f.name[4]) for f in files])], feature=model.feature, flip=model.flip)
    S, ordinary = x @ x.T, features(files)
    assert np.abs(S - ordinary @ ordinary.T).max() > .01
    np.fill_diagonal(S, -np.inf)
    for q, query in enumerate(json.loads(Path("a.json").read_text())["queries"]):
        np.testing.assert_allclose([a["similarity"] for a in query["answers"]], np.sort(S[q])[::-1][:3], atol=1e-4)
    assert not Path("data/features").exists()
    for file in Path("some").glob("*_c2_*"): file.write_bytes(b"no image")         # a camera without a readable image
    code, _, warned = said(*argv, "--skip-bad", "--top", 3, "--out", "b.json")
    assert code == 0 and warned.count("left out") == 1


def test_a_labelled_set_is_searched_by_its_query_and_gallery(place, said):
    market = f"market1501:{place/'market'}"
    code, out, _ = said("search", "--model", "model.safetensors", "--query", market, "--gallery", market, "--out", "a.csv")
    table = list(csv.DictReader(open("a.csv")))
    assert code == 0 and "24 queries (8 identities, 3 cameras); 24 gallery images" in out
    assert all("/query/" in r["query"] and "/bounding_box_test/" in r["path"] for r in table)
    one = table[0]["query"]
    code, out, _ = said("search", "--model", "model.safetensors", "--query", one, "--gallery", market, "--other-cameras", "--out", "b.csv")
    other = [r for r in csv.DictReader(open("b.csv"))]
    camera = int(re.search(r"_c(\d)", one)[1]) - 1
    assert code == 0 and {int(r["camera"]) for r in other} == {0, 1, 2} - {camera}      # what the set knows of its image


@pytest.mark.parametrize("more", [[], pytest.param(["--same-camera"], marks=pytest.mark.slow), pytest.param(["--centre-cameras"], marks=pytest.mark.slow)])
def test_a_threshold_is_that_of_scikit_learn(place, said, more):
    code, out, error = said(*THRESHOLD, "--pattern", NAMES, "--fmr", ".03", *more)
    assert code == 0, error
    found = json.loads(Path("model.threshold.json").read_text())
    files = sorted(Path("crops").iterdir())
    x, pid, camera = features(files), *(np.array([int(f.name[s]) for f in files]) for s in (slice(0, 2), slice(4, 5)))
    if "--centre-cameras" in more:
        for c in range(3):
            x[camera == c] -= x[camera == c].mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    i, j = np.triu_indices(48, 1)
    keep = camera[i] != camera[j] if "--same-camera" not in more else i >= 0
    same, similarity = (pid[i] == pid[j])[keep], (x[i] * x[j]).sum(1)[keep]
    fpr, tpr, t = roc_curve(same, similarity, drop_intermediate=False)
    assert (found["same_pairs"], found["different_pairs"]) == (same.sum(), (~same).sum())
    last = np.flatnonzero(fpr <= .03)[-1]
    assert abs(found["fmr"] - fpr[last]) < 3e-3 and abs(found["tpr"] - tpr[last]) < .02       # one pair may be rounded
    assert t[last + 1] - 1e-4 < found["threshold"] <= t[last] + 1e-4
    for rate, value in found["tpr_at"].items():
        assert abs(value - tpr[fpr <= float(rate)][-1]) < .02
    at = np.abs(fpr - 1 + tpr).argmin()
    assert abs(found["eer"] - (fpr + 1 - tpr)[at] / 2) < .01
    assert sum(found["same_histogram"]) == same.sum() and "0.0001" not in found["tpr_at"] and re.search("too few for .*0.0001", out)
    assert str(place) not in Path("model.threshold.json").read_text() and Path("model.threshold.png").is_file()


def test_same_keeps_what_reaches_the_threshold(place, said):
    wrong(said(*SEARCH, "--query", "crops", "--same", "--out", "f"), "search", "there is no threshold", "domainmix threshold")
    assert not Path("f").exists()
    assert said(*THRESHOLD, "--pattern", NAMES, "--fmr", ".05")[0] == 0
    limit = json.loads(Path("model.threshold.json").read_text())["threshold"]
    code, out, _ = said(*SEARCH, "--query", "crops", "--same", "--top", 47, "--out", "f.json")
    files = sorted(Path("crops").iterdir())
    S = features(files) @ features(files).T
    np.fill_diagonal(S, -np.inf)
    record = json.loads(Path("f.json").read_text())
    sure = np.abs(S - limit).min(1) > 1e-6
    counts = np.array([len(q["answers"]) for q in record["queries"]])
    assert code == 0 and (counts == (S >= limit).sum(1))[sure].all() and counts.min() < 47
    assert [q["nobody"] for q in record["queries"]] == (counts == 0).tolist()


def test_the_network_in_the_package_needs_no_training(place, said):
    "Each command with it, and nothing is written into the package."
    package = Path(domainmix.__file__).parent
    files = lambda: {str(f): f.stat().st_mtime_ns for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    there, on = files(), ("--device", "cpu")
    embed, threshold = ("embed", "--images", "folder:crops", "--out"), ("threshold", "--images", "folder:crops", "--pattern", NAMES)
    for model, command, *options in (
            ("builtin", *embed, "f.npy"), ("builtin", "evaluate", "--target", "market1501:market"), ("builtin", *threshold),
            ("builtin", "search", "--query", "crops", "--gallery", "crops", "--same", "--out", "g"),
            ("builtin", "tune", "--images", "folder:crops", "--out", "tuned.safetensors"), ("tuned.safetensors", *embed, "t.npy"),
            ("builtin-128", *embed, "larger.npy"), ("builtin-128", *threshold)):
        code, _, error = said(command, "--model", model, *options, *on)
        assert code == 0, (model, command, error)
    x, larger, tuned = np.load("f.npy"), np.load("larger.npy"), np.load("t.npy")
    pid = np.repeat(np.arange(8), 6)
    for f in (x, larger):
        assert f.shape == (48, 2304) and np.allclose(np.linalg.norm(f, axis=1), 1, atol=1e-4)
        assert (pid[(f @ f.T - 2 * np.eye(48)).argmax(1)] == pid).mean() > .8     # drawn people are told apart
    assert tuned.shape[0] == 48 and np.abs(x - larger).max() > .01                # two networks
    assert all(Path(f"data/{name}.threshold.json").is_file() for name in ("builtin", "builtin-128")) and files() == there


def test_nobody_is_said_and_all_files_are_whole(place, said):
    answer = said(*SEARCH, "--query", next(Path("crops").iterdir()), "--threshold", ".99999", "--out", "f")
    wrong(answer, "search", "nobody in the gallery resembles the query", "the best similarity is 0.")
    assert "nobody" in answer[1] and sorted(p.suffix for p in Path("f").iterdir()) == sorted(KINDS)
    assert json.loads(Path("f/answers.json").read_text())["queries"][0]["nobody"] and "nobody" in Path("f/answers.html").read_text()
    [row] = csv.DictReader(open("f/answers.csv"))
    assert (row["rank"], row["path"]) == ("0", "")


def test_the_threshold_of_another_model_is_refused(place, said):
    assert said(*THRESHOLD, "--pattern", NAMES)[0] == 0
    for more in ({}, {"net.width": 16}):           # other weights, another size
        config = configure({**SMALL, **more})
        save_net(build_backbone(config.net, 1), config, place/"other")
        shutil.copy("model.threshold.json", "other")
        other = ["search", "--model", "other", "--query", "crops", "--gallery", "crops", "--out", "f.csv"]
        wrong(said(*other, "--same"), "search", "another model")
        assert said(*other)[0] == 0                # its features are its own, whatever is kept of the first
    wrong(said(*SEARCH, "--query", "crops", "--same", "--feature", "neck", "--out", "g"), "search", "another model")
    wrong(said(*SEARCH, "--query", "crops", "--threshold", "crops", "--out", "g"), "search", "no threshold in crops")
    assert not Path("g").exists()


@pytest.mark.slow
def test_a_threshold_without_labels_says_so(place, said):
    code, out, _ = said(*THRESHOLD, "--pattern", r"c(?P<camera>\d)", "--out", "t", "--same-camera")
    assert code == 0 and "clusters in place of identities" in out and "the TPR is too good" in out
    code, out, error = said(*SEARCH, "--query", "crops", "--threshold", "t.json", "--out", "a.csv")
    assert code == 0 and "biased" in error


@pytest.mark.parametrize("flags, words", [
    (["--query", "nowhere"], ["no file or folder nowhere"]),
    (["--query", "crops", "--gallery", "nowhere"], ["no file or folder nowhere"]),
    (["--query", "empty"], ["empty contains no image"]),
    (["--query", "crops", "--gallery", "empty"], ["empty contains no image"]),
    (["--query", "crops", "--gallery", "market1501:empty"], ["empty is not Market-1501"]),
    (["--query", "crops", "--top", "0"], ["--top"]),
    (["--query", "crops", "--other-cameras"], ["no camera of the query", "--pattern"]),
    (["--query", "crops", "--centre-cameras", "--pattern", r"^(?P<pid>\d+)"], ["no camera of the query"]),
    (["--query", "crops", "--camera-norms"], ["no camera of the query", "--pattern"]),
    (["--query", "crops", "--camera-norms", "--pattern", NAMES, "--same"], ["measured without --camera-norms", "--threshold"]),
    (["--query", "crops", "--pattern", "x(?P<pid>y)"], ["does not match 48 of 48"]),
    (["--query", "crops", "--pattern", "("], ["not a valid regular expression"]),
    (["--query", "crops", "--index", "faiss"], ["faiss is not installed"]),
    (["--query", "crops", "--threshold", "nan"], ["the threshold is nan"]),
    (["--query", "crops", "--model", "nowhere"], ["no model in nowhere"]),
    (["--query", "crops", "--out", "model.safetensors/x"], ["is not a folder", "--out"]),
    (["--query", "bad"], ["1 of 3 images cannot be read: b.png", "--skip-bad"]),
    (["--query", "bad/b.png", "--skip-bad"], ["1 of 1 images cannot be read"])])
def test_a_search_that_cannot_be_done(place, said, flags, words, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    (place/"empty").mkdir(), (place/"bad").mkdir()
    for name, file in zip("ac", Path("crops").iterdir()):
        shutil.copy(file, place/f"bad/{name}.png")
    (place/"bad/b.png").write_text("no image")
    argv = [*SEARCH, *flags] if "--out" in flags else [*SEARCH, "--out", "f", *flags]
    wrong(said(*argv), "search", *words)
    assert not (place/"f").exists()


@pytest.mark.parametrize("flags, words", [
    (["--pattern", r"(?P<pid>^0)"], ["no pair of different people"]),
    (["--pattern", r"_(?P<pid>\d+)\.png"], ["no pair of images of one person"]),
    (["--pattern", r"(?P<pid>\d+)_c(?P<camera>\d)", "--fmr", "0"], ["--fmr between 0 and 1"]),
    (["--pattern", NAMES, "--fmr", "1e-7"], ["cannot be measured on", "--fmr"]),
    (["--pattern", r"0(?P<pid>(?P<camera>\d))_"], ["no pair of images of one person across cameras", "--same-camera"]),
    (["--labels", "true"], ["no identity is known", "--pattern"]),
    (["--centre-cameras"], ["no camera is known", "--pattern"]),
    (["--images", "nowhere"], ["no file or folder nowhere"]),
    (["--images", "market1501:market", "--pattern", NAMES], ["the file names of this data set are known", "--pattern"]),
    (["--out", "crops"], []),
    (["--images", "one"], ["1 images", "more images"])])
def test_a_threshold_that_cannot_be_measured(place, said, flags, words):
    (place/"one").mkdir()
    shutil.copy(next(Path("crops").iterdir()), place/"one")
    (place/"crops.json").mkdir()
    wrong(said(*THRESHOLD, *flags), "threshold", *words)
    assert not list(place.glob("*.threshold.*"))


def test_a_damaged_network_writes_nothing(place, said):
    config = configure(SMALL)
    net = build_backbone(config.net, 0)
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    save_net(net, config, place)
    wrong(said(*SEARCH, "--query", "crops", "--out", "f"), "search", "gives no usable feature", "NaN")
    wrong(said(*THRESHOLD, "--pattern", NAMES), "threshold", "gives no usable feature")
    assert not Path("f").exists() and not list(place.rglob("*.npz")) and not list(place.glob("*.threshold.*"))


@pytest.mark.parametrize("change", [os.remove, lambda f: Path(f).write_bytes(Path(f).read_bytes() + b"\0")])
def test_a_gallery_that_changes_during_a_search(place, said, monkeypatch, change):
    decode, victim = feature_store.decode_files, sorted(Path("crops").iterdir())[5]

    def while_decoding(files, out, **more):
        if len(files) > 1:
            change(victim)
        return decode(files, out, **more)
    monkeypatch.setattr(feature_store, "decode_files", while_decoding)
    answer = said(*SEARCH, "--query", sorted(Path("crops").iterdir())[0], "--out", "f")
    wrong(answer, "search", "while the folder was read", victim.name)
    assert not Path("f").exists()


def test_a_tampered_store_is_not_believed(place, said):
    assert said(*SEARCH, "--query", sorted(Path("crops").iterdir())[0], "--out", "f.csv")[0] == 0
    [store] = (place/"data/features").rglob("*.npz")
    table = load_arrays(store)
    for features in (table["features"] * np.nan, table["features"][:, :5], table["features"][:9]):
        save_arrays(store, **{**table, "features": features})
        code, out, error = said(*SEARCH, "--query", sorted(Path("crops").iterdir())[0], "--out", "f.csv")
        assert code == 0 and "damaged" in error and "49 images were embedded" in out


def test_more_answers_than_images(place, said):
    code, out, error = said(*SEARCH, "--query", next(Path("crops").iterdir()), "--top", 99, "--out", "a.json")
    assert code == 0 and "the gallery has 48 images" in error
    assert len(json.loads(Path("a.json").read_text())["queries"][0]["answers"]) == 47


def test_odd_file_names(place, said):
    names = ["<script>alert(1)<.png", 'a "b", c.png', "ü ñ.png", os.fsdecode(b"\xff.png"), "two\nlines.png"]
    for name, file in zip(names, sorted(Path("crops").iterdir())):
        shutil.copy(file, place/"market"/name.replace("/", ""))
        shutil.copy(file, place/"odd.png")
    (place/"odd").mkdir()
    for name in names:
        os.rename(place/"market"/name, place/"odd"/name)
    for _ in range(2):
        code, out, error = said(*SEARCH, "--query", "odd", "--gallery", "odd", "--top", 3, "--out", "f")
        assert code == 0, error
    assert "0 images were embedded" in out
    page = Path("f/answers.html").read_text()
    assert "<script" not in page and "&lt;script" in page
    table = list(csv.DictReader(open("f/answers.csv", newline="", encoding="utf-8", errors="surrogateescape")))
    assert {Path(r["path"]).name for r in table} == set(names)


def test_search_from_python(place):
    model = domainmix.load("model.safetensors", device="cpu")
    files = sorted(Path("crops").iterdir())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = domainmix.search(model, str(files[4]), "crops", top=3)
    assert len(seen) == 1 and found.index.shape == (1, 3) and files[4].name not in [found.gallery.names[i] for i in found.index[0]]
    threshold = domainmix.find_threshold(model, "crops", .05, pattern=NAMES)
    in_memory = domainmix.search(model, Image.open(files[4]), files, top=48, threshold=threshold.threshold, data=None)
    similarity = features([files[4]]) @ features(files).T
    assert (in_memory.index >= 0).sum() == (similarity >= threshold.threshold).sum()
    assert gallery.__name__ == "domainmix.gallery" and callable(domainmix.search)


def test_embed_writes_what_is_known(place, said):
    code, out, error = said("embed", "--model", "model.safetensors", "--images", "folder:crops", "--pattern", NAMES, "--out", "f.npy")
    table = list(csv.DictReader(open("f.csv")))
    assert code == 0 and list(table[0]) == ["path", "pid", "camera"] and len(table) == 48, error
    for row in table:
        assert (row["pid"], row["camera"]) == (str(int(Path(row["path"]).name[:2])), Path(row["path"]).name[4])
    wrong(said("embed", "--model", "model.safetensors", "--images", "folder:crops", "--deepsort", "d", "--out", "g.npy"), "embed", "no boxes.csv")
    assert not Path("g.npy").exists()
    names = sorted(os.listdir("crops"))
    rows = [f"{n},{n[4]},{n[:2]},{100 - i},{i},2,30,60,0.5" for i, n in enumerate(names)]
    Path("crops/boxes.csv").write_text("\n".join(["path,camera,track,frame,left,top,width,height,score", *rows]))
    code, out, error = said("embed", "--model", "model.safetensors", "--images", "folder:crops", "--deepsort", "d", "--out", "g.npy")
    arrays = [np.load(f"d/c{c}.npy") for c in range(3)]
    assert code == 0 and sum(map(len, arrays)) == 48, error
    x = np.load("g.npy")
    for c, array in enumerate(arrays):
        assert array.shape[1] == 10 + x.shape[1] and (np.diff(array[:, 0]) >= 0).all() and (array[:, 7:10] == -1).all()
        for row in array:
            i = 100 - int(row[0])
            assert names[i][4] == str(c) and row[2] == i and (row[10:] == x[i]).all() and row[1] == int(names[i][:2])


def test_every_command_parses():
    assert parse_command(["search", "--model", "m", "--query", "q", "--gallery", "g"])[1].top == 10
    assert parse_command(["threshold", "--model", "m", "--images", "i"])[1].fmr == .01


@pytest.mark.parametrize("flags", [("embed", "--images", "folder:crops", "--out"), ("embed", "--images", "folder:crops", "--deepsort"),
                                   ("tune", "--images", "folder:crops", "--pattern", NAMES, "--out"), THRESHOLD[:1] + THRESHOLD[3:5] + ("--out",)])
def test_an_output_that_cannot_be_written_is_found_before_the_work(place, said, monkeypatch, flags):
    "A folder of the path is a file."
    (place/"file").write_text("")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a network was run"))
    shutil.copytree("crops", "boxed"), (place/"boxed/boxes.csv").write_text("file,camera,track,frame,left,top,width,height,score\n")
    flags = tuple(f.replace("folder:crops", "crops:boxed") for f in flags) if "--deepsort" in flags else flags
    code, _, error = said(*flags, "file/inside/out", "--model", "model.safetensors", "--device", "cpu")
    assert code == 2 and "file" in error and "folder" in error and "Traceback" not in error, (code, error)
    assert (place/"file").read_text() == ""


def test_odd_names_in_the_terminal(place, said):
    "A line end in a name, a link to the folder itself: each answer is one line, and the link is not followed."
    shutil.move("crops/00_c0_0.png", "crops/new\nline.png"), os.symlink(place/"crops", place/"crops/loop")
    code, out, _ = said(*SEARCH, "--query", "crops/new\nline.png", "--out", "r", "--top", "60")
    assert code == 0 and "'new\\nline.png'" in out.replace('"', "'") and "new\nline" not in out
    with open("r/answers.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 47
