"""The command from end to end: whole runs, every mistake that a person makes, kills and what comes after.

Every command runs in a process of its own. To spare the seconds that importing torch takes, these are
forked from one process that has imported everything and done nothing.
"""
import functools
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from domainmix.files import load_json, load_jsonl, locked, save_json, save_weights
from domainmix.readers import write_market1501, write_msmt17, write_randperson
from domainmix.runs.settings import TINY_SETTINGS
from domainmix.world import toy_domain
from forks import run_code, shared

STAGES = {"epochs": 2, "iterations": 4, "p": 4, "k": 2}
TINY = {
    "height": 32, "width": 16, "all_stages": False, "net.width": 8, "net.stripes": 2, "net.view": "whole", "net.parts": False, "lower": 2, "spcl.cluster.k1": 5,
    **{f"{stage}.{k}": v for stage in ("pretrain", "spcl", "stage2", "stage3") for k, v in STAGES.items()},
}
FIRST = ["--run", "first", "--all-stages"]
NOBODY = 65534
SCORES = ("mAP", "rank1", "rank5", "rank10", "mAP_trapezoid", "domain_probe")

FIRST_OF_ALL = """
import functools, inspect
inspect.getsource = functools.cache(inspect.getsource)     # tyro reads each class of settings for each command, and Python parses a whole module to find one
import torch, torch._dynamo, tyro, sklearn, scipy.sparse.csgraph
import domainmix.cli, domainmix.views.charts, matplotlib.figure
torch.set_num_threads(1)
domainmix.cli.parse_command(["run"])
"""


class Said:
    "Exit code, standard output and standard error of a command."
    def __init__(self, code, out, err): self.code, self.out, self.err = code, out, err
    def __repr__(self): return f"exit code {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


class Terminal:
    "Runs `domainmix` commands in a folder."
    def __init__(self):
        self.forks = shared(FIRST_OF_ALL, MKL_NUM_THREADS="1", TQDM_MININTERVAL="5")
        self.cwd = None

    def __call__(self, *argv, **how):
        "Run a command; `strike`, `how`, `powerless` and `largest` as `Forks` has them."
        out, err = self.cwd / ".out", self.cwd / ".err"
        code = self.forks("domainmix.cli:main", [str(a) for a in argv], cwd=self.cwd, out=out, err=err, **how)
        return Said(code, *(f.read_text(errors="replace") for f in (out, err)))


MADE = {}     # by fixtures that test_runs.py takes from here: a module of its own would make them again


def once(make):
    "`make()`, called once in a session."
    if make.__name__ not in MADE: MADE[make.__name__] = make()
    return MADE[make.__name__]


@pytest.fixture(scope="module")
def forks():
    return once(Terminal)


@pytest.fixture
def domainmix(forks, tmp_path):
    forks.cwd = tmp_path
    return forks


def picture_folder(root, n_ids, per_id, cameras, seed, name="{pid:03d}_c{camera}_{i}.png"):
    "Drawn people as plain files."
    root.mkdir(parents=True)
    for i, (image, pid, camera) in enumerate(zip(*toy_domain(n_ids, per_id, cameras, seed=seed))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name.format(pid=int(pid), camera=int(camera) + 1, i=i))
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "Small sets on disk: A and B to train on, C to be tested on, plain crops, and the settings of a run of a second."
    def small_sets():
        root = tmp_path_factory.mktemp("sets")
        write_randperson(root / "a", *toy_domain(10, 4, 2))
        write_msmt17(root / "b", *toy_domain(10, 6, 2, seed=1), split=["train"] * 60)
        images, pid, camera = toy_domain(8, 4, 2, seed=2)
        write_market1501(root / "c", images, pid + 1, camera, split=["query" if i % 4 < 2 else "gallery" for i in range(32)])
        picture_folder(root / "crops", 10, 6, 2, 1)
        save_json(root / "tiny.json", TINY)
        return root
    return once(small_sets)


@pytest.fixture
def flags(sets):
    "A complete run on the small sets."
    return ["--config", sets / "tiny.json", "--synthetic", f"randperson:{sets/'a'}", "--real", f"msmt17:{sets/'b'}", "--target", f"market1501:{sets/'c'}"]


