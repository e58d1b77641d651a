"""Every preset and every method through `python -m domainmix.pipeline` on the pretended GPU, to its end, with averages, checkpoints, stops and resumes.

All runs share one world, which is drawn once. The networks of the presets are those of the paper with one block in each stage and few channels;
DOMAINMIX_SLOW=1 takes them as they are.
"""
import math
import os
import signal
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.resnet import Bottleneck, ResNet

from domainmix import training
from domainmix.baselines.labellers import LABELLERS
from domainmix.bodies import MULTI_HEAD
from domainmix.checkpoint import StageRun
from domainmix.cli import main as domainmix
from domainmix.core import from_dict
from domainmix.datasets import write_world
from domainmix.files import load_json, load_jsonl, load_state, save_json
from domainmix.pipeline import EXIT_OK, EXIT_TERMINATED, EXIT_USER_ERROR, main
from domainmix.runs.settings import BACKBONE_SETTINGS, METHODS, TINY_SETTINGS, TRAINING_SECTIONS
from domainmix.runs.presets import BACKBONES, PAPER_DATASETS, preset_settings
from domainmix.world import WorldConfig
from pretend import gpu

SLOW = bool(os.environ.get("DOMAINMIX_SLOW"))
BRIEF = {"height": 32, "width": 16, "lower": 2, "world": TINY_SETTINGS["world"], "net": {"weights": "none"},
         **{f"{s}.{k}": v for s in TRAINING_SECTIONS for k, v in dict(epochs=2, iterations=2, p=4, k=2).items()},
         **{f"{s}.ema": .9 for s in TRAINING_SECTIONS if s != "spcl"}, **{f"{s}.samples_per_bn": 4 for s in LABELLERS}}     # two groups in a batch
TINY = {**BRIEF, "net": TINY_SETTINGS["net"], "synthetic": "world", "real": "world", "target": "world"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A folder of data: the sets of a paper's task are the three domains of the world, in their own layouts."
    root = tmp_path_factory.mktemp("data")
    places = write_world(root/"world", from_dict(WorldConfig, TINY_SETTINGS["world"]))
    for dataset, domain in (("rp", "a"), ("msmt", "b"), ("market", "c")): (root/PAPER_DATASETS[dataset][2]).symlink_to(places[domain])
    return root


@pytest.fixture(scope="module", autouse=True)
def narrow_resnet():
    if SLOW: yield
    else:
        with patch.object(torchvision.models, "resnet50", lambda weights=None: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8)): yield


class Stops:
    "SIGTERM after every so many steps; counts the steps."
    def __init__(self, every=math.inf): self.every, self.steps, self.add = every, 0, StageRun.add

    def __enter__(self):
        def add(run, images, **terms):
            self.add(run, images, **terms)
            self.steps += 1
            if self.steps % self.every == 0: os.kill(os.getpid(), signal.SIGTERM)
        self.patched = patch.object(StageRun, "add", add)
        self.patched.__enter__()
        return self

    def __exit__(self, *error): self.patched.__exit__(*error)


def write_settings(data, name, **settings):
    return ["--config", str(save_json(data/f"{name}.json", {**settings, "run": name, "data": str(data), "device": "cuda"}))]


def finish(argv, every):
    "Do a run that is stopped again and again; how often it was."
    stopped = 0
    with Stops(every):
        while (code := main(argv)) == EXIT_TERMINATED: stopped += 1
    assert code == EXIT_OK
    return stopped


def check_finished(home, stages=("stage0", "stage1", "stage2", "stage3")):
    found = load_json(home/"metrics.json")
    assert all(0 < found["stages"][s]["mAP"] < 1 for s in stages if found["stages"]) and 0 < found["mAP"] < 1
    lines = load_jsonl(home/"log.jsonl")
    assert {(line["stage"], line["epoch"]) for line in lines} == {(s, e) for s in stages for e in (1, 2)} and not list(home.rglob("last.ckpt"))
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))


NARROW = {"net": {"width": 8}}
PRESETS = {"world": NARROW, "world-snr-domainmix-db": NARROW, **{f"paper-rp-msmt-market{short and '-' + short}": {} for short in BACKBONES},
           "tiny": NARROW, "small-128": NARROW, "base": NARROW, "paper-small": NARROW, "gap": NARROW,
           "mmt-paper": {"mmt": {"cluster": {"n_clusters": 8}}, "method": "stage1-mmt"}}


def test_each_backbone_is_tried():
    tried = {"small", *BACKBONES.values(), *OTHERS, *MULTI_HEAD}
    assert tried == set(BACKBONE_SETTINGS)


def nested(*changes):
    "Settings, dotted or nested, as one; a later one wins."
    found = {}
    for change in changes:
        for key, value in change.items():
            *sections, name = key.split(".")
            place = found
            for section in sections: place = place.setdefault(section, {})
            place[name] = nested(place.get(name, {}), value) if isinstance(value, dict) else value
    return found


