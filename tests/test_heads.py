"""Networks with several heads (MGN, MuDeep, CaNE-Dual) in all stages of a run, tiny."""
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import domainmix
from domainmix.backbone import build_backbone
from domainmix.baselines.labellers import LABELLERS
from domainmix.batches import union
from domainmix.bodies import MULTI_HEAD, BackboneConfig
from domainmix.checkpoint import StageRun
from domainmix.classifier import classifier_dim, initial_classifier, mean_features
from domainmix.core import DomainMixError, from_dict, generator, to_dict
from domainmix.deploy import export
from domainmix.discriminator import CountedDropout
from domainmix.files import raise_on_sigterm, save_weights, Terminated
from domainmix.images import normalise
from domainmix.inference import evaluate_model
from domainmix.loading import toy_train_set
from domainmix.pseudolabel import ClusterConfig
from domainmix.runs.pipeline import run
from domainmix.runs.settings import BACKBONE_SETTINGS, TINY_SETTINGS, configure, setting_faults
from domainmix.schedule import DomainConfig, TrainConfig
from domainmix.training import train, train_invariant
from domainmix.views.results import attention
from domainmix.world import toy_domain

CPU = torch.device("cpu")
SIZE = {"height": 48, "width": 16}
SMALL = {**{k: v for k, v in TINY_SETTINGS.items() if k not in ("net", *SIZE)}, **SIZE, "net": {"width": 8, "weights": "none"}}
SHORT = dict(epochs=1, iterations=2, p=4, k=2, precision="fp32")


def tall(data):
    "The same people on taller images."
    return replace(data, images=data.images.repeat_interleave(2, 2)[:, :, :48].contiguous())


def narrow(name): return build_backbone(BackboneConfig(name, width=8, stripes=1))


@pytest.fixture(scope="module")
def people(): return union(tall(toy_train_set(0)), tall(toy_train_set(1)))


def test_a_training_that_is_killed_goes_on_to_the_same_network(people, tmp_path, monkeypatch):
    "MuDeep: its dropout must be resumed too."
    net, config = narrow("mudeep"), TrainConfig(**{**SHORT, "epochs": 2, "iterations": 3})
    whole, add, steps = train(net, people, config, device="cpu"), StageRun.add, []
    def stop(self, images, **terms):
        add(self, images, **terms)
        steps.append(terms)
        if len(steps) == 5: signal.raise_signal(signal.SIGTERM)     # in the second epoch
    monkeypatch.setattr(StageRun, "add", stop)
    with pytest.raises(Terminated), raise_on_sigterm(): train(net, people, config, device="cpu", folder=tmp_path)
    again = train(net, people, config, device="cpu", folder=tmp_path)
    assert len(steps) == 6 and whole.net.neck.count - CountedDropout(.5).count == 6 and torch.equal(again.classifier, whole.classifier)
    for (k, a), b in zip(whole.net.state_dict().items(), again.net.state_dict().values()): assert torch.equal(a, b), k


@pytest.mark.parametrize("name, method", [("mgn", "only-a"), ("mudeep", "only-a"), ("mudeep_2017", "only-a"), ("cane_dual", "cane"),
                                          ("osnet_ibn_x0_25", "only-a"), ("resnet50_dualnorm", "only-a")])
def test_a_run_that_is_killed_goes_on_to_the_same_network_and_can_be_used(tmp_path, monkeypatch, name, method):
    "The signal comes in the second epoch of the last stage."
    def settings(run):
        return configure({"backbone": name}, SMALL, data=str(tmp_path), run=run, method=method, target="world", device="cpu", all_stages=False)
    add, steps = StageRun.add, []
    def stop(self, images, **terms):
        steps.append(terms)
        if len(steps) == last: signal.raise_signal(signal.SIGTERM)
        return add(self, images, **terms)
    with monkeypatch.context() as m:
        m.setattr(StageRun, "add", stop)
        last = 0
        whole = run(settings("whole"))
        last, steps = len(steps) - 1, []
        with pytest.raises(Terminated), raise_on_sigterm(): run(settings("stopped"))
    assert len(steps) == last and not (tmp_path/"runs/stopped/metrics.json").exists()
    assert run(settings("stopped")) == whole and 0 < whole["mAP"] < 1
    nets = [domainmix.load(run, data=str(tmp_path), device="cpu").net for run in ("whole", "stopped")]
    for (k, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values()): assert torch.equal(a, b), k
    images = toy_domain(3, 2, size=(48, 16))[0]
    features = domainmix.load("stopped", data=str(tmp_path), device="cpu").embed(images.numpy())
    assert features.shape == (6, nets[0].feature_dim) and np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert evaluate_model("stopped", "world", data=str(tmp_path), device="cpu")["mAP"] == whole["mAP"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MULTI_HEAD, "osnet_ibn_x0_25", "resnet50_dualnorm"])
