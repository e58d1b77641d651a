"""Whatever is given, the answer is right or a `DomainMixError` that names the file; nothing is run, nothing is written elsewhere.

DOMAINMIX_FUZZ=10 takes ten times as many examples, and other ones each time.
"""
import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

from domainmix import card, checkpoint as checkpoints, core, datasets, files, inference, layouts, pseudolabel, records
from domainmix.runs import settings as run_settings, stages, tables
from domainmix.views import charts, figures, report, rerun, results, widgets
from domainmix.bodies import BackboneConfig
from domainmix.backbone import build_backbone
from domainmix.images import load_images
from domainmix.runs.folder import Stage, run_stage
from domainmix.core import DomainMixError, expect_error, to_dict
from domainmix.files import load_json, save_json, save_weights
from domainmix.datasets import read_dataset, read_folder
from domainmix.readers import read_msmt17, write_market1501, write_msmt17
from forks import run_code

TIMES = float(os.environ.get("DOMAINMIX_FUZZ", 1))
COUNTED = Counter()     # examples by target
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def fuzz(examples, deadline=20_000):
    "So many examples of at most `deadline` milliseconds; the same each time, unless more are asked for."
    return settings(max_examples=max(1, round(examples * TIMES)), deadline=deadline, derandomize=TIMES == 1, database=None,
                    suppress_health_check=list(HealthCheck))


# What is watched: starting programs, writing, the network.

STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "subprocess.Popen", "socket.connect", "webbrowser.open", "ctypes.dlopen")
MOVES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree", "shutil.move")
watched = threading.local()


def watch(event, args):
    "An audit hook: notes what code inside `harmless` does that it must not."
    if getattr(watched, "folder", None) is None:
        return
    if event in STARTS:
        watched.seen.append((event, str(args)[:200]))
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    if event in MOVES or writes:
        for path in args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]:
            place = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if place and place != os.devnull and "__pycache__" not in place and os.path.commonpath([place, watched.folder]) != watched.folder:
                watched.seen.append((event, place))


sys.addaudithook(watch)


@contextlib.contextmanager
def little_memory(more=3 * 2**30):
    "Room for `more` bytes of addresses: a file of a few kilobytes has no right to them."
    try:
        import resource
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


REFUSED = object()


def tried(target, call, folder, *names):
    "What `call` gives, or REFUSED; its error must be a DomainMixError that has one of `names`, and all that is watched must be quiet."
    COUNTED[target] += 1
    watched.seen, watched.folder = [], os.path.realpath(folder)
    try:
        with little_memory():
            return call()
    except DomainMixError as e:
        said = str(e)
        assert said.encode("utf-8", "strict"), "cannot be printed"
        assert not names or any(n in said for n in names), f"names none of {names}:\n{said[:600]}"
        return REFUSED
    finally:
        watched.folder = None
        assert not watched.seen, watched.seen


class Bomb:
    "Unpickled, it runs a program."
    def __init__(self, call=os.system, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def bombs(marker):
    "Objects that would leave `marker` behind if they were unpickled."
    yield Bomb(os.system, f"echo > {marker}")
    yield Bomb(eval, f"open({str(marker)!r}, 'w')")
    yield Bomb(exec, f"open({str(marker)!r}, 'w')")
    yield Bomb(subprocess.call, ["touch", str(marker)])
    yield Bomb(open, str(marker), "w")
    yield {"key": Bomb(os.system, f"echo > {marker}"), "history": [], "parts": {}}
    yield {"state_dict": {"conv1.weight": Bomb(os.system, f"echo > {marker}")}}


# Damage.

spot = st.floats(0, 1, exclude_max=True)
wounds = st.lists(st.one_of(
    st.tuples(st.just("flip"), spot, st.integers(0, 7)),
    st.tuples(st.just("cut"), spot, st.just(0)),
    st.tuples(st.just("put"), spot, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("insert"), spot, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("zero"), spot, st.integers(1, 400)),
    st.tuples(st.just("head"), spot, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("all"), spot, st.binary(max_size=200))), min_size=1, max_size=3)


def damaged(whole, how):
    "The bytes `whole` after all that is in `how` was done to them."
    b = bytearray(whole)
    for kind, where, what in how:
        i = int(where * len(b))
        if kind == "flip" and b:
            b[i] ^= 1 << what
        elif kind == "cut":
            del b[i:]
        elif kind == "put":
            b[i:i + len(what)] = what
        elif kind == "insert":
            b[i:i] = what
        elif kind == "zero":
            b[i:i + what] = bytes(len(b[i:i + what]))
        elif kind == "head":                        # where the lengths and the shapes stand
            i = int(where * min(len(b), 200))
            b[i:i + len(what)] = what
        elif kind == "all":
            b = bytearray(what)
    return bytes(b)


text = st.one_of(st.text(max_size=8), st.sampled_from(["", ".", "..", "../../out", "/etc/passwd", "a/b", "\0", "a\0b", "\ud800", "x" * 300, "a" * 5000, "$\\frac$",
                                                       "<img src=x onerror=alert(1)>", "</script>", "nan", "1e999", "stage1", "world", "folder:", "folder:\0", "folder:~nobody1/x", "timm:x"]))
DEEP = (50, 200, 900, 960, 990, 5000)
deep = st.sampled_from([f"DEEP{n}" for n in DEEP])
scalar = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([10**18, -10**18, 10**25, 10**400, 2**63, 1e308, 1e999, -1e999, float("nan"), 0.5, -0.0]), text)
anything = st.one_of(scalar, st.recursive(scalar, lambda s: st.one_of(st.lists(s, max_size=4), st.dictionaries(text, s, max_size=4)), max_leaves=8), deep)


def as_json(value):
    "JSON text of `value`, with what Python's own reader takes besides: NaN, Infinity, lone surrogates, nesting without end."
    said = json.dumps(value)
    for n in DEEP:
        said = said.replace(f'"DEEP{n}"', "[" * n + "]" * n)
    return said


def pictures(n, seed=0, size=(16, 8)):
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=core.generator(seed, "pictures"))


# Readers.