@pytest.mark.parametrize("name", [name if name == "world" else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS])
def test_a_preset_runs_to_its_end(name, data):
    own = {k: v for k, v in nested(preset_settings(name, data)).items() if k not in ("pretrain", "mmt") or name != "mmt-paper"}
    settings = nested({"real": "world", "target": "world"}, own, BRIEF, PRESETS[name], {"all_stages": False})
    stages = ("stage0", "stage1") if name == "mmt-paper" else ("stage0", "stage1", "stage2", "stage3")
    with gpu() as pretend, warnings.catch_warnings():
        warnings.filterwarnings("error", "training goes on without a CUDA graph")
        assert finish(write_settings(data, name, **settings), 5) == (2 if name == "mmt-paper" else 3)
    assert pretend.steps == (12 if name == "mmt-paper" else 16)      # none is lost, none done twice
    check_finished(data/"runs"/name, stages)


SYSTEMS_OF_TABLE_3 = {name: {"net": {"width": 8}} if name in ("mgn", "cane-dual") else {} for name in ("mgn", "cane", "cane-dual", "osnet-ibn", "snr", "qaconv")}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS_OF_TABLE_3)
def test_a_system_of_table_3_runs_to_its_end(system, data):
    "With the preset's own settings, except for sizes and lengths."
    name = f"paper-msmt-market-{system}"
    short = {"qaconv": {"epochs": 2, "iterations": 2, "p": 4, "k": 2}, "height": 48, "width": 16, "all_stages": False}
    settings = nested(preset_settings(name, data), BRIEF, SYSTEMS_OF_TABLE_3[system], short)
    with gpu(): assert finish(write_settings(data, name, **settings), 5) >= 0
    found = load_json(data/"runs"/name/"metrics.json")
    assert 0 < found["mAP"] < 1


OTHERS = ("osnet_x0_25", "osnet", "osnet_ibn_x0_25", "resnet50_dualnorm")   # of no paper preset: other norms and widths


@pytest.mark.slow
@pytest.mark.parametrize("backbone", OTHERS)
def test_another_backbone_runs_to_its_end(backbone, data):
    with gpu(): assert finish(write_settings(data, backbone, **{**BRIEF, "backbone": backbone, "target": "world", "method": "only-a", "all_stages": False}), 5) == 1
    check_finished(data/"runs"/backbone, ("stage0", "stage2"))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", MULTI_HEAD)
def test_a_backbone_with_several_heads_runs_to_its_end(backbone, data):
    settings = {**BRIEF, "height": 48, "net": {"weights": "none", "width": 8}, "backbone": backbone, "target": "world", "method": "only-a", "all_stages": False}
    with gpu(): assert finish(write_settings(data, backbone, **settings), 5) == 1
    check_finished(data/"runs"/backbone, ("stage0", "stage2"))


@pytest.mark.slow
def test_every_method_runs_to_its_end_in_a_table(data, capsys):
    own = {k: v for k, v in TINY_SETTINGS.items() if k.startswith(("qaconv", "rounds", "sda."))}
    argv = write_settings(data, "methods", **TINY, **own, methods=list(METHODS), seeds=[0], all_stages=False)
    with gpu(): assert finish(argv, 17) > 3
    rows = load_json(data/"runs/methods/table.json")
    assert [r["method"] for r in rows] == list(METHODS) and all(0 < r["mAP"] < 1 for r in rows)
    assert METHODS["domainmix-db"].title in capsys.readouterr().out


def test_commands_on_a_finished_run(data, capsys):
    "evaluate, embed, tune, export, label and table, on a run of the GPU; what a file holds is the same as by the CPU."
    argv = write_settings(data, "done", **TINY, method="only-a", all_stages=False, flip=True)
    sets = f"msmt17:{data/'MSMT17_V1'}"
    def do(*words, code=EXIT_OK):
        assert domainmix([str(w) for w in (*words, "--data", data)]) == code, capsys.readouterr().err
        return capsys.readouterr().out
    with gpu():
        assert main(argv) == EXIT_OK
        on_gpu = do("evaluate", "--model", "done", "--target", "world", "--rerank", "--centre-cameras", "--camera-norms", "--device", "cuda", "--out", data/"gpu.json")
        do("embed", "--model", "done", "--images", sets, "--device", "cuda", "--out", data/"gpu.npy")
        do("tune", "--model", "done", "--images", sets, "--device", "cuda", "--out", data/"tuned.safetensors")
        do("evaluate", "--model", data/"tuned.safetensors", "--target", f"market1501:{data/PAPER_DATASETS['market'][2]}", "--device", "cuda")
        table = do("table", *argv, "--run", "compared", "--methods", "only-a", "--seeds", "1")
        label = do("label", *argv, "--run", "labels", "--method", "domainmix-db", "--out", data/"labels.csv")
        do("export", "--model", "done", "--out", data/"exported", "--formats", "torch")
    assert "rank1" in on_gpu and "Only A" in table and "refined" in label and (data/"labels.csv").read_text().count("\n") > 50
    do("evaluate", "--model", "done", "--target", "world", "--rerank", "--centre-cameras", "--camera-norms", "--device", "cpu", "--out", data/"cpu.json")
    do("embed", "--model", "done", "--images", sets, "--device", "cpu", "--out", data/"cpu.npy")
    assert abs(np.load(data/"gpu.npy") - np.load(data/"cpu.npy")).max() < 1e-5
    for name, value in load_json(data/"gpu.json").items(): assert math.isclose(value, load_json(data/"cpu.json")[name], abs_tol=1e-3), name


