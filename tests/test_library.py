"""The library's face: `import domainmix` offers a few names and imports nothing else before they are used."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import domainmix
from domainmix.readers import write_images
from domainmix.runs.settings import TINY_SETTINGS, configure
from domainmix.world import toy_domain
from sync import ROOT

NAMES = {"load", "embed", "cluster", "refine", "rank", "run", "search", "find_threshold"}


def test_the_names_are_offered():
    assert set(domainmix.__all__) == NAMES and NAMES | {"__version__"} <= set(dir(domainmix))
    assert all(callable(getattr(domainmix, name)) and name in domainmix.__doc__ for name in NAMES)
    with pytest.raises(AttributeError, match="'domainmix' has no attribute 'lod'"):
        domainmix.lod


def test_the_import_is_light():
    code = """
import sys, domainmix
assert domainmix.__version__ and set(domainmix.__all__) <= set(dir(domainmix))
heavy = {"torch", "numpy", "scipy", "sklearn", "PIL", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
sys.modules["torch"] = None
try: domainmix.rank
except ModuleNotFoundError as e: assert e.name == "torch", e
else: sys.exit("where does domainmix.rank come from?")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def test_from_a_run_to_features_clusters_labels_and_scores(tmp_path):
    config = configure(TINY_SETTINGS, dict(target="world", run="tiny", method="only-a", data=str(tmp_path)))
    assert domainmix.run(config)["mAP"] > 0
    images, pid, camera = toy_domain(10, 6, 2, size=(48, 20))
    names = [f"{i:02}.png" for i in range(len(images))]
    write_images(tmp_path/"crops", names, images)

    model = domainmix.load(tmp_path/"runs/tiny", device="cpu")
    features = domainmix.embed(model, tmp_path/"crops")
    assert features.dtype == np.float32 and features.shape == (60, model.net.feature_dim)
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5) and str(tmp_path) not in repr(model)
    paths = [tmp_path/"crops"/name for name in names]
    forms = [[str(p) for p in paths], [Image.open(p) for p in paths], [i.permute(1, 2, 0).numpy() for i in images], images, images.numpy()]
    for form in forms:
        np.testing.assert_allclose(domainmix.embed(model, form), features, atol=1e-6)
    np.testing.assert_allclose(domainmix.embed("tiny", paths[7], data=tmp_path, device="cpu"), features[7:8], atol=1e-6)

    clusters = domainmix.cluster(np.random.default_rng(0).normal(size=(10, 16)).repeat(6, 0) + .01*torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).numpy())
    labels = domainmix.refine(clusters.labels, 2, 120)
    assert labels.shape == (60,) and labels.max() >= 1
    query = camera.numpy() == 0
    scores = domainmix.rank(features[query], features[~query], pid[query], pid[~query], camera[query], camera[~query])
    assert 0 < scores.mAP <= 1 and scores.cmc[0] <= scores.cmc[-1]