pieces = st.lists(st.one_of(text, st.sampled_from(["0001", "0001_000_01_x.jpg", "0001/0001_000_01_x.jpg", " 1", "\t7", "1", "-1", "\n", "\r\n", "\r", "\x85", "\u2028", "\ufeff", "../", "//", "/", "\\", "C:", "link/"]),
                            st.binary(max_size=4).map(lambda b: b.decode("utf-8", "surrogateescape"))), max_size=12).map("".join)


@contextlib.contextmanager
def changed(file, content):
    "`file` holds `content` inside; afterwards what it held before."
    before = file.read_bytes() if file.is_file() else None
    file.write_bytes(content)
    try:
        yield file
    finally:
        file.write_bytes(before) if before is not None else file.unlink()


def raw(said):
    "Text as bytes, lone surrogates and all."
    return said.encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def msmt(tmp_path_factory):
    root = tmp_path_factory.mktemp("lists") / "set"
    write_msmt17(root, pictures(3), [1, 1, 1], [0, 1, 0], records.SPLITS)
    (root / "train/link").symlink_to(root.parent)
    (root.parent / "0001_000_01_x.jpg").touch()
    return root


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    root = tmp_path_factory.mktemp("counts") / "set"
    write_market1501(root, pictures(2), [1, 2], [0, 1])
    return root


@fuzz(80)
@given(pieces, st.sampled_from(sum(layouts.LIST_FILES.values(), ())), st.booleans())
@example("0001/0001_000_01_x.jpg 99999999999999999999\n", "list_train.txt", True)
@example("link/0001_000_01_x.jpg 1\n", "list_train.txt", True)
def test_lists_of_msmt17(msmt, lines, name, more):
    before = (msmt / name).read_bytes() if more and (msmt / name).is_file() else b""
    with changed(msmt / name, before + raw(lines)):
        found = tried("lists of MSMT17", lambda: read_msmt17(msmt), msmt.parent, "list_", "MSMT17", "0001_")
    if found is not REFUSED:
        for r in found.splits.values():
            assert all(os.path.realpath(f).startswith(os.path.realpath(msmt) + os.sep) for f in r.files()) and (r.camera >= -1).all() and (r.pid >= 0).all()


@fuzz(48)
@given(anything, st.sampled_from(["all", "counts", "train", "pair", "cameras"]))
@example([], "all")
@example({}, "all")
@example("x", "counts")
@example([[1]], "train")
@example(10**400, "cameras")
@example(float("nan"), "cameras")
def test_counts_json(market, value, where):
    said = {"counts": {"train": [[2, 2]], "query": [], "gallery": []}, "cameras": 2}
    if where == "train":
        said["counts"]["train"] = value
    elif where == "pair":
        said["counts"]["train"] = [[value, value]]
    elif where != "all":
        said[where] = value
    with changed(market / "counts.json", raw(as_json(value if where == "all" else said))):
        found = tried("counts.json", lambda: read_dataset(f"market1501:{market}"), market, "counts.json", "Market-1501")
    assert found is REFUSED or found.train.pid.tolist() == [1, 2]


@fuzz(40)
@given(wounds)
def test_counts_json_damaged(market, how):
    with changed(market / "counts.json", damaged((market / "counts.json").read_bytes(), how)):
        found = tried("counts.json", lambda: read_dataset(f"market1501:{market}"), market, "counts.json", "Market-1501")
    assert found is REFUSED or found.train.pid.tolist() == [1, 2]


grammar = st.lists(st.one_of(st.sampled_from(["(?P<pid>", "(?P<camera>", "(?P<x>", "(", "(?:", "(?=", "(?<=", "(?<!", ")", "+", "*", "?", "{2,}", "{99999999999999}", "{1,9}", "+?", "++", "|", ".", "a", "[a-z]", "[^/]", "[",
                                              "\\d", "\\w", "\\1", "(?P=pid)", "(?i)", "(?L)", "\\N{DIGIT ONE}", "$", "^", "/", "_c", "(a+)+", "(?P<pid>(a+)+)$", "(?P<pid>\\d+)", "(?P<camera>\\w+)"]), text), max_size=10).map("".join)
SLOW = ["a" * 60 + "!/1.jpg", "a" * 60 + "b_c1.jpg", "gate/person12_c3.jpg", "query/1_a.jpg", "gallery/1_b.jpg", "gallery/2_b.jpg", "\u0663_c\u0661.jpg"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    root = tmp_path_factory.mktemp("crops")
    for name in SLOW:
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 4)).save(root / name)
    return root


@fuzz(80)
@given(grammar)
@example("(?P<pid>(a+)+)$")
@example("(?P<pid>(a|a)*b)c")
@example("(" * 3000)
@example("(?P<pid>" + "(" * 400 + ")" * 400 + ")")
@example("(?P<pid>a{99999999999999999999})")
@example("(?P<pid>\\d{1,30})")
def test_patterns(crops, pattern):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(datasets, "PATTERN_TIMEOUT", .3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tried("patterns", lambda: read_folder(crops, pattern=pattern), crops, "pattern")
    if found is not REFUSED:
        assert sum(map(len, found.splits.values())) <= len(SLOW) and all(r.pid.dtype == np.int64 for r in found.splits.values())


def test_a_pattern_without_end_is_broken_off_and_the_clock_given_back(crops, monkeypatch):
    import signal
    monkeypatch.setattr(datasets, "PATTERN_TIMEOUT", .2)
    before = signal.getsignal(signal.SIGALRM)
    expect_error(lambda: read_folder(crops, pattern=r"(?P<pid>(a+)+)$"), "within 0.2 s", "repetition")
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    read_folder(crops, pattern=r"person(?P<pid>\d+)")
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


names = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=30)
layouts = st.sampled_from([*datasets.READERS, "unheard-of"])
folders = st.lists(st.one_of(names, st.sampled_from(["bounding_box_train", "query", "bounding_box_test", "detected", "labeled", "train", "test", "mask_train_v2", "list_train.txt", "list_query.txt", "scene0", "0001_c1s1_000001_00.jpg",
                                                     "0001_c1_2.png", "000000_s00_c00_f000001.jpg", "000000_s99_c9999_f1.jpg", "9999999999_c1s1_1_1.jpg", "\u0661_c\u0661s\u0661_1_1.jpg"])), min_size=1, max_size=3).map("/".join)


