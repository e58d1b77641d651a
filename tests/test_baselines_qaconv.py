"""A run with a matcher: from the settings to its scores, with a stop in the middle, and what a matcher refuses."""
import io
import signal
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from domainmix import inference
from domainmix.baselines.qaconv import build_matcher, QAConvNet
from domainmix.bodies import BackboneConfig
from domainmix.checkpoint import StageRun
from domainmix.core import DomainMixError
from domainmix.deploy import export
from domainmix.files import Terminated, load_json, load_jsonl, raise_on_sigterm, weights_metadata
from domainmix.gallery import search
from domainmix.runs.pipeline import run
from domainmix.runs.settings import TINY_SETTINGS, configure, setting_faults
from domainmix.runs.stages import load_net
from domainmix.runs.tables import run_methods
from domainmix.views.results import Results

VERSIONS = {"memory": {}, "masked": {"qaconv.mask_unseen": True, "qaconv.batches": "pk"},
            "graph": {"qaconv": {"version": "2.1", "freeze_bn": "off"}},
            "snr": {"net": {"snr": True}, "qaconv.batches": "pk"}}


def tiny(data, name, changes, **more):
    return configure(TINY_SETTINGS, changes, method="qaconv", target="world", run=name, data=str(data), **more)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_that_is_stopped_in_an_epoch_ends_with_the_same_scores(version, tmp_path, monkeypatch):
    whole = run(tiny(tmp_path, "whole", VERSIONS[version]))
    assert 0 < whole["mAP"] < 1 and list(whole["stages"]) == ["stage2"] and whole["domain_probe"] is None
    steps, add = [], StageRun.add
    def stop_in_fifth(self, *args, **terms):
        steps.append(1)
        if len(steps) == 5: signal.raise_signal(signal.SIGTERM)
        return add(self, *args, **terms)
    with monkeypatch.context() as m, raise_on_sigterm(), redirect_stdout(io.StringIO()):
        m.setattr(StageRun, "add", stop_in_fifth)
        with pytest.raises(Terminated): run(tiny(tmp_path, "stopped", VERSIONS[version]))
    resumed = run(tiny(tmp_path, "stopped", VERSIONS[version]))
    assert len(steps) == 5 and resumed == whole
    log = load_jsonl(tmp_path/"runs/stopped/stage2/log.jsonl")
    assert all(line.get("snr", 0) > 0 for line in log) == (version == "snr")
    a, b = (load_net(tmp_path/"runs"/name/"stage2")[0].state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_style_normalisation_stands_in_a_matcher_and_only_where_it_has_stages():
    net = build_matcher(BackboneConfig(width=8, snr=True), 32, 16)
    assert [name for name, _ in net.body.named_children() if name.startswith("snr")] == ["snr1", "snr2", "snr3"]
    assert net.grid == build_matcher(BackboneConfig(width=8), 32, 16).grid
    for snr, said in (dict(snr=True, snr_stages=(4,)), "first three stages"), (dict(snr=True), "qaconv.batches"):
        assert said in setting_faults(tiny("data", "x", {"net": snr}))[0].what


def test_the_file_says_that_it_is_a_matcher_and_what_needs_features_refuses_it(tmp_path):
    found = run(tiny(tmp_path, "pairs", {}, real="world"))
    data = str(tmp_path)
    file, images = tmp_path/"runs/pairs/stage2/model.safetensors", next(tmp_path.glob("world/c-*/query"))
    assert weights_metadata(file)["matcher"] == {"version": "1.0"} and isinstance(load_net(file)[0], QAConvNet)
    assert inference.evaluate_model("pairs", "world", data=data)["mAP"] == found["mAP"]
    pairs, out = inference.load_matcher(file, device="cpu"), tmp_path/"out"
    scores = pairs.score(images, images)
    assert scores.shape == (20, 20) and np.allclose(scores, pairs.score(images, images), atol=1e-6)
    spec, refused = f"folder:{images}", "has no feature of one image"
    for use in (lambda: inference.load("pairs", data), lambda: inference.embed("pairs", images, data=data),
                lambda: inference.embed_to_file("pairs", spec, out, data=data),
                lambda: inference.tune("pairs", spec, out, data=data),
                lambda: search("pairs", images, images, data=data), lambda: export("pairs", out, data=data),
                lambda: Results("pairs", data).features("stage2", "query"),
                lambda: inference.embed_to_file("pairs", spec, out, data=data, camera_norms=True),
                lambda: inference.evaluate_model("pairs", "world", data=data, centre_cameras=True),
                lambda: inference.evaluate_model("pairs", "world", data=data, camera_norms=True)):
        with pytest.raises(DomainMixError, match=refused): use()


def test_a_table_has_an_ordinary_method_and_a_matcher_side_by_side(tmp_path):
    base = configure(TINY_SETTINGS, target="world", data=str(tmp_path), run="both")
    rows = run_methods(base, methods=("only-a", "qaconv"), seeds=(0,))
    assert [r["method"] for r in rows] == ["only-a", "qaconv"] and all(0 < r["mAP"] < 1 for r in rows)
    for row, is_matcher in zip(rows, (False, True)):
        net = load_net(tmp_path/"runs/both"/row["model"])[0]
        assert isinstance(net, QAConvNet) == is_matcher
    with pytest.raises(DomainMixError, match="is no matcher"):
        inference.load_matcher(tmp_path/"runs/both"/rows[0]["model"], device="cpu")
    assert load_json(tmp_path/"runs/both/config.json")["methods"] == ["only-a", "qaconv"]


def test_other_match_bytes_change_no_stage(tmp_path):
    first = run(tiny(tmp_path, "m", {}))
    before = (tmp_path/"runs/m/stage2/model.safetensors").stat().st_mtime_ns
    assert run(tiny(tmp_path, "m", {}, match_bytes=10**6)) == first
    assert (tmp_path/"runs/m/stage2/model.safetensors").stat().st_mtime_ns == before
