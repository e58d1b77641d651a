"""SNR in the backbone and CaNE as a method, from the settings to the scores."""
import signal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from domainmix.backbone import build_backbone
from domainmix.baselines.cane import RoundsConfig, cane_rounds
from domainmix.batches import TrainSet
from domainmix.bodies import BackboneConfig
from domainmix.checkpoint import StageRun
from domainmix.core import DomainMixError, with_overrides
from domainmix.deploy import FeatureExtractor, export_program
from domainmix.files import Terminated, load_json, load_jsonl, load_weights, raise_on_sigterm
from domainmix.runs.pipeline import run
from domainmix.runs.settings import SMALL_SETTINGS, TINY_SETTINGS, configure, starting_weights
from domainmix.runs.stages import load_net

SNR = {"net.snr": True, "net.snr_pairs": "random"}


def tiny(folder, **settings):
    return configure(TINY_SETTINGS, SNR, {"precision": "fp32", "data": str(folder), "target": "world", "method": "cane"}, settings)


def stopped_in_stage3(config):
    "Run `config` until the second step of stage 3, which SIGTERM interrupts."
    add, left = StageRun.add, [2]
    def counted(stage, *args, **terms):
        left[0] -= stage.stage == "stage3"
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        add(stage, *args, **terms)
    with patch.object(StageRun, "add", counted), raise_on_sigterm(), pytest.raises(Terminated):
        run(config)


def test_a_run_of_cane_with_snr_goes_on_where_it_was_stopped(tmp_path):
    "The dropout of the head, the discriminator's turns and the losses of SNR included."
    whole = run(tiny(tmp_path, run="whole"))
    stopped_in_stage3(tiny(tmp_path, run="on"))
    assert (tmp_path/"runs/on/stage3/last.ckpt").is_file()
    assert run(tiny(tmp_path, run="on")) == whole and 0 < whole["mAP"] < 1
    assert whole["stages"].keys() == {"stage0", "stage2", "stage3"} and whole["domain_probe"] is None
    nets = [load_weights(tmp_path/f"runs/{name}/stage3/model.safetensors") for name in ("on", "whole")]
    assert all(torch.equal(v, nets[1][k]) for k, v in nets[0].items()) and "body.snr4.gate.fc2.bias" in nets[0]
    lines = load_jsonl(tmp_path/"runs/whole/log.jsonl")
    assert {line["run"] for line in lines if "snr" in line} == {"stage0", "stage2", "stage3"}
    assert {"d", "dm"} <= {name for line in lines if line["run"] == "stage3" for name in line}
    settings = load_json(tmp_path/"runs/whole/stage3/stage.json")["settings"]
    assert (settings["stage3"]["domains"], settings["stage3"]["head"], settings["labels"]) == ("camera", "cane", "none")
    net, *_ = load_net(tmp_path/"runs/whole/stage3")
    assert net.eval().embed(torch.randn(2, 3, 32, 16)).shape == (2, net.feature_dim) and net.body.snr1.averages is None


def test_the_rounds_of_cane_go_on_where_they_were_stopped(tmp_path, capsys):
    whole = run(tiny(tmp_path, run="whole", method="cane-rounds"))
    stopped_in_stage3(tiny(tmp_path, run="on", method="cane-rounds"))
    assert (tmp_path/"runs/on/stage3/last.ckpt").is_file()
    assert run(tiny(tmp_path, run="on", method="cane-rounds")) == whole and whole["stages"].keys() == {"stage0", "stage2", "stage3"}
    nets = [load_weights(tmp_path/f"runs/{name}/stage3/model.safetensors") for name in ("on", "whole")]
    assert all(torch.equal(v, nets[1][k]) for k, v in nets[0].items())
    before = load_weights(tmp_path/"runs/whole/stage2/model.safetensors")
    assert any(not torch.equal(v, before[k]) for k, v in nets[0].items() if "weight" in k)
    actions = [line["action"] for line in load_jsonl(tmp_path/"runs/whole/log.jsonl") if line["run"] == "stage3"]
    assert len(actions) == 2 and set(actions) <= {"hide", "repair", "restart"}
    assert load_json(tmp_path/"runs/whole/stage3/stage.json")["settings"]["rounds"]["epochs"] == 2
    longer = run(tiny(tmp_path, run="on", method="cane-rounds", **{"rounds.epochs": 3}), update=True)
    assert "stage3 goes on after 2 epochs" in capsys.readouterr().out
    assert longer["stages"]["stage2"] == whole["stages"]["stage2"]
    assert [line["action"] for line in load_jsonl(tmp_path/"runs/on/stage3/log.jsonl")][:2] == actions[:2]