@fuzz(48)
@given(layouts, st.lists(st.tuples(folders, st.sampled_from(["file", "folder", "link", "circle", "away"])), max_size=6))
@example("folder", [("a.jpg", "circle"), ("b", "circle"), ("c", "away"), ("d.jpg", "away")])
@example("market1501", [("bounding_box_train", "circle")])
@example("msmt17", [("list_train.txt", "folder"), ("train", "circle")])
@example("randperson", [("000000_s99_c9999_f1.jpg", "file")])
def test_folders(layout, laid):
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp) / "set"
        root.mkdir()
        (Path(tmp) / "away").mkdir()
        for name, kind in laid:
            with contextlib.suppress(OSError):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                if kind == "file":
                    (root / name).touch()
                elif kind == "folder":
                    (root / name).mkdir()
                else:
                    (root / name).symlink_to({"link": root, "circle": (root / name).name, "away": Path(tmp) / "away"}[kind])
        found = tried("folders", lambda: read_dataset(f"{layout}:{root}"), tmp)
        assert found is REFUSED or found.splits


# Config files.

def paths_of(settings, prefix=""):
    "Dotted names of all settings."
    for k, v in settings.items():
        yield prefix + k
        if isinstance(v, dict):
            yield from paths_of(v, f"{prefix}{k}.")


SETTINGS = sorted(paths_of(to_dict(run_settings.RunConfig()))) + ["", ".", "net.", ".net", "net..width", "backbone.x", "seed.0", "methods", "seeds", "inputs", "version"]


def at(config, name):
    "The setting with a dotted name."
    for part in name.split("."):
        config = getattr(config, part)
    return config


def opened(target, file):
    "What a config file says, looked at as a run does before it reads a picture."
    config = tried(target, lambda: run_settings.load_config(file), file.parent, file.name)
    if config is REFUSED:
        return REFUSED
    config, more = config
    save_json(file.with_name("again.json"), {**to_dict(config), **more})
    assert run_settings.load_config(file.with_name("again.json"))[0] == config
    checked = tried(target, lambda: run_settings.validate_config(config), file.parent)
    if checked is not REFUSED:
        assert run_settings.run_folder(checked).parent == Path(checked.data) / "runs" and checked.run not in ("", ".", "..")
    return config, more


@fuzz(120)
@given(st.lists(st.tuples(st.sampled_from(SETTINGS), anything), min_size=1, max_size=4), st.booleans())
@example([("backbone", None)], False)
@example([("backbone", [])], False)
@example([("stage2.lr", 10**400)], False)
@example([("stage2.lr", float("nan"))], False)
@example([("stage2.lr", "DEEP960")], False)
@example([("seeds", ["../../x"])], False)
@example([("methods", 3)], False)
@example([("inputs", 3)], False)
@example([("run", "a\0b"), ("real", "world")], False)
@example([("run", "x" * 300), ("real", "world")], False)
@example([("net.weights", "a" * 5000)], False)
@example([("real", "\ud800")], False)
def test_settings(changes, nested):
    values = {}
    for name, value in changes:
        inner = values
        *parents, last = name.split(".") if nested else [name]
        for p in parents:
            inner = inner.setdefault(p, {})
            if not isinstance(inner, dict):
                inner = {}
        inner[last] = value
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "settings.json"
        file.write_bytes(raw(as_json(values)))
        found = opened("settings", file)
        if found is not REFUSED and not nested and len(changes) == 1 and changes[0][0] not in (*run_settings.META_KEYS, "backbone"):
            name, value = changes[0]
            if not isinstance(value, (dict, list)):
                assert at(found[0], name) in (value, float(value) if isinstance(value, int) else value)


@fuzz(40)
@given(wounds)
@example([("all", 0, b"\xff\xfe{}")])
@example([("all", 0, b"[]")])
@example([("all", 0, b"")])
@example([("all", 0, b'{"seed": 1, "seed": 2}')])
def test_config_damaged(how):
    with tempfile.TemporaryDirectory() as tmp:
        file = save_json(Path(tmp) / "settings.json", {**to_dict(run_settings.configure(run_settings.TINY_SETTINGS, real="world", target="world")), "seeds": [0, 1], "methods": ["only-a"]})
        file.write_bytes(damaged(file.read_bytes(), how))
        opened("config, damaged", file)


def test_config_of_another_editor(tmp_path):
    "A byte order mark is no fault; of a setting given twice, the last counts, as in every JSON reader of Python."
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"seed": 1, "seed": 2}')
    assert run_settings.load_config(tmp_path / "a.json")[0].seed == 2


@fuzz(40)
@given(st.dictionaries(st.sampled_from(["name", "presets", "seeds", "settings", "x"]), anything, max_size=4), anything, st.integers(0, 9))
@example({"name": "../../out", "presets": ["world"]}, 0, 1)
@example({"presets": [None]}, 0, 1)
@example({"presets": ["world"], "seeds": ["../x"]}, 0, 1)
@example({"presets": ["world"], "settings": {"backbone": 3}}, 0, 1)
def test_table_files(values, other, which):
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "mine.json").write_bytes(raw(as_json(values if which else other)))
        spec = tried("table files", lambda: tables.load_table(Path(tmp) / "mine.json"), tmp, "mine.json", "run's name")
        if spec is REFUSED:
            return
        assert all(isinstance(p, str) for p in spec.presets) and all(type(s) is int for s in spec.seeds)
        with pytest.MonkeyPatch.context() as m:       # no cell is done: only what is around it
            m.setattr(tables, "run_methods", lambda config, methods, seeds, *a, **k: [{"method": n, "seed": s, "error": "not done"} for n in methods for s in seeds])
            rows = tried("table files", lambda: tables.run_table(spec, Path(tmp) / "data", tell=lambda line: None), tmp)
        if rows is not REFUSED:
            assert tables.summary_html(rows, spec.name) and len(list((Path(tmp) / "data/runs").iterdir())) == 1


# Caches of decoded pictures.