def test_onnx_gives_the_same_features(tmp_path, name):
    net = narrow(name)
    config = BackboneConfig(name, width=8, stripes=1)
    file = save_weights(tmp_path/"net.safetensors", net, backbone=to_dict(config), height=48, width=16, feature="raw", flip=True)
    card = export(file, tmp_path/"out")
    assert card["output"]["shape"] == ["batch", net.feature_dim] and len(card["files"]) == 2
    assert all(f["largest_difference"] < 1e-5 for f in card["files"].values())


@pytest.mark.parametrize("name, read", [("mgn", 3 * 256 + 5 * 32), ("mudeep", 12 * 64), ("mudeep_2017", 683), ("cane_dual", 3 * 128)])
def test_classifiers_start_from_the_means_of_what_they_read(people, name, read):
    net = narrow(name)
    assert classifier_dim(net) == read
    rows = mean_features(net, people, CPU, "fp32")
    net.eval()
    with torch.no_grad(): seen = net(normalise(people.images[people.label == 3]))[1]
    first = 0
    for i, length in enumerate(net.heads.classes):      # each part by itself: the direction of the mean of its unit vectors
        part = torch.nn.functional.normalize(seen[:, first:first + length]).mean(0)
        assert torch.cosine_similarity(part, rows[3, first:first + length], 0) > 1 - 1e-5, i
        first += length
    assert first == read and torch.allclose(rows.norm(dim=1), torch.full((16,), len(net.heads.classes) ** .5), rtol=1e-4)
    pseudo = initial_classifier(net, people, TrainConfig(init_classifier="pseudo", precision="fp32"), generator(0), CPU)
    assert torch.equal(pseudo[8:], rows[8:]) and pseudo[:8].abs().max() < .01


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "mgn")) for n in MULTI_HEAD])
def test_stage_3_starts_from_the_classifier_of_stage_2(people, name):
    config = TrainConfig(**SHORT, lambda_id=1., init_classifier="means")
    second = train(narrow(name), people, config, device="cpu")
    third = train_invariant(second.net, people, DomainConfig(**{**SHORT, "epochs": 2}, feature="raw"), device="cpu", classifier=second.classifier)
    assert third.classifier.shape == second.classifier.shape and third.discriminator.dim == second.net.feature_dim
    with pytest.raises(DomainMixError, match="no BN neck"):
        train_invariant(second.net, people, DomainConfig(**{**SHORT, "epochs": 2}), device="cpu", classifier=second.classifier)
    with pytest.raises(DomainMixError, match=f"{classifier_dim(second.net)} numbers"):
        train(second.net, people, config, device="cpu", classifier=second.classifier[:, 1:])
    shades = attention(second.net, people.images[:2])
    assert shades.shape[0] == 2 and shades.min() >= 0 and shades.max() <= 1


@pytest.mark.parametrize("labeller", ["spcl", "mmt", "sda", pytest.param("plain", marks=pytest.mark.slow)])
def test_labellers_take_a_network_with_several_heads(people, labeller):
    Config, adapt = LABELLERS[labeller]
    real = tall(toy_train_set(1))
    cluster = ClusterConfig(k1=8, k2=3, min_samples=2, eps=.7, reliability=False)
    more = {"cluster": cluster} if labeller != "sda" else to_dict(configure(TINY_SETTINGS).sda) | SHORT
    net = narrow("mgn")
    found, clusters, features = adapt(net, tall(toy_train_set(0)), real.images, real.camera, from_dict(Config, {**more, **SHORT}), device="cpu")
    assert features.shape == (48, 256) and found.heads == net.heads and clusters.n_clusters > 1
    assert not torch.equal(found.body.trunk.conv1.weight, net.body.trunk.conv1.weight)


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_settings_of_the_paper_and_what_does_not_go_together(name):
    config, is_2017 = configure(BACKBONE_SETTINGS[name], backbone=name, method="only-a"), name == "mudeep_2017"
    assert config.net.width == (48 if is_2017 else 64) and config.stage3.feature == config.feature == "raw" and not setting_faults(config)
    images, one_pass = config.stage2.iterations * config.stage2.p * config.stage2.k, 128_000 if is_2017 else 32_621   # of RandPerson, MSMT17
    assert 0 <= images - one_pass < config.stage2.p * config.stage2.k
    def what(**changes): return " ".join(f"{f.what}: {f.remedy}" for f in setting_faults(configure({"backbone": name, "method": "only-a", "net": {"width": 8}}, changes)))
    too_small = what(height=16, width=16)
    assert is_2017 or "stripes of a map" in too_small and "taller images" in too_small
    assert "whole images" in what(**{"net.view": "both"}) and "whole images" in what(**{"net.parts": True})
    assert "pooling of its own" in what(**{"net.stripes": 4}) and "strides" in what(**{"net.last_stride": 2})