@pytest.mark.parametrize("backbone", ["mgn", "cane_dual"])
def test_rounds_with_several_heads_train_what_was_trained_before(backbone):
    "Such a network has no bias of a BN neck; what is frozen stays frozen."
    net = build_backbone(BackboneConfig(backbone, width=8, stripes=1)).requires_grad_(True)
    frozen = next(iter(net.parameters())).requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    images, label = torch.randint(0, 256, (12, 3, 64, 32), dtype=torch.uint8, generator=rng), torch.arange(12) // 3
    data = TrainSet(images, label, torch.arange(12) % 2, torch.zeros(12, dtype=torch.int64))
    config = RoundsConfig(epochs=2, batch=6, lr=.01, head_epochs=1, head_fall=1, id_epochs=1, id_fall=1)
    trained, history = cane_rounds(net, data, config, device="cpu")
    assert len(history) == 2 and torch.equal(next(iter(trained.parameters())), frozen)
    flags = [[p.requires_grad for p in n.parameters()] for n in (net, trained)]
    assert flags[0] == flags[1] and not flags[1][0]


@pytest.mark.parametrize("method", ["cane", "cane-rounds"])
def test_cane_without_cameras_is_refused_before_anything_is_trained(method, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path/"a").mkdir()
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), np.uint8)).save(tmp_path/f"a/{i // 2}_{i}.png")
    config = tiny(tmp_path, synthetic=f"folder:{tmp_path/'a'}", pattern=r"(?P<pid>\d+)_", method=method)
    with pytest.raises(DomainMixError, match=f"{method}: not all cameras of A are known"):
        run(config)
    assert not list(tmp_path.rglob("stage0"))


def test_the_network_of_the_package_does_not_fit_snr():
    fits, changed = configure(real="folder:crops"), configure(SMALL_SETTINGS, {"net.snr": True}, real="folder:crops")
    assert (starting_weights(fits), starting_weights(changed)) == ("builtin", "none")


@pytest.mark.parametrize("settings", [{}, pytest.param({"view": "both", "parts": True}, marks=pytest.mark.slow)])
def test_snr_is_exported_for_batches_of_any_size(settings):
    net = build_backbone(BackboneConfig(width=8, stripes=2, snr=True, **settings)).eval()
    features, images = FeatureExtractor(net), torch.randint(0, 256, (3, 3, 64, 32), dtype=torch.uint8)
    program = export_program(features, 64, 32).module()
    torch.testing.assert_close(program(images), features(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_views_and_a_larger_batch_norm_group_train_with_snr(tmp_path):
    found = run(tiny(tmp_path, run="two", method="only-a", all_stages=False, **{
        "net.view": "both", "net.parts": True, "pretrain.samples_per_bn": 4, "stage2.ema": .9, "stage2.iterations": 2}))
    assert 0 < found["mAP"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("labeller", ["spcl", "mmt", "plain"])
def test_stage_1_with_snr(labeller, tmp_path):
    "SpCL has no identity loss and no loss of SNR; the two others report it."
    method = {"spcl": "stage1"}.get(labeller, f"stage1-{labeller}")
    run(with_overrides(tiny(tmp_path, run="b"), {"real": "world", "method": method, "all_stages": False}))
    lines = [line for line in load_jsonl(tmp_path/"runs/b/log.jsonl") if line["run"].startswith("stage1")]
    assert lines and all(("snr" in line) == (labeller != "spcl") for line in lines if "iterations" in line)