@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "Six pictures, of which one is none; the folder of their cache; what is right."
    root = tmp_path_factory.mktemp("cache")
    write_market1501(root / "set", pictures(6), [1, 1, 1, 2, 2, 2], [0, 1, 0, 1, 0, 1])
    sorted((root / "set").rglob("*.jpg"))[2].write_bytes(b"no picture")
    records = read_dataset(f"market1501:{root}/set").train
    images, kept = load_images(records, 16, 8, cache=root / "cache", skip_bad=True)
    return records, root / "cache", images.clone(), kept.path.tolist()


def cached_right(cache, file, content):
    "What is read from a cache in which `file` holds `content` is right."
    records, folder, right, paths = cache
    before = {f: f.read_bytes() for f in folder.iterdir()}
    file.write_bytes(content)
    try:
        found = tried("caches", lambda: load_images(records, 16, 8, cache=folder, skip_bad=True), folder)
        assert found is not REFUSED and found[1].path.tolist() == paths and torch.equal(found[0], right)
    finally:
        for f in folder.iterdir():
            f.unlink()
        for f, b in before.items():
            f.write_bytes(b)


@fuzz(24)
@given(st.sampled_from([".json", ".npy"]), wounds)
@example(".json", [("all", 0, b"[]")])
@example(".json", [("all", 0, b'{"bad": []}')])
@example(".json", [("all", 0, b'{"bad": {"1": "no picture"}}')])
@example(".json", [("all", 0, b'{"bad": {"99": "no picture"}}')])
@example(".npy", [("all", 0, b"")])
@example(".npy", [("insert", .9, b"abc")])
@example(".npy", [("flip", .9, 3)])
def test_cache_damaged(cache, suffix, how):
    file = next(cache[1].glob(f"*{suffix}"))
    cached_right(cache, file, damaged(file.read_bytes(), how))


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(said, version=1):
    said = said.encode("latin1") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(said)) + said + bytes(1920)


HEADERS = ["{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 3, 1000, 1000), }", "{'descr': '|u1', 'fortran_order': True, 'shape': (5, 3, 16, 8), }",
           "{'descr': '|O', 'fortran_order': False, 'shape': (5, 3, 16, 8), }", "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 3, 16, 8), }",
           "(" * 500, "{'descr': '|u1'", "__import__('os')", "'" * 3, "", "{'descr': '|u1', 'fortran_order': False, 'shape': (5.0, 3, 16, 8), }",
           "{'descr': '<M8[xx]', 'fortran_order': False, 'shape': (5,), }", "{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (5,), }"]


def test_cache_with_another_header(cache):
    for version in (1, 2, 3):
        for said in HEADERS:
            file = next(cache[1].glob("*.npy"))
            cached_right(cache, file, npy_header(said, version))


def test_cache_with_another_array(cache, tmp_path):
    file = next(cache[1].glob("*.npy"))
    shapes = [((5, 3, 16, 8), float), ((6, 3, 16, 8), np.uint8), ((5, 3, 8, 16), np.uint8), ((), np.uint8), ((5, 3, 16, 8), "S1"), ((5, 3, 16, 8), bool), ((0, 3, 16, 8), np.uint8)]
    for shape, kind in shapes:
        cached_right(cache, file, npy(np.zeros(shape, kind)))
    cached_right(cache, file, npy(np.array([Bomb(os.system, f"echo > {tmp_path}/ran")])))
    cached_right(cache, file, pickle.dumps(Bomb(os.system, f"echo > {tmp_path}/ran")))
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    cached_right(cache, file, archive.getvalue())
    assert not list(tmp_path.iterdir())


# Checkpoints.

KEY = {"stage": "stage2", "config": {"lr": .1, "p": 4}, "data": "0123456789ab"}


def parts():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    net(torch.ones(2, 3)).sum().backward()
    optimiser.step()
    return dict(net=net, optimiser=optimiser)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    saved = parts()
    checkpoints.save_checkpoint(folder / "last.ckpt", KEY, saved, [{"stage": "stage2", "epoch": 1, "iterations": 3, "loss": .5}])
    return folder / "last.ckpt", {k: v.clone() for k, v in saved["net"].state_dict().items()}


ANEW = [], {}   # nothing of a checkpoint is used


def resumed(file, right):
    "A checkpoint is taken up as it was, left aside, or refused by name."
    fresh = parts()
    found = tried("checkpoints", lambda: checkpoints.load_checkpoint(file, KEY, fresh), file.parent, "last.ckpt")
    if found is not REFUSED and found != ANEW:
        assert found == ([{"stage": "stage2", "epoch": 1, "iterations": 3, "loss": .5}], {}) and all(torch.equal(v, right[k]) for k, v in fresh["net"].state_dict().items())


@fuzz(60)
@given(wounds)
@example([("flip", .5, 0)])
@example([("all", 0, b"")])
def test_checkpoint_damaged(checkpoint, how):
    file, right = checkpoint
    with changed(file, damaged(file.read_bytes(), how)):
        resumed(file, right)


shaped = st.recursive(st.one_of(scalar.filter(lambda v: v == v), st.sampled_from([torch.zeros(2), torch.zeros(4, 3)])),
                      lambda s: st.one_of(st.lists(s, max_size=3), st.dictionaries(st.one_of(text, st.integers(0, 3)), s, max_size=3)), max_leaves=6)


@fuzz(24)
@given(st.sampled_from(["all", "key", "history", "parts", "net", "optimiser", "state", "weight", "line", "midway", "meter"]), shaped)
@example("all", [])
@example("key", 3)
@example("history", [{}])
@example("net", None)
@example("weight", torch.zeros(4, 3).to_sparse())
def test_checkpoint_of_other_contents(checkpoint, where, value):
    file, right = checkpoint
    state = files.load_state(file)
    if where in ("key", "history", "parts", "midway"):
        state[where] = value
    elif where in ("net", "optimiser"):
        state["parts"][where] = value
    elif where == "state":
        state["parts"]["optimiser"]["state"] = value
    elif where == "weight":
        state["parts"]["net"]["0.weight"] = value
    elif where == "meter":
        state["midway"] = dict(meter=value, parts={})
    elif where == "line":
        state["history"] = [value]
    whole = io.BytesIO()
    torch.save(value if where == "all" else state, whole)
    with changed(file, whole.getvalue()):
        taken = tried("checkpoints", lambda: checkpoints.StageRun("stage2", 1, 9, KEY, parts(), file.parent), file.parent, "last.ckpt")
        if taken is not REFUSED:
            taken.bar.close()


