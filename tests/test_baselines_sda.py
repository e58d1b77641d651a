"""Stage 1 by SDA, as a run: it goes on after a kill, and its result can be used as that of every labeller."""
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainmix.checkpoint import StageRun
from domainmix.cli import main
from domainmix.core import DomainMixError
from domainmix.files import Terminated, load_jsonl, load_weights, raise_on_sigterm, save_json
from domainmix.pseudolabel import load_labels
from domainmix.runs.history import list_runs
from domainmix.runs.inputs import read_inputs
from domainmix.runs.pipeline import run
from domainmix.runs.settings import TINY_SETTINGS, configure, validate_config
from domainmix.runs.stages import clustering_features
from domainmix.runs.tables import run_methods

TINY = {**TINY_SETTINGS, "pretrain.epochs": 0, "all_stages": False, "real": "world", "target": "world", "precision": "fp32"}


def tiny(folder, **settings):
    "A run of a second."
    return configure(TINY, {"method": "stage1-sda", "run": "tiny", "data": str(folder)}, settings)


def stop_in_stage1(monkeypatch, step):
    "SIGTERM in this step of stage 1."
    steps, add = itertools.count(1), StageRun.add
    def add_and_signal(self, *a, **kw):
        if self.stage == "stage1" and next(steps) == step: signal.raise_signal(signal.SIGTERM)
        return add(self, *a, **kw)
    monkeypatch.setattr(StageRun, "add", add_and_signal)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody stopped: its folder and its scores."
    folder = tmp_path_factory.mktemp("sda")
    return folder, run(tiny(folder))


def test_a_run_that_is_killed_within_an_epoch_ends_with_the_same_numbers(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m, raise_on_sigterm():
        stop_in_stage1(m, 5)
        with pytest.raises(Terminated): run(tiny(tmp_path))
    home = tmp_path/"runs/tiny"
    assert (home/"stage1/last.ckpt").exists() and len(load_jsonl(home/"stage1/log.jsonl")) == 1
    assert [(r.name, r.state) for r in list_runs(tmp_path)] == [("tiny", "stopped")]
    assert run(tiny(tmp_path)) == whole[1]
    nets = [load_weights(folder/"runs/tiny/stage1/model.safetensors") for folder in (whole[0], tmp_path)]
    assert all(bool((value == nets[1][name]).all()) for name, value in nets[0].items())
    lines = load_jsonl(home/"stage1/log.jsonl")
    assert [line["iterations"] for line in lines] == [3, 3] and lines == [
        {**line, "images_per_s": lines[i]["images_per_s"]} for i, line in enumerate(load_jsonl(whole[0]/"runs/tiny/stage1/log.jsonl"))]
    assert {"gan", "cycle", "identity", "relation", "discriminator", "spread", "found", "id", "triplet"} <= lines[0].keys()


def test_its_labels_and_features_are_those_of_every_labeller(whole, tmp_path):
    folder = whole[0]/"runs/tiny/stage1"
    good = (folder/"features.npy").read_bytes()
    (folder/"features.npy").write_bytes(good[:-1])
    inputs = read_inputs(validate_config(tiny(whole[0])))
    with pytest.warns(UserWarning, match="computed again"): again = clustering_features(folder, lambda: inputs.real.images)
    assert np.allclose(again, np.frombuffer(good, np.float32)[-again.size:].reshape(again.shape), atol=1e-5)
    labels = load_labels(folder/"labels.npz").before
    assert labels.min() == 0 and labels.max() == 9        # of k-means: each image is in one of ten clusters
    for i in range(3): Image.fromarray(inputs.real.images[i].permute(1, 2, 0).numpy()).save(tmp_path/f"{i}.png")
    out = tmp_path/"features.npy"
    assert main(["embed", "--model", str(whole[0]/"runs/tiny"), "--images", f"folder:{tmp_path}", "--out", str(out), "--data", str(whole[0])]) == 0
    assert np.load(out).shape == (3, again.shape[1])


def test_images_of_the_default_size(tmp_path):
    "One step in each of two epochs, 64 x 32 pixels."
    found = run(tiny(tmp_path, **{"height": 64, "width": 32, "world.height": 64, "world.width": 32, "sda.iterations": 1}))
    assert 0 < found["mAP"] < 1 and load_labels(tmp_path/"runs/tiny/stage1/labels.npz").before.max() == 9


def test_dbscan_and_a_table(tmp_path):
    config = tiny(tmp_path, run="table", **{"sda.cluster.method": "dbscan", "sda.epochs": 1})
    [row] = run_methods(config, ("stage1-sda",), (0,))
    assert row["model"] == "seed0/stage1-sda" and 0 < row["mAP"] < 1


@pytest.mark.parametrize("settings, words", [({"sda.translation.first_epochs": 2}, "does not learn"), ({"sda.dropout": .5}, "SDA has no dropout")])
def test_settings_that_sda_cannot_use_are_refused_before_stage_0(settings, words, tmp_path):
    with pytest.raises(DomainMixError, match=words):
        run(tiny(tmp_path, **settings))
    assert not list(tmp_path.rglob("stage0"))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    pytest.importorskip("accelerate")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    logs = []
    for n in (1, 2):
        file, name = tmp_path/f"{n}.json", f"of{n}"
        save_json(file, {**TINY, "method": "stage1-sda", "run": name, "data": str(tmp_path), "device": "cpu", "sda.epochs": 3, "sda.iterations": 1, "sda.samples_per_bn": 4})
        python = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if n > 1 else [])]
        subprocess.run([*python, "-m", "domainmix.pipeline", "--config", str(file)], env=environment, cwd=tmp_path, check=True, capture_output=True)
        logs.append(load_jsonl(tmp_path/"runs"/name/"stage1/log.jsonl"))
    for one, two in zip(*logs):
        for name in ("gan", "cycle", "identity", "relation", "discriminator", "loss", "spread", "found", "clusters"):
            assert one[name] == pytest.approx(two[name], rel=1e-4), (name, one, two)