def test_without_a_gpu_nothing_is_lost_and_the_run_goes_on_elsewhere(data, capsys):
    "A run of the GPU is stopped in stage 1, and the machine that goes on has none."
    argv = write_settings(data, "moved", **TINY, all_stages=False)
    with gpu(), Stops(5): assert main(argv) == EXIT_TERMINATED
    home = data/"runs/moved"
    before = {f: f.read_bytes() for f in sorted(home.rglob("*")) if f.is_file()}
    assert (home/"stage1/last.ckpt") in before
    capsys.readouterr()
    for wish in ("cuda", "cuda:0", "cuda:3"):
        assert main([*argv, f"device={wish}"]) == EXIT_USER_ERROR
        said = capsys.readouterr().err
        assert f"device '{wish}' is requested, but torch finds 0 cuda devices" in said.lower() and "cpu" in said and "Traceback" not in said
    with gpu():
        assert main([*argv, "device=cuda:3"]) == EXIT_USER_ERROR
        assert "torch finds 1 cuda devices" in capsys.readouterr().err.lower()
    assert {f: f.read_bytes() for f in sorted(home.rglob("*")) if f.is_file()} == before
    assert domainmix(["evaluate", "--model", str(home/"stage0"), "--target", "world", "--device", "cuda"]) == EXIT_USER_ERROR
    assert main([*argv, "device=cpu"]) == EXIT_OK
    check_finished(home)


def spoil(after):
    "The loss of the backbone, which is NaN from a step on; the list of its steps."
    whole, steps = training.backbone_loss, []
    def loss(*args):
        steps.append(args)
        value, terms = whole(*args)
        return (value, terms) if len(steps) <= after else (value * math.nan, {k: v * math.nan for k, v in terms.items()})
    return loss, steps


def test_nan_in_a_step_is_found_within_twenty_and_the_last_good_state_is_kept(data, capsys):
    longer = {"pretrain.iterations": 21, "pretrain.capture": "off", "method": "only-a", "all_stages": False}
    argv, home = write_settings(data, "spoilt", **{**TINY, **longer}), data/"runs/spoilt"
    def again(after, every=math.inf):
        loss, steps = spoil(after)
        with gpu(), patch.object(training, "backbone_loss", loss), Stops(every): code = main(argv)
        return code, len(steps), capsys.readouterr().err
    code, steps, said = again(22)                              # the first step of the second epoch is good
    assert code == EXIT_USER_ERROR and steps == 21 + 20        # NaN is there for 19 steps
    assert "stage0, epoch 2, iteration 2: the loss term 'loss' is nan" in said and "lower the learning rate" in said and "Traceback" not in said
    kept = (home/"stage0/last.ckpt").read_bytes()
    state = load_state(home/"stage0/last.ckpt")
    assert len(state["history"]) == 1 and state["midway"] is None
    assert all(v.isfinite().all() for part in ("model", "average") for v in state["parts"][part].values())
    code, steps, said = again(1, every=3)                      # asked to end while NaN has not been read yet: it is read before anything is saved
    assert code == EXIT_TERMINATED and steps == 3 and (home/"stage0/last.ckpt").read_bytes() == kept
    with gpu(): assert main(argv) == EXIT_OK
    check_finished(home, ("stage0", "stage2"))


def test_nan_in_a_recorded_step_is_found_within_twenty_too(data, capsys):
    "A replay does not call the loss of Python: here it is spoilt by a number on the GPU."
    argv = write_settings(data, "replayed", **{**TINY, "pretrain.iterations": 30, "method": "only-a", "all_stages": False})
    whole, add, calls, steps = training.backbone_loss, StageRun.add, [], []
    with gpu():
        factor = torch.ones((), device="cuda")
        def loss(*args):
            calls.append(1)
            value, terms = whole(*args)
            return value * factor, {k: v * factor for k, v in terms.items()}
        def count(self, *args, **terms):
            steps.append(1)
            if len(steps) == 30: factor.fill_(math.nan)      # from the second epoch on
            return add(self, *args, **terms)
        with patch.object(training, "backbone_loss", loss), patch.object(StageRun, "add", count): assert main(argv) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert len(calls) == 5 and 30 < len(steps) <= 30 + 20 and "stage0, epoch 2, iteration 1: the loss term 'loss' is nan" in said and "Traceback" not in said
    state = load_state(data/"runs/replayed/stage0/last.ckpt")
    assert len(state["history"]) == 1 and all(v.isfinite().all() for part in ("model", "average") for v in state["parts"][part].values())