def test_checkpoint_that_prints_without_end(checkpoint):
    "Lists that hold one another are small in a file and endless in print."
    file, _ = checkpoint
    state, endless = files.load_state(file), []
    for _ in range(18):
        endless = [endless, endless]
    state["key"]["data"] = endless
    whole = io.BytesIO()
    torch.save(state, whole)
    with changed(file, whole.getvalue()):
        with pytest.raises(DomainMixError, match="last.ckpt belongs to another run") as e:
            checkpoints.load_checkpoint(file, KEY, parts())
    assert len(str(e.value)) < 5_000


def packed(value, form):
    "`value` as a file: torch's archive, torch's older form, or a plain pickle."
    if form == "pickle":
        return pickle.dumps(value)
    whole = io.BytesIO()
    torch.save(value, whole, _use_new_zipfile_serialization=form == "zip")
    return whole.getvalue()


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_nothing_is_unpickled(tmp_path, form):
    marker, folder = tmp_path / "ran", tmp_path / "files"
    folder.mkdir()
    readers = {"last.ckpt": [files.load_state, lambda f: checkpoints.load_checkpoint(f, KEY, parts())], "weights.pth": [lambda f: build_backbone(BackboneConfig(weights=str(f)))],
               "model.safetensors": [stages.load_net], "features.npy": [results.read_features], "labels.npz": [pseudolabel.load_labels], "stage.json": [files.load_json]}
    for bomb in bombs(marker):
        for name, calls in readers.items():
            for content in (packed(bomb, form), npy(np.array([bomb], object))):
                (folder / name).write_bytes(content)
                for call in calls:
                    assert tried("bombs", lambda: call(folder / name), folder, name) in (REFUSED, ANEW)
        with open(folder / "labels.npz", "wb") as f:
            np.savez(f, path=np.array([bomb], object), camera=[0], label=[0], before=[0], reliable=[True])
        assert tried("bombs", lambda: pseudolabel.load_labels(folder / "labels.npz"), folder, "labels.npz") is REFUSED
        assert not marker.exists()


def test_the_bombs_go_off(tmp_path):
    "Where they are unpickled: else the test above would say nothing."
    for bomb in list(bombs(tmp_path / "ran"))[:5]:
        pickle.loads(pickle.dumps(bomb))
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
    with pytest.raises(AssertionError, match="os.system"):
        tried("bombs", lambda: pickle.loads(pickle.dumps(Bomb(os.system, "true"))), tmp_path)
    with pytest.raises(AssertionError, match="open"):
        tried("bombs", lambda: (tmp_path / "out").write_text(""), tmp_path / "in")


@pytest.mark.parametrize("name", ["labels.npz", "last.ckpt"])
def test_archives_that_grow(tmp_path, name):
    "A small file that unpacks to 64 MB is refused before it is unpacked."
    header = npy(np.zeros(1, np.uint8))[:-1]
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as z, z.open("x/data.pkl" if name == "last.ckpt" else "path.npy", "w") as f:
        f.write(header.replace(b"(1,), }       ", b"(67108864,), }"))
        for _ in range(64):
            f.write(bytes(2**20))
    assert (tmp_path / name).stat().st_size < 2**17
    tracemalloc.start()
    try:
        assert tried("bombs", lambda: (pseudolabel.load_labels if name == "labels.npz" else files.load_state)(tmp_path / name), tmp_path, "unpacks to far more") is REFUSED
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# A run's folder, as somebody else may hand it on.

@pytest.fixture(scope="module", autouse=True)
def drawn_before():
    "matplotlib makes folders of its own when it first draws."
    figures.png(figures.panels()[0])


class Right:
    "What is right, without being printed whole by every failing example."
    def __init__(self, **kw):
        vars(self).update(kw)


def written_run(home):
    "A finished run of the smallest kind, as the pipeline would have left it, but for the training."
    config = run_settings.configure(run_settings.TINY_SETTINGS, real="world", target="world", run=home.name, data=str(home.parents[1]))
    inputs = {"real": {"fingerprint": "0" * 12, "images": 4, "identities": 2, "cameras": 2, "unreadable": 0}}
    save_json(home / "config.json", {**to_dict(config), "version": "0", "inputs": inputs})
    table = pseudolabel.PseudoLabels(np.array(["a.jpg", "b.jpg", "c.jpg", "d.jpg"]), np.array([0, 1, 0, 1]), np.array([0, 0, 1, -1]), np.array([0, 0, 1, -1]), np.array([True] * 4))
    last = ()
    for name in ("stage0", "stage1", "stage2", "stage3"):
        def make(folder):
            stages.save_net(build_backbone(config.net, 1), config, folder)
            save_json(folder / "ranking/scores.json", {"mAP": .5, "rank1": .75, "rank5": None})
            save_json(folder / "probe/scores.json", {"domain_probe": .9})
            if name == "stage1":
                pseudolabel.save_labels(folder / "labels.npz", table)
                pseudolabel.save_labels(folder / "refined/labels.npz", table)
                np.save(folder / "features.npy", torch.nn.functional.normalize(torch.rand(4, 6)).numpy())
        stage = Stage(name, home / name, {"seed": 0, "a": "a", **({"b": "b"} if name != "stage0" else {})}, make, last)
        assert run_stage(stage)
        last = (stage,)
        for epoch in (1, 2):
            files.append_jsonl(home / "log.jsonl", run=name, seed=0, stage=name, epoch=epoch, id=2. / epoch, triplet=.5, iterations=3, purity=.5, nmi=.5, pair_f1=.5, outliers=.1)
    save_json(home / "metrics.json", {"method": config.method, "seed": 0, "mAP": .5, "rank1": .75, "labels": None, "stages": {"stage3": {"mAP": .5}}, "unreadable": {}})
    return home


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = written_run(tmp_path_factory.mktemp("run") / "data/runs/tiny")
    return home, looked_at(results.Results(home))


