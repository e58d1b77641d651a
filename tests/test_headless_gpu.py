"""Every preset and every method through `python -m domainmix.pipeline` on the pretended GPU, to its end, with averages, checkpoints, stops and resumes.

All runs share one world, which is drawn once. The networks of the presets are those of the paper with one block in each stage and few channels;
DOMAINMIX_SLOW=1 takes them as they are.
"""
import math
import os
import signal
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.resnet import Bottleneck, ResNet

from domainmix import training
from domainmix.baselines.labellers import LABELLERS
from domainmix.checkpoint import StageRun, load_checkpoint
from domainmix.cli import main as domainmix
from domainmix.core import from_dict
from domainmix.datasets import write_world
from domainmix.files import load_json, load_jsonl, load_state, save_json
from domainmix.pipeline import EXIT_OK, EXIT_TERMINATED, EXIT_USER_ERROR, main
from domainmix.runs.settings import BACKBONE_SETTINGS, METHODS, TINY_SETTINGS, TRAINING_SECTIONS
from domainmix.runs.tables import BACKBONES, PAPER_DATASETS, preset_settings
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
    assert {(line["stage"], line["epoch"]) for line in lines} == {(s, e) for s in stages for e in (1, 2)} and not list(home.rglob("*.ckpt"))
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))


PRESETS = {"world": {"net": {"width": 8}}, **{f"paper-rp-msmt-market{short and '-' + short}": {} for short in BACKBONES}}


def test_each_backbone_is_tried():
    tried = {"small", *BACKBONES.values(), *OTHERS}
    assert tried == set(BACKBONE_SETTINGS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_to_its_end(name, data):
    settings = {**BRIEF, **preset_settings(name, data)}
    settings["net"] = {**BRIEF["net"], **PRESETS[name]}
    with gpu() as pretend: assert finish(write_settings(data, name, **settings), 5) == 3
    assert pretend.steps == 16 + 3      # a stop ends a step; it is counted again where the run goes on
    check_finished(data/"runs"/name)


OTHERS = ("osnet", "osnet_x0_25", "osnet_ibn_x0_25")     # of no paper's preset; they differ from osnet_ibn in norms and widths only


@pytest.mark.parametrize("backbone", OTHERS)
def test_another_backbone_runs_to_its_end(backbone, data):
    with gpu(): assert finish(write_settings(data, backbone, **{**BRIEF, "backbone": backbone, "target": "world", "method": "only-a", "all_stages": False}), 5) == 1
    check_finished(data/"runs"/backbone, ("stage0", "stage2"))


def test_every_method_runs_to_its_end_in_a_table(data, capsys):
    argv = write_settings(data, "methods", **TINY, methods=list(METHODS), seeds=[0], all_stages=False)
    with gpu(): assert finish(argv, 17) == 3
    rows = load_json(data/"runs/methods/table.json")
    assert [r["method"] for r in rows] == list(METHODS) and all(0 < r["mAP"] < 1 for r in rows)
    assert METHODS["domainmix-db"].title in capsys.readouterr().out