def other(flags, name, value):
    "The same run with another value of a flag: --real may be given more than once, so it is put in the place of the first."
    flags = list(flags)
    flags[flags.index(name) + 1] = value
    return flags


def wrong(said, *words):
    "The command refused, in words, and with a remedy."
    assert said.code == 2, said
    assert "Traceback" not in said.err and "error:" in said.err and "  -> " in said.err, said
    for w in words: assert str(w) in said.err, (w, said)


# ---- whole runs

def test_single_rows_of_a_table_leave_the_others(domainmix, tmp_path):
    presets = ["world-only-a", "world-cane"]
    save_json(tmp_path/"mine.json", {"presets": presets, "seeds": [0], "settings": TINY_SETTINGS})
    done = domainmix("tables", "mine.json")
    assert done.code == 0, done
    before = load_json(tmp_path/"data/runs/mine.json")
    again = domainmix("tables", "mine.json", "--rows", "world-cane", "world-cane")
    assert again.code == 0 and [line for line in again.out.splitlines() if line.startswith("world-only-a")], again
    assert load_json(tmp_path/"data/runs/mine.json") == before and [r["preset"] for r in before] == presets
    wrong(domainmix("tables", "mine.json", "--rows", "world-cann"), "unknown row", "world-cane")
    wrong(domainmix("tables", "places", "--rows", "e"), "unknown row", "a or b or c or d")