def looked_at(r):
    "All that is read of a run without its pictures."
    labels, net, height, width = r.labels(), *inference.open_net(r.home)
    return Right(stages={k: (s.is_finished, s.key) for k, s in r.stages.items()}, path=labels.path.tolist(), label=labels.label.tolist(), clustered=r.clustering_features(),
                log=r.log(), measured=r.network_scores(), net={k: v.clone() for k, v in net.state_dict().items()}, size=(height, width))


PIECES = ["config.json", "log.jsonl", "metrics.json", "stage1/stage.json", "stage1/labels.npz", "stage1/refined/labels.npz", "stage1/features.npy", "stage3/model.safetensors", "stage3/ranking/scores.json", "stage3/stage.json"]


def one_by_one(home, right):
    "Each thing that is read of a run is right or refused, whatever another piece holds."
    r = tried("runs", lambda: results.Results(home), home, home.name)
    if r is REFUSED:
        return
    for name, look in (("stages", lambda: {k: (s.is_finished, s.key) for k, s in r.stages.items()}), ("log", r.log), ("network_scores", r.network_scores), ("status_line", r.status_line),
                       ("card", lambda: card.make_card(home / "stage3/model.safetensors", inference.open_net(home / "stage3")[0], 32, 16, r.config, r.config)), ("html", lambda: rerun.comparison_html(r, r))):
        tried("runs", look, home)
    labels = tried("runs", r.labels, home, "labels.npz", "stage1", "stage.json")
    assert labels is REFUSED or (labels.path.tolist(), labels.label.tolist()) == (right.path, right.label)
    clustered = tried("runs", r.clustering_features, home, "features.npy", "stage1", "stage.json")
    assert clustered is REFUSED or (clustered.shape == right.clustered.shape and np.isfinite(clustered).all())
    tried("runs", lambda: charts.loss_curves(r.log()) and None, home, "log")
    found = tried("runs", lambda: inference.open_net(home), home, home.name)
    if found is not REFUSED:
        assert found[1:] == right.size and all(torch.equal(v, right.net[k]) for k, v in found[0].state_dict().items())


@fuzz(24)
@given(st.sampled_from(PIECES), wounds)
@example("stage3/model.safetensors", [("flip", .9, 3)])
@example("stage1/features.npy", [("all", 0, b"")])
@example("config.json", [("all", 0, b"[]")])
@example("stage3/ranking/scores.json", [("all", 0, b"[1]")])
@example("log.jsonl", [("insert", 0, b"[1]\n")])
def test_run_damaged(run, piece, how):
    home, right = run
    with changed(home / piece, damaged((home / piece).read_bytes(), how)):
        one_by_one(home, right)


@fuzz(24)
@given(st.sampled_from([p for p in PIECES if p.endswith((".json", ".jsonl"))]), st.sampled_from(["", "seeds", "methods", "method", "inputs", "after", "settings", "finished", "hash", "stages", "mAP", "domain_probe", "epoch", "run", "id", "loss"]), anything)
@example("config.json", "seeds", ["../../x"])
@example("config.json", "method", "no such")
@example("stage3/stage.json", "after", {"../../../x": ""})
@example("stage3/stage.json", "after", [1])
@example("metrics.json", "stages", [1])
@example("log.jsonl", "epoch", "x")
@example("stage3/ranking/scores.json", "mAP", "x")
def test_run_of_other_contents(run, piece, key, value):
    home, right = run
    lines = (home / piece).read_text().splitlines() if piece.endswith("l") else [(home / piece).read_text()]
    said = json.loads(lines[-1])
    said = {**said, key: value} if key else value
    with changed(home / piece, raw("\n".join([*lines[:-1], as_json(said)]))):
        one_by_one(home, right)


# Weights.

def safetensors(header, body=b"", length=None):
    said = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(said) if length is None else length) + said + body


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    net = build_backbone(BackboneConfig(width=8, stripes=2))
    save_weights(folder / "model.safetensors", net, backbone=to_dict(BackboneConfig(width=8, stripes=2)), height=32, width=16)
    return folder / "model.safetensors", Right(net={k: v.clone() for k, v in net.state_dict().items()})


def network_right(file, right, height=32):
    "The network is loaded as it was saved, or refused by name."
    found = tried("weights", lambda: stages.load_net(file), file.parent, "model.safetensors")
    assert found is REFUSED or (found[1:] == (height, 16) and all(torch.equal(v, right.net[k]) for k, v in found[0].state_dict().items()))


@fuzz(40)
@given(wounds)
@example([("flip", .5, 0), ("head", .96875, b"\xc2\x80")])   # a weight, and the name of the fingerprint
@example([("flip", .9, 3)])
def test_weights_damaged(weights, how):
    file, right = weights
    with changed(file, damaged(file.read_bytes(), how)):
        network_right(file, right)


@fuzz(24)
@given(st.sampled_from(["about", "backbone", "width", "stripes", "name", "weights", "height", "dtype", "shape", "offsets", "length"]), anything)
@example("about", [])
@example("backbone", None)
@example("width", 10**6)
@example("width", 512)
@example("stripes", 10**9)
@example("height", "x")
@example("dtype", "I32")
@example("dtype", "F64")
@example("shape", [10**9, 10**9])
@example("offsets", [0, 10**15])
@example("length", 2**63 - 1)
@example("length", 10**8)
@example("name", "timm:resnet18")
@example("weights", "/etc/passwd")
def test_weights_with_another_header(weights, what, value):
    file, right = weights
    whole = file.read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    header, length = json.loads(whole[8:8 + n]), None
    about = json.loads(header["__metadata__"]["about"])
    tensor = header["body.0.weight"]
    if what in ("width", "stripes", "name", "weights"):
        about["backbone"][what] = value
    elif what in ("backbone", "height"):
        about[what] = value
    elif what == "dtype":
        tensor["dtype"] = value
    elif what == "shape":
        tensor["shape"] = value
    elif what == "offsets":
        tensor["data_offsets"] = value
    elif isinstance(value, int) and 0 <= value < 2**64:
        length = value
    header["__metadata__"]["about"] = as_json(value if what == "about" else about)
    with changed(file, safetensors(raw(as_json(header)), whole[8 + n:], length)):
        network_right(file, right, value if what == "height" else 32)


