"""Recorded steps beside what else may be switched on, and on a driver that cannot record."""
import warnings
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn

from domainmix import capture, losses, training
from domainmix.backbone import build_backbone
from domainmix.batches import union
from domainmix.bodies import BackboneConfig
from domainmix.loading import BatchLoader, toy_train_set
from domainmix.pipeline import report_errors
from domainmix.runs.pipeline import run
from domainmix.runs.settings import TINY_SETTINGS, configure
from domainmix.schedule import DomainConfig
from domainmix.training import make_train_state, train_step
from pretend import Tape, gpu

STEPS = 12      # every second one is the discriminator's


def record_on_tape(step, device):
    "A recording by `Tape`, without the sides of a pretended GPU: a compiler refuses to work beside these."
    with (tape := Tape()): terms = step()

    def replay():
        tape.replay()
        return terms
    return replay


def train_toy(compiled: bool, recorded: bool):
    "The loss terms of each step, how often a step ran in Python, and how many recordings there are."
    data = union(toy_train_set(0), toy_train_set(1))
    config = DomainConfig(p=4, k=2, loss="db", precision="fp32", compile=compiled)
    net, cpu = build_backbone(BackboneConfig("small", width=8, stripes=2)), torch.device("cpu")
    batches, ran = BatchLoader(data, config, 0, "stage3", cpu)(0, "backbone"), []

    def update(*args, **choices):
        ran.append(choices)
        return training_update(*args, **choices)
    training_update = training.update_networks
    doubles = dict(_on_side_stream=lambda step, device: step(), _record=record_on_tape, FAILURES=[])
    if recorded: doubles["why_not_recorded"] = lambda *_: None
    whole = lambda m: setattr(m, "_compiled_call_impl", torch.compile(m._call_impl, backend="aot_eager"))      # without a C++ compiler
    with patch.multiple(capture, **doubles), patch.multiple(losses, _check_triplets=lambda *_: None, _check_labels=lambda *_: None), \
         patch.object(training, "update_networks", update), patch.object(nn.Module, "compile", whole):        # these checks read values, on a CPU only
        state = make_train_state(net, data, config, 0, "stage3", cpu, torch.zeros(data.n_classes, net.feature_dim))
        terms = [{k: float(v) for k, v in train_step(state, next(batches), bool(i % 2), 2. ** -13, 1., config).items()} for i in range(STEPS)]
    return terms, len(ran), len(state.recorder.recordings)


@pytest.mark.filterwarnings("error:training goes on without a CUDA graph", "error:torch.compile does not work")
def test_the_step_of_a_compiled_network_is_recorded_too():
    "Three steps, a recording and its check of each kind run in Python; the losses are those of steps that are neither compiled nor recorded."
    from torch._dynamo.utils import counters
    plain, ran, recordings = train_toy(False, False)
    assert (ran, recordings) == (STEPS, 0)
    graphs = counters["stats"]["unique_graphs"]
    both, ran, recordings = train_toy(True, True)
    assert counters["stats"]["unique_graphs"] >= graphs + 2          # of training, and of evaluation while the discriminator learns
    assert (ran, recordings) == (2 * (capture.WARM_UP + 2), 2)
    for a, b in zip(plain, both):
        assert a.keys() == b.keys()
        for name in a.keys() - {"d_accuracy"}: assert b[name] == pytest.approx(a[name], rel=.1, abs=.01), name


def no_graphs():
    raise RuntimeError("CUDA error: operation not supported\nCUDA kernel errors might be reported later.")


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_a_driver_without_graphs(setting, tmp_path, capsys):
    "With `auto`, one warning, and the scores of a run without recordings; with `on`, an error before the first epoch is over."
    record, brief = capture._record, dict(real="world", target="world", device="cuda", method="only-a", data=str(tmp_path))
    config = partial(configure, TINY_SETTINGS, {"pretrain.epochs": 1, "pretrain.iterations": 6, "stage2.epochs": 1, "stage2.iterations": 6}, brief)
    stages = ("pretrain", "stage2")
    with gpu(), patch.object(capture, "_record", record), patch.object(torch.cuda, "CUDAGraph", no_graphs), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if setting == "on":
            assert report_errors(lambda: run(config({f"{s}.capture": "on" for s in stages}, run="on"))) == 2
            assert "operation not supported" in (told := capsys.readouterr().err) and "set capture to auto or off" in told
            assert not (tmp_path/"runs/on/log.jsonl").exists()
            return
        found = run(config(run="auto"))
        without = run(config({f"{s}.capture": "off" for s in stages}, run="off"))
    assert (tmp_path/"runs/auto/log.jsonl").exists()          # which a run with `on` does not have
    told = [str(w.message) for w in said if "CUDA graph" in str(w.message)]
    assert [t for t in told if "training goes on" in t] == ["training goes on without a CUDA graph: CUDA error: operation not supported"]
    assert found["mAP"] == without["mAP"] and found["rank1"] == without["rank1"]