def test_the_installed_command_is_this_one(tmp_path):
    command = Path(sys.executable).with_name("domainmix")
    if not command.exists(): pytest.skip("the package is not installed")
    done = subprocess.run([command, "runs"], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and "no runs yet" in done.stdout, done


def test_a_run_leaves_what_it_found(finished):
    home, said = finished / "data/runs/first", (finished / "said.txt").read_text()
    found = load_json(home / "metrics.json")
    assert all(0 <= found[k] <= 1 for k in SCORES) and found["method"] == "domainmix-db"
    assert set(found["stages"]) == {"stage0", "stage1", "stage2", "stage3"}
    assert "rank-1" in said and "metrics.json" in said
    for file in ("config.json", "log.jsonl", "stage1/labels.npz", "stage1/labels.csv", "stage1/features.npy", "stage1/model.safetensors",
                 "stage2/model.safetensors", "stage3/model.safetensors"): assert (home / file).is_file(), file
    about = load_json(home / "config.json")
    assert about["seed"] == 0 and about["version"] and about["inputs"]["real"]["images"] == 60
    assert {(r["run"], r["epoch"]) for r in load_jsonl(home / "log.jsonl")} == {(f"stage{s}", e) for s in range(4) for e in (1, 2)}
    assert not list(home.rglob("*.part*")) and not list(home.rglob("last.ckpt"))


@pytest.fixture(scope="module")
def finished(forks, sets, tmp_path_factory):
    "A finished run, to be copied by tests that go on from one."
    def finished_run():
        forks.cwd = tmp_path_factory.mktemp("finished")
        said = forks("run", "--config", sets / "tiny.json", "--synthetic", f"randperson:{sets/'a'}", "--real", f"msmt17:{sets/'b'}",
                     "--target", f"market1501:{sets/'c'}", "--run", "first", "--all-stages")
        assert said.code == 0, said
        (forks.cwd / "said.txt").write_text(said.out)
        return forks.cwd
    return once(finished_run)


@pytest.fixture
def after(domainmix, finished):
    "The command in a folder with a finished run."
    shutil.copytree(finished / "data", domainmix.cwd / "data")
    return domainmix


def seals(home):
    return {str(p.parent.relative_to(home)): p.stat().st_mtime_ns for p in home.rglob("stage.json")}


def test_a_finished_run_does_nothing_again(after, flags):
    home = after.cwd / "data/runs/first"
    before, result = seals(home), (home / "metrics.json").read_bytes()
    assert after("run", *flags, *FIRST).code == 0
    assert seals(home) == before and (home / "metrics.json").read_bytes() == result


def test_another_configuration_is_refused_and_update_redoes_only_its_stages(after, flags):
    home = after.cwd / "data/runs/first"
    before, result = seals(home), (home / "metrics.json").read_bytes()
    wrong(after("run", *flags, *FIRST, "--stage3.lambda-m", "5"), "data/runs/first", "stage3.lambda_m", "1.0", "5.0", "--update", "--fresh", "stage0, stage1, stage2 kept")
    wrong(after("run", *flags, *FIRST, "--seed", "1"), "seed: 0 there, 1 here")
    assert seals(home) == before and (home / "metrics.json").read_bytes() == result       # nothing lost
    assert after("run", *flags, *FIRST, "--stage3.lambda-m", "5", "--update").code == 0
    changed = {k for k, t in seals(home).items() if before[k] != t}
    assert changed == {"stage3", "stage3/ranking", "stage3/probe"}
    assert load_json(home / "config.json")["stage3"]["lambda_m"] == 5


def test_bounds_of_eq_1_do_not_redo_stage_1(after, flags):
    home = after.cwd / "data/runs/first"
    before = seals(home)
    assert after("run", *flags, *FIRST, "--lower", "1", "--update").code == 0
    assert {k for k, t in seals(home).items() if before.get(k) == t} >= {"stage0", "stage1"}
    assert before["stage1/refined"] != seals(home)["stage1/refined"]


@pytest.mark.skipif(os.name == "nt", reason="needs limits of the system")
def test_a_full_disk_loses_nothing(domainmix, flags):
    argv, home = ("run", *flags, "--run", "k", "--all-stages"), domainmix.cwd / "data/runs/k"
    for kilobytes, file in ((40, ".npy"), (300, None)):                   # the decoded images find no room; then a checkpoint
        wrong(domainmix(*argv, largest=kilobytes * 1024), "free disk space", file or "")
        assert not list((domainmix.cwd / "data").glob("**/*.part*"))
    assert (home / "config.json").is_file() and not (home / "metrics.json").exists()
    assert domainmix(*argv).code == 0 and (home / "metrics.json").is_file()


def given_away(folder, writable=False):
    "Make a folder one that can be looked into and, unless `writable`, not be changed; what is root's is given to somebody else."
    for p in (folder, *folder.rglob("*")):
        p.chmod((0o555 if p.is_dir() else 0o444) | (0o200 if writable else 0))
        if os.geteuid() == 0: os.chown(p, *(0, 0) if writable else (NOBODY, NOBODY))


@pytest.mark.skipif(os.name == "nt" or (os.geteuid() == 0 and sys.platform != "linux"), reason="needs rights, and for root a way to lay down its powers")
def test_a_read_only_folder(domainmix, flags):
    data, argv = domainmix.cwd / "data", ("run", *flags, "--run", "k", "--method", "only-a")
    data.mkdir()
    given_away(data)
    wrong(domainmix(*argv, powerless=True), "Permission denied", "data/", "file permissions")
    assert not list(data.iterdir())
    given_away(data, writable=True)
    assert domainmix(*argv).code == 0
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    given_away(data)                                                       # a finished run that belongs to somebody else
    wrong(domainmix(*argv, powerless=True), "Permission denied", "data/runs/k", "file permissions")
    said = domainmix("runs", powerless=True)
    assert said.code == 0 and "finished" in said.out, said
    assert domainmix("evaluate", "--model", "k", "--target", flags[-1], powerless=True).code == 0
    assert {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before
    given_away(data, writable=True)


def test_images_that_changed_are_refused_and_images_that_were_touched_are_not(domainmix, sets):
    shutil.copytree(sets / "a", domainmix.cwd / "a")
    argv = ("run", "--config", sets / "tiny.json", "--synthetic", f"randperson:{domainmix.cwd/'a'}", "--method", "only-a", "--run", "k")
    home, pictures = domainmix.cwd / "data/runs/k", sorted((domainmix.cwd / "a").glob("**/*.jpg"))
    assert domainmix(*argv).code == 0
    done = seals(home)
    for f in pictures: os.utime(f, (1, 1))                              # a copy without dates, a clock that was wrong
    assert domainmix(*argv).code == 0 and seals(home) == done
    pictures[0].write_bytes(pictures[-1].read_bytes())
    wrong(domainmix(*argv), "synthetic: other images", f"{len(pictures)} images then", "--update")
    assert seals(home) == done
    assert domainmix(*argv, "--update").code == 0 and seals(home) != done


def test_fresh_starts_from_nothing(after, flags):
    home = after.cwd / "data/runs/first"
    before = seals(home)
    assert after("run", *flags, *FIRST, "--seed", "1", "--fresh", "--method", "only-a").code == 0
    assert not set(before.values()) & set(seals(home).values()) and not (home / "stage3").exists()


def test_a_target_can_be_added_later(domainmix, flags):
    assert domainmix("run", *flags[:-2], "--run", "late").code == 0
    home = domainmix.cwd / "data/runs/late"
    found, before = load_json(home / "metrics.json"), seals(home)
    assert found["mAP"] is None and 0 <= found["domain_probe"] <= 1 and found["labels"]["clusters"] > 1
    assert domainmix("run", *flags, "--run", "late").code == 0
    assert load_json(home / "metrics.json")["mAP"] > 0 and seals(home).items() >= before.items()


def test_table_report_and_shared_stages(domainmix, flags):
    said = domainmix("table", *flags, "--run", "t", "--methods", "only-a", "directmix-initial", "directmix", "domainmix-kl", "--seeds", "2")
    assert said.code == 0, said
    home = domainmix.cwd / "data/runs/t"
    rows = load_json(home / "table.json")
    assert [(r["seed"], r["method"]) for r in rows][:2] == [(0, "only-a"), (0, "directmix-initial")] and len(rows) == 8
    assert all(isinstance(r[k], float) and 0 <= r[k] <= 1 for r in rows for k in ("mAP", "rank1", "rank5", "rank10", "domain_probe"))
    assert len(list(home.glob("seed*/stage1/stage.json"))) == 2 and len(list(home.glob("seed0/stage2-*"))) == 3
    assert "DirectMix (refined)" in said.out and "±" in said.out and "2 seeds" in said.out
    page = (home / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "data:image/png;base64," in page
    before = seals(home)
    assert domainmix("table", *flags, "--run", "t", "--methods", "only-a", "directmix", "--seeds", "1").code == 0
    assert seals(home) == before and len(load_json(home / "table.json")) == 2


def test_plain_crops_without_any_labels_serve_as_real_set(domainmix, sets, flags):
    said = domainmix("run", *other(flags, "--real", f"folder:{sets/'crops'}"), "--run", "crops")
    assert said.code == 0, said
    assert load_json(domainmix.cwd / "data/runs/crops/config.json")["inputs"]["real"]["identities"] == 0


def test_several_real_sets_are_a_domain_each(domainmix, sets, flags):
    argv = ("run", *flags, "--run", "both", "--real", f"folder:{sets/'crops'}")
    said = domainmix(*argv)
    assert said.code == 0, said
    about = load_json(domainmix.cwd / "data/runs/both/config.json")
    assert about["real"] == [f"msmt17:{sets/'b'}", f"folder:{sets/'crops'}"] and about["inputs"]["real"]["images"] == 120
    wrong(domainmix(*argv, "--real", f"msmt17:{sets/'b'}"), "given twice")


def test_a_folder_with_a_pattern_serves_as_target(domainmix, sets, flags):
    pattern = r"(?P<pid>\d+)_c(?P<camera>\d)"
    said = domainmix("run", *flags, "--target", f"folder:{sets/'crops'}", "--target-pattern", pattern, "--method", "only-a", "--run", "crops")
    assert said.code == 0, said
    assert load_json(domainmix.cwd / "data/runs/crops/metrics.json")["queries"] == 20


# ---- parts of a run

def test_label_writes_a_table_and_run_goes_on_from_it(domainmix, flags):
    said = domainmix("label", *flags, "--run", "l", "--out", "labels.csv")
    assert said.code == 0 and "cluster sizes" in said.out and "left out" in said.out, said
    lines = (domainmix.cwd / "labels.csv").read_text().splitlines()
    assert len(lines) == 61 and lines[0].startswith("path,")
    before = seals(domainmix.cwd / "data/runs/l")
    assert domainmix("run", *flags, "--run", "l").code == 0
    assert seals(domainmix.cwd / "data/runs/l").items() >= before.items()


def test_evaluate_gives_what_the_run_measured(after, sets):
    result = load_json(after.cwd / "data/runs/first/metrics.json")
    for model in ("first", "data/runs/first", "data/runs/first/stage2", "data/runs/first/stage2/model.safetensors"):
        said = after("evaluate", "--model", model, "--target", f"market1501:{sets/'c'}", "--out", "scores.json")
        assert said.code == 0, said
        expected = result["stages"]["stage2" if "stage2" in model else "stage3"]
        assert load_json(after.cwd / "scores.json")["mAP"] == pytest.approx(expected["mAP"], abs=1e-6)


def test_embed_writes_features_and_paths(after, sets):
    assert after("embed", "--model", "first", "--images", f"folder:{sets/'crops'}", "--out", "f/features.npy").code == 0
    features = np.load(after.cwd / "f/features.npy")
    assert features.shape == (60, 128) and np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4)
    paths = (after.cwd / "f/features.csv").read_text().splitlines()
    assert paths[0] == "path" and len(paths) == 61 and all(Path(p).is_file() for p in paths[1:])


def test_camera_norms_change_features_and_need_known_cameras(after, sets):
    target = f"market1501:{sets/'c'}"
    for name, more in (("saved", []), ("by_camera", ["--camera-norms"])):
        assert after("evaluate", "--model", "first", "--target", target, "--out", f"{name}.json", *more).code == 0
        assert after("embed", "--model", "first", "--images", target, "--out", f"{name}.npy", *more).code == 0
    saved, by_camera = (np.load(after.cwd / f"{name}.npy") for name in ("saved", "by_camera"))
    assert abs(saved - by_camera).max() > .01 and np.allclose(np.linalg.norm(by_camera, axis=1), 1, atol=1e-4)
    assert load_json(after.cwd / "saved.json").keys() == load_json(after.cwd / "by_camera.json").keys()
    wrong(after("embed", "--model", "first", "--images", f"folder:{sets/'crops'}", "--camera-norms"), "none is known", "--pattern", "--camera-norms")
    wrong(after("embed", "--onnx", "x", "--images", target, "--camera-norms"), "--onnx and --camera-norms cannot be used together")


def test_world_writes_three_sets(domainmix):
    small = [f"--world.{d}.{k}" for d in "abc" for k in ("ids=6", "cameras=2", "scenes=1", "passers-by=0")]
    per = [t for d in "abc" for t in (f"--world.{d}.cameras-per-id", "2", "2")]
    said = domainmix("world", "--out", "w", *small, *per, "--world.held-out", "0")
    assert said.code == 0 and "randperson:" in said.out and "msmt17:" in said.out and "market1501:" in said.out, said
    (domainmix.cwd / "full").mkdir()
    (domainmix.cwd / "full/note.txt").touch()
    wrong(domainmix("world", "--out", "full"), "full", "not empty")


def test_headless_without_tyro(sets, tmp_path):
    save_json(tmp_path / "run.json", {**TINY, "synthetic": f"randperson:{sets/'a'}", "target": f"market1501:{sets/'c'}", "method": "only-a", "run": "x"})
    code = "import sys, runpy; assert 'domainmix' not in sys.modules; sys.modules.update(tyro=None, matplotlib=None, nbdev=None, fastcore=None, IPython=None); " \
           "sys.argv = ['pipeline', '--config', 'run.json', 'stage2.epochs=1']; runpy.run_module('domainmix.pipeline', run_name='__main__')"
    done = run_code(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_json(tmp_path / "data/runs/x/metrics.json")["mAP"] > 0
    assert load_json(tmp_path / "data/runs/x/config.json")["stage2"]["epochs"] == 1


def help_of(domainmix, command):
    "What a command says to --help; asked once."
    if command not in HELP: HELP[command] = domainmix(command, "--help")
    return HELP[command]


HELP = {}


def test_help_is_readable(domainmix):
    assert all(c in domainmix("--help").out for c in ("demo", "run", "table", "label", "evaluate", "embed", "world"))
    for command in ("label", "evaluate", "world"):
        said = help_of(domainmix, command)
        assert said.code == 0 and "Traceback" not in said.err, said
    assert all(f in help_of(domainmix, "run").out for f in ("--synthetic", "--real", "--target", "--run", "--backbone", "--seed", "--skip-bad", "--stage2.epochs"))


NESTED = {"net", "pretrain", "spcl", "mmt", "plain", "sda", "stage2", "stage3", "world"}    # fields that are groups of flags


def flag_texts(page):
    "Flag -> its text in a help page, without the default."
    texts, flag = {}, None
    for line in re.sub(r"[─│╭╮╰╯]", " ", page).splitlines():
        if re.match(r" {1,4}-{1,2}[a-zA-Z]", line):
            invocation, _, rest = line.strip().partition("  ")
            flag = re.split(r"[, ]", invocation)[0]
            texts[flag] = rest.strip()
        elif re.match(r" {6,}\S", line) and flag:
            texts[flag] += " " + line.strip()
        elif line.strip():
            flag = None
    return {flag: re.sub(r"\((default: .*|required)\)$", "", text.strip()).strip() for flag, text in texts.items()}


def test_every_flag_has_a_text(domainmix):
    from domainmix.commands import COMMANDS
    for command, (kind, _, _) in COMMANDS.items():
        texts = flag_texts(help_of(domainmix, command).out)
        fields = set(kind.__dataclass_fields__) - NESTED
        assert len(texts) > len(fields) - (2 if command == "compare" else 0), (command, texts)    # A and B have no flag
        assert not [flag for flag, text in texts.items() if len(text) < 6], (command, texts)
        fragments = [flag for flag, text in texts.items() if re.match(r"(of|to) |see `(?!domainmix )|[A-Z_]{4,}\b", text)]
        assert not fragments, (command, fragments)


def test_a_switch_has_two_forms(monkeypatch):
    from domainmix.cli import parse_command
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))      # as in FIRST_OF_ALL

    def parsed(*argv): return parse_command(argv)[1]

    assert parsed("run").flip and not parsed("run").skip_bad
    assert parsed("run", "--flip").flip and not parsed("run", "--no-flip").flip
    assert parsed("run", "--skip-bad").skip_bad and not parsed("run", "--no-skip-bad").skip_bad
    assert parsed("run", "--net.ibn").net.ibn and not parsed("run", "--net.no-ibn").net.ibn
    assert parsed("bench", "--dense").dense and not parsed("bench", "--no-dense").dense


# ---- bad input

def test_missing_folder(domainmix, flags):
    for flag in ("--synthetic", "--real", "--target"):
        wrong(domainmix("run", *other(flags, flag, "market1501:/no/such/folder" if flag != "--synthetic" else "randperson:/no/such/folder")), "/no/such/folder")
    assert not (domainmix.cwd / "data/runs").exists()


def test_wrong_layout_says_what_it_looks_like(domainmix, sets, flags):
    wrong(domainmix("run", *other(flags, "--real", f"market1501:{sets/'b'}")), sets / "b", "msmt17")
    wrong(domainmix("run", *flags, "--target", f"msmt17:{sets/'c'}"), sets / "c", "market1501")
    wrong(domainmix("run", *other(flags, "--real", str(sets / "b"))), "msmt17:")
    wrong(domainmix("run", *other(flags, "--real", f"market:{sets/'c'}")), "market1501")


def test_empty_split(domainmix, sets, flags):
    shutil.copytree(sets / "c", domainmix.cwd / "c")
    for file in (domainmix.cwd / "c/query").iterdir(): file.unlink()
    wrong(domainmix("run", *flags, "--target", f"market1501:{domainmix.cwd/'c'}"), "query")
    (domainmix.cwd / "none").mkdir()
    wrong(domainmix("run", *other(flags, "--real", f"folder:{domainmix.cwd/'none'}")), "none")


def test_unreadable_images_are_named_or_skipped_and_counted(domainmix, sets, flags):
    crops = domainmix.cwd / "crops"
    shutil.copytree(sets / "crops", crops)
    names = sorted(p.name for p in crops.iterdir())
    (crops / names[3]).write_bytes(b"")                                      # zero bytes
    (crops / names[9]).write_bytes((crops / names[9]).read_bytes()[:200])      # truncated
    (crops / names[20]).write_text("no picture at all")
    argv = ("run", *other(flags, "--real", f"folder:{crops}"), "--method", "directmix", "--run", "bad")
    wrong(domainmix(*argv), names[3], names[9], names[20], "3 of 60", "skip")
    said = domainmix(*argv, "--skip-bad")
    assert said.code == 0 and "3 of real" in said.out and names[9] in said.err, said
    assert load_json(domainmix.cwd / "data/runs/bad/metrics.json")["unreadable"]["real"] == 3


def test_pattern_that_matches_nothing(domainmix, sets, flags):
    wrong(domainmix("run", *other(flags, "--real", f"folder:{sets/'crops'}"), "--pattern", r"(?P<pid>\d+)@(?P<camera>\d)"), "matches none of the 60", sets / "crops")
    wrong(domainmix("run", *flags, "--pattern", r"(?P<pid>\d+)"), "folder:")
    wrong(domainmix("run", *flags, "--target", f"folder:{sets/'crops'}"), "no identities", "--target-pattern")


def test_one_identity_or_one_camera(domainmix, sets, flags):
    pattern = r"(?P<pid>\d+)_c(?P<camera>\d)"
    one = picture_folder(domainmix.cwd / "one", 1, 8, 2, 3)
    view = picture_folder(domainmix.cwd / "view", 8, 4, 1, 3)
    for flag in ("--synthetic", "--real", "--target"):
        wrong(domainmix("run", *other(flags, flag, f"folder:{one}"), "--pattern", pattern), "one identity", one)
        wrong(domainmix("run", *other(flags, flag, f"folder:{view}"), "--pattern", pattern), "one camera", view)


def test_fewer_identities_than_the_batch_wants(domainmix, flags):
    "Said when the sets have been read, before anything is trained; without the others, as many as fit."
    wrong(domainmix("run", *flags, "--run", "p", "--pretrain.p", "30"), "--pretrain.p is 30", "A has at most 10 identities", "lower it")
    wrong(domainmix("run", *flags, "--run", "q", "--method", "labelled", "--stage2.p", "30"), "--stage2.p is 30", "at most 10 identities", "lower it")
    assert not list((domainmix.cwd / "data/runs").glob("[pq]/stage0"))


def test_no_clusters_or_everything_in_one(domainmix, sets, flags):
    wrong(domainmix("label", *flags, "--run", "none", "--spcl.cluster.min-samples", "59"), "stage1", "no cluster", "eps")
    same = domainmix.cwd / "same"
    picture_folder(same, 1, 40, 1, 0)
    image = next(same.iterdir()).read_bytes()
    for file in same.iterdir(): file.write_bytes(image)
    wrong(domainmix("label", *other(flags, "--real", f"folder:{same}"), "--run", "one"), "stage1", "one cluster")
    wrong(domainmix("label", *flags, "--run", "small", "--lower", "50"), "no label has 50 to 120 images", "--lower")


def test_folders_that_are_no_runs_or_taken(after, flags):
    (after.cwd / "data/runs/mine").mkdir()
    (after.cwd / "data/runs/mine/thesis.txt").write_text("do not lose me")
    wrong(after("run", *flags, "--run", "mine", "--fresh"), "data/runs/mine", "--run")
    assert (after.cwd / "data/runs/mine/thesis.txt").exists()
    wrong(after("run", *flags, "--run", "../mine"), "../mine", "plain name")


def test_weights_of_another_architecture(after, sets, flags):
    model = after.cwd / "data/runs/first/stage3/model.safetensors"
    wrong(after("run", *flags, "--run", "w", "--net.weights", model, "--net.width", "16"), "model.safetensors", "does not fit", "the network has")
    wrong(after("evaluate", "--model", model, "--target", f"market1501:{sets/'c'}", "--backbone", "resnet50"), "does not fit")
    save_weights(after.cwd / "foreign.safetensors", {"x": torch.zeros(3)})
    wrong(after("evaluate", "--model", "foreign.safetensors", "--target", f"market1501:{sets/'c'}"), "does not say which architecture", "--backbone")
    (after.cwd / "broken.safetensors").write_bytes(model.read_bytes()[:1000])
    wrong(after("evaluate", "--model", "broken.safetensors", "--target", f"market1501:{sets/'c'}"), "broken.safetensors", "damaged")
    assert after("run", *flags, "--run", "fits", "--net.weights", model, "--method", "only-a").code == 0


def test_loss_that_is_not_a_number(after, flags):
    home = after.cwd / "data/runs/first"
    good = (home / "stage2/model.safetensors").read_bytes()
    said = after("run", *flags, *FIRST, "--stage3.temperature", "1e-40", "--update")
    wrong(said, "stage3, epoch", "iteration", "learning rate")
    assert (home / "stage2/model.safetensors").read_bytes() == good
    assert after("run", *flags, *FIRST, "--update").code == 0


def test_wrong_flags_and_names(domainmix, flags):
    wrong(domainmix("rnu", *flags), "rnu", "run")
    wrong(domainmix("run", *flags, "--method", "domainmix"), "domainmix-db")
    wrong(domainmix("run", *flags, "--backbone", "resnet"), "resnet50")
    wrong(domainmix("run", *flags[2:4]), "--real")
    wrong(domainmix("run", "--config", "none.json"), "none.json")
    wrong(domainmix("evaluate", "--model", "nothing", "--target", "world"), "nothing")
    said = domainmix("run", *flags, "--stage2.epoch", "3")
    assert said.code == 2 and "stage2.epochs" in said.out + said.err and "Traceback" not in said.err
    if not torch.cuda.is_available(): wrong(domainmix("run", *flags, "--device", "cuda"), "--device cpu")


# ---- kills

LONG = [f"--{s}.{k}={v}" for s in ("pretrain", "spcl", "stage2", "stage3") for k, v in (("epochs", 4), ("iterations", 4))]


def lines(home, stage):
    "Epochs that the log has of a stage."
    log = home / "log.jsonl"
    return sum(r["run"] == stage for r in load_jsonl(log)) if log.is_file() else 0


@pytest.fixture(scope="module")
def undisturbed(forks, sets, tmp_path_factory):
    "The metrics of a run that nobody disturbs."
    forks.cwd = tmp_path_factory.mktemp("undisturbed")
    said = forks("run", "--config", sets / "tiny.json", "--synthetic", f"randperson:{sets/'a'}", "--real", f"msmt17:{sets/'b'}",
                 "--target", f"market1501:{sets/'c'}", "--run", "k", *LONG)
    assert said.code == 0, said
    return load_json(forks.cwd / "data/runs/k/metrics.json")


@pytest.mark.parametrize("stage, how", [*((f"stage{i}", signal.SIGKILL) for i in (0, 1, 3)), ("stage1", signal.SIGINT)])
def test_the_same_command_goes_on_after_a_kill(domainmix, flags, undisturbed, stage, how):
    argv, home = ("run", *flags, "--run", "k", *LONG), domainmix.cwd / "data/runs/k"
    said = domainmix(*argv, strike=lambda: lines(home, stage) >= 2, how=how)
    assert said.code == (-9 if how == signal.SIGKILL else 130), said  # 130 is what a shell says of Ctrl-C
    if how == signal.SIGINT: assert "repeat the command to continue" in said.err and "Traceback" not in said.err, said
    assert not (home / "metrics.json").exists() and (home / stage / "last.ckpt").is_file()
    done = seals(home)
    assert domainmix(*argv).code == 0
    assert load_json(home / "metrics.json") == undisturbed
    earlier = [f"stage{i}" for i in range(int(stage[-1]))]
    assert all(seals(home)[s] == done[s] for s in earlier)                    # nothing was done twice
    epochs = [(r["run"], r["epoch"]) for r in load_jsonl(home / "log.jsonl")]
    assert epochs.count((stage, 1)) == 1                                      # not even epochs


def test_killed_at_any_moment(domainmix, flags, undisturbed):
    argv, home = ("run", *flags, "--run", "k", *LONG), domainmix.cwd / "data/runs/k"
    for i in range(6):
        start = time.time()
        said = domainmix(*argv, strike=lambda: time.time() - start > .4 + .3 * i)
        if said.code == 0: break
        assert said.code == -9, said
    assert said.code == 0 or domainmix(*argv).code == 0
    assert load_json(home / "metrics.json") == undisturbed


def test_two_processes_do_not_share_a_run(domainmix, flags):
    pytest.importorskip("fcntl")
    with locked(domainmix.cwd / "data/runs/k"):
        wrong(domainmix("run", *flags, "--run", "k"), f"process {os.getpid()} on {socket.gethostname()}, since 20", "is already working in", "data/runs/k")