@fuzz(16)
@given(st.sampled_from(["all", "state_dict", "model", "one", "name"]), shaped)
@example("all", torch.zeros(2))
@example("state_dict", [])
@example("one", torch.zeros(8, 3, 3, 3, dtype=torch.int32))
@example("one", torch.zeros(8, 3, 3, 3).to_sparse())
@example("one", torch.zeros(1).expand(8, 3, 3, 3))
@example("name", 3)
def test_published_weights(weights, where, value):
    right = {k.removeprefix("body."): v for k, v in weights[1].net.items() if k.startswith("body.")}
    state = {"all": value, "state_dict": {"state_dict": value}, "model": {"model": value}, "one": {**right, "0.weight": value}}.get(where) if where != "name" else {**right, 3: torch.zeros(1)}
    file = weights[0].with_name("weights.pth")
    torch.save(state, file)
    net = tried("published weights", lambda: build_backbone(BackboneConfig(width=8, stripes=2, weights=str(file))), file.parent, "weights.pth")
    first = right["0.weight"] if where == "name" else value     # a number as a name is none of a tensor that belongs here
    assert net is REFUSED or where in ("one", "name") and isinstance(first, torch.Tensor) and torch.equal(net.body[0].weight, first)


# Pages.

class Page(HTMLParser):
    "What a browser would make of a page: its tags, and the attributes that could run something."
    def __init__(self, said):
        super().__init__()
        self.tags, self.bad = Counter(), []
        self.feed(said)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.bad += [(tag, k, v) for k, v in attrs if k.startswith("on") or k in ("srcdoc", "formaction") or (k in ("src", "href") and not (v or "").startswith("data:image/"))]


EVIL = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "</pre></details><iframe src=javascript:alert(1)>", "\"' onmouseover=alert(1) x='", "</title><svg onload=alert(1)>", "&lt;script&gt;", "]]>", "<!--", "$\\frac$", "{{7*7}}", "\udce9", "a\0b"]
evil = st.one_of(st.sampled_from(EVIL), st.lists(st.sampled_from([*EVIL, "<", ">", "&", '"', "'", "/", "=", "x", " "]), max_size=5).map("".join), st.text(max_size=10))
QUIET = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "thead", "tbody", "tr", "th", "td", "span", "figure", "img", "figcaption", "details", "summary", "pre", "ul", "li", "br", "b"}


def quiet(said, plain):
    "The page has only our tags, as many as the page with `plain` names has."
    page = Page(said)
    assert not page.bad and set(page.tags) <= QUIET and page.tags == Page(plain).tags


@pytest.fixture(scope="module")
def dot():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    return file.getvalue()


@fuzz(48)
@given(st.lists(evil, min_size=6, max_size=6))
@example(EVIL[:6])
@example(EVIL[6:])
def test_pages_show_names_as_names(dot, words):
    def pages(title, method, figure, caption, setting, note):
        with tempfile.TemporaryDirectory() as tmp:
            rows = [{"method": method, "seed": 0, "mAP": .5}]
            page = tried("pages", lambda: report.report(Path(tmp) / "report.html", title, rows, {figure: (dot, caption)}, {"real": setting, setting: [setting]}, [note]), tmp).read_text("utf-8")
        failed = [{"preset": method, "seed": 0, "error": note}, {"preset": "world", "task": "world", "backbone": "", "method": "only-a", "seed": 0, "mAP": .5}]
        return [page, tables.summary_html(failed, title), widgets.numbers_html({caption: .5})]
    for said, plain in zip(pages(*words), pages(*"abcdef")):
        quiet(said, plain)


@fuzz(4)
@given(evil, evil)
@example("$\\frac$", "$\\frac$ \udce9 a\0b")
def test_pictures_show_names_as_names(stage, title):
    "A dollar sign begins no formula, and what no font has is no error."
    with tempfile.TemporaryDirectory() as tmp:
        png = tried("pages", lambda: figures.png(charts.loss_curves([{"run": stage, "epoch": 1, "id": 1.}], title=title), 20), tmp)
    assert png.startswith(b"\x89PNG")


def test_report_of_a_run_with_evil_names(run, tmp_path):
    "The run's name, a stage's name, a picture's name and a setting: through the report that `domainmix report` writes."
    name = "<img src=x onerror=alert(1)>"
    home = shutil.copytree(run[0], tmp_path / "runs" / name)
    shutil.copytree(home / "stage3", home / f"stage9{name}")
    crops = tmp_path / "crops"
    crops.mkdir()
    (crops / f"{name}.jpg").write_bytes(b"no picture")
    config = load_json(home / "config.json")
    save_json(home / "config.json", {**config, "real": f"folder:{crops}", "pattern": None, "target": "folder:</script><script>alert(1)</script>"})
    r = results.Results(home)
    page = report.run_report(r, tmp_path / "report.html").read_text()
    parsed = Page(page)
    assert not parsed.bad and set(parsed.tags) <= QUIET and "&lt;img src=x" in page and "cannot be read" in page and "&lt;/script&gt;" in page
    assert not Page(rerun.comparison_html(r, r)).bad
    view = widgets.View()
    view.show_problem(f"{name}.jpg cannot be read", name)
    assert not Page(view.note.value).bad


def test_widgets_show_names_as_names(run):
    "Titles of maps are set as HTML by jupyter-scatter, and a stage may be called anything."
    pytest.importorskip("jscatter")
    name = "stage9<img src=x onerror=alert(1)>"
    points = np.random.default_rng(0).normal(size=(6, 2))
    view = widgets.DomainMap({name: points}, pictures(6), np.array([name] * 3 + ["B"] * 3))
    import ipywidgets
    html = [w.value for w in walk(view.box) if isinstance(w, ipywidgets.HTML)]
    assert any("&lt;img" in v for v in html) and not any(Page(v).bad for v in html)


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


# Names that are no text.

