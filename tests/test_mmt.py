"""MMT in a run: its second network, a run that is stopped and goes on, runs of earlier versions."""
import signal
from unittest.mock import patch

import pytest
import torch

from domainmix.checkpoint import StageRun
from domainmix.core import DomainMixError
from domainmix.files import load_json, load_jsonl, load_weights, raise_on_sigterm, save_json, Terminated
from domainmix.runs.inputs import read_inputs
from domainmix.runs.pipeline import plan_stages, run
from domainmix.runs.settings import TINY_SETTINGS, configure, validate_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "One data folder for all tests, so that the world is drawn once."
    return tmp_path_factory.mktemp("mmt")


def tiny(home, name="tiny", **settings):
    return configure(TINY_SETTINGS, {"method": "stage1-mmt", "all_stages": False}, settings, real="world", target="world", run=name, data=str(home))


def stopped_at(steps, config):
    "The result of a run that gets SIGTERM at these training steps, counted over all stages and calls, and is started again."
    add, done, stops = StageRun.add, [0], 0
    def count(self, *a, **kw):
        done[0] += 1
        if done[0] in steps: signal.raise_signal(signal.SIGTERM)
        return add(self, *a, **kw)
    while True:
        try:
            with patch.object(StageRun, "add", count), raise_on_sigterm(): result = run(config)
        except Terminated: stops += 1
        else:
            assert stops == len(steps)
            return result


@pytest.mark.parametrize("name, settings, first", [
    ("authors", {"mmt": {"cluster": {"method": "kmeans", "n_clusters": 8}, "dropout": .5, "pretrain_real": True}}, "stage0-mmt"),
    pytest.param("eps", {"mmt": {"eps_share": .1, "lr": 1e-4}}, "stage0", marks=pytest.mark.slow),
])
def test_a_run_with_mmt_that_is_stopped_twice_ends_the_same(name, settings, first, home):
    whole = run(tiny(home, f"whole-{name}", **settings))
    again = stopped_at((8, 16), tiny(home, f"stopped-{name}", **settings))       # in the second network, and in stage 1
    assert again == whole
    folders = [home/f"runs/{r}-{name}" for r in ("whole", "stopped")]
    assert sorted(p.parent.name for p in folders[0].glob("*/stage.json")) == [first, "stage0-second", "stage1"]
    log = load_jsonl(folders[0]/"stage1/log.jsonl")
    assert all(line["apart"] > .1 for line in log)                           # two networks from the start
    if name == "eps": assert len({line["eps"] for line in log}) == 1 and log[0]["eps"] != .6
    else: assert [line["clusters"] for line in log] == [8, 8] and not any(line["outliers"] for line in log)
    for stage in (first, "stage0-second", "stage1"):
        a, b = (load_weights(folder/stage/"model.safetensors") for folder in folders)
        assert all(torch.equal(a[k], b[k]) for k in a), stage


def test_methods_share_both_networks(home):
    configs = [validate_config(tiny(home, method=m, labeller="mmt", start=start)) for m, start in (("stage1-mmt", "stage1"), ("directmix", "stage0"))]
    plans = [{s.name: s for s in plan_stages(c, read_inputs(c), home, shared=True)} for c in configs]
    assert list(plans[0]) == ["stage0", "stage0-second", "stage1-mmt"]
    assert all(plans[1][name].key == stage.key for name, stage in plans[0].items())
    assert [s.name for s in plans[0]["stage1-mmt"].depends_on] == ["stage0", "stage0-second"]
    other = validate_config(tiny(home, seed=1))
    keys = {s.key for c in (configs[0], other) for s in plan_stages(c, read_inputs(c), home, shared=True)}
    assert len(keys) == 6                                                    # no network of two seeds is the same


def test_a_run_of_an_earlier_version_is_kept_until_it_is_updated(home):
    now = tiny(home, "old", mmt={"second": "copy"})
    before, folder = run(now), home/"runs/old"
    for file in (folder/"config.json", folder/"stage1/stage.json"):              # as a version without these settings wrote it
        record = load_json(file)
        for name in ("second", "ema_warmup"): del record.get("settings", record)["mmt"][name]
        save_json(file, record | ({"hash": "earlier"} if "hash" in record else {}))
    with pytest.raises(DomainMixError) as error: run(now)
    assert "mmt.second" in str(error.value) and "stage1 would be done again" in str(error.value) and "stage0 kept" in str(error.value)
    assert load_json(folder/"metrics.json") == before
    assert run(now, update=True)["mAP"] == before["mAP"]


def test_more_clusters_than_images_is_said_before_training(home):
    with pytest.raises(DomainMixError, match="60 images cannot be divided into 500 clusters") as error:
        run(tiny(home, "many", mmt={"cluster": {"method": "kmeans", "n_clusters": 500}}))
    assert "mmt.cluster.n_clusters" in str(error.value) or "mmt.cluster.n-clusters" in str(error.value)
    assert not (home/"runs/many").exists()