def test_messages_move_no_cursor():
    "A name out of somebody's file may hold a terminal's control codes."
    said = str(DomainMixError("unknown setting \x1b[2J\x07\ud800 é", "drop it"))
    assert said == "unknown setting \\x1b[2J\\x07\\ud800 é\n  -> drop it"


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text(tmp_path):
    "A folder or a picture whose name is no UTF-8 goes through settings, labels and logs."
    name = os.fsdecode(b"caf\xe9")
    save_json(tmp_path / "a.json", {"real": f"folder:{name}", name: 1})
    assert load_json(tmp_path / "a.json") == {"real": f"folder:{name}", name: 1}
    files.append_jsonl(tmp_path / "log.jsonl", name=name)
    assert files.load_jsonl(tmp_path / "log.jsonl") == [{"name": name}]
    table = pseudolabel.PseudoLabels(np.array([name]), np.array([0]), np.array([0]), np.array([0]), np.array([True]))
    for suffix in (".npz", ".csv"):
        pseudolabel.save_labels(tmp_path / f"labels{suffix}", table)
        assert pseudolabel.load_labels(tmp_path / f"labels{suffix}").path.tolist() == [name]


# Pictures.

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_file(width, height, depth=8, colour=0, rows=None, more=b""):
    "A black PNG of any size, as its header says; `rows` of them are there."
    line = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour] * depth // 8)
    packer, body = zlib.compressobj(1), []
    for _ in range(height if rows is None else rows):
        body.append(packer.compress(line))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + more + chunk(b"IDAT", b"".join(body) + packer.flush()) + chunk(b"IEND", b"")


def strange_pictures(folder):
    "File name -> what must come of it: 'large', 'no picture', 'read', or 'any' of them."
    made = {}
    def put(name, content, what):
        (folder / name).write_bytes(content)
        made[name] = what
    def save(name, what, image, **options):
        image.save(folder / name, **options)
        made[name] = what
    grey = Image.new("L", (64, 128), 99)
    put("claims.png", png_file(60_000, 60_000, rows=1), "large")
    put("grey.png", png_file(12_000, 6_000, rows=1), "large")
    put("claims.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(46), "large")
    whole = io.BytesIO()
    grey.save(whole, "jpeg")
    at = whole.getvalue().index(b"\xff\xc0")
    put("claims.jpg", whole.getvalue()[:at + 5] + struct.pack(">HH", 65_000, 65_000) + whole.getvalue()[at + 9:], "large")
    put("text.png", png_file(64, 128, more=b"".join(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))) for _ in range(5))), "any")
    put("profile.png", png_file(64, 128, more=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**26)))), "any")
    save("frames.tif", "read", grey, save_all=True, append_images=[grey] * 40, compression="tiff_lzw")
    save("moving.png", "read", grey, save_all=True, append_images=[Image.new("L", (64, 128), i) for i in range(20)])
    save("moving.webp", "read", grey.convert("RGB"), save_all=True, append_images=[Image.new("RGB", (64, 128), (i, 0, 0)) for i in range(10)])
    for name, exif in (("short.jpg", b"Exif\0\0II*\0"), ("odd.jpg", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(40)), ("loop.jpg", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\x08\0\0\0"),
                       ("far.jpg", b"Exif\0\0II*\0\xff\xff\xff\x7f"), ("long.jpg", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x7f\x08\0\0\0")):
        save(name, "read", grey, exif=exif)
    save("off.png", "any", grey, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    put("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\n(/etc/passwd) (r) file\nshowpage\n%%EOF\n", "no picture")
    put("largest.png", png_file(4000, 4000), "read")                       # just below the limit
    put("largest16.png", png_file(4000, 4000, 16), "read")
    put("largest_a.png", png_file(4000, 4000, 8, 6), "read")
    (folder / "passwd.jpg").symlink_to("/etc/passwd"); made["passwd.jpg"] = "no picture"
    (folder / "zero.jpg").symlink_to("/dev/zero"); made["zero.jpg"] = "empty"
    os.mkfifo(folder / "pipe"); (folder / "pipe.jpg").symlink_to("pipe"); made["pipe.jpg"] = "empty"
    return made


MEASURE = """
import json, sys, warnings
from pathlib import Path
from PIL import Image
from domainmix.images import read_image, read_error_text
import domainmix.batches
warnings.simplefilter("ignore")
Image.init()
started = []
def look(event, args):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn"): started.append(event)
sys.addaudithook(look)
from PIL import EpsImagePlugin
EpsImagePlugin.Ghostscript = lambda *a, **k: (started.append("Ghostscript"), Image.new("RGB", (64, 128)).im)[1]
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) // 1024
for name in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    try: said = str(read_image(name, 64, 32).shape)
    except Exception as e: said = read_error_text(e)
    print(json.dumps([Path(name).name, said, peak() - before, started]))
    started.clear()
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is not told here")
def test_strange_pictures(tmp_path):
    "Read or refused, in bounded memory, and no program is started for them."
    made = strange_pictures(tmp_path)
    done = run_code(MEASURE, *(tmp_path / n for n in made), cwd=Path(core.__file__).parents[1], limit=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    print(*(f"{n:16}{mb:>6} MB  {what[:70]}" for n, (what, mb, _) in said.items()), sep="\n")
    for name, what in made.items():
        got, mb, started = said[name]
        assert not started or name == "script.jpg", (name, started)
        assert {"large": "too large" in got, "no picture": "not an image" in got or name == "script.jpg", "read": got == "(3, 64, 32)", "empty": "empty" in got, "any": True}[what], (name, got)
        assert mb < (400 if name.startswith("largest") else 100), (name, mb)


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    "PostScript under the name of a JPEG is handed to no Ghostscript."
    from PIL import EpsImagePlugin
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: (started.append(1), Image.new("RGB", (64, 128)).im)[1])
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\nshowpage\n%%EOF\n")
    Image.new("RGB", (2, 4)).save(tmp_path / "b.jpg")
    expect_error(lambda: load_images(read_folder(tmp_path).train, 16, 8), "1 of 2", "a.jpg (not an image")
    assert not started


def test_counted(capsys):
    "How many examples each target has had."
    with capsys.disabled():
        print("\n" + "\n".join(f"{n:>8,}  {name}" for name, n in sorted(COUNTED.items())))
