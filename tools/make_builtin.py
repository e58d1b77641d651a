"""Make the network in the package: `python tools/make_builtin.py`.

It is stage 0 of a run with the default settings, but longer, and with more people and more cameras than a run has. The
people are drawn in the three styles of the embedded world. Seeds are fixed. A run that was stopped goes on from its
checkpoint in `--folder`. On two CPU cores it takes about an hour.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from domainmix.batches import TrainSet
from domainmix.builtin import BUILTIN
from domainmix.core import to_dict, with_overrides
from domainmix.files import Log, save_weights
from domainmix.runs.settings import configure
from domainmix.runs.stages import header_aspect, initial_net
from domainmix.training import train
from domainmix.world import STYLES, draw_domain
from sync import ROOT

PEOPLE = {"a": dict(ids=3000, cameras=30), "b": dict(ids=1500, cameras=20, look_alikes=0.), "c": dict(ids=1500, cameras=20)}
SEED, STEPS = 2026, 3000


def draw_people(parts=PEOPLE):
    "Labelled people of several styles; those whom only one camera sees are left out."
    images, label, camera, n_ids, n_cameras = [], [], [], 0, 0
    for name, change in parts.items():
        drawn = draw_domain(replace(STYLES[name], passers_by=0., **change), SEED, name=name, progress=f"drawing {name}")
        people, row = np.unique(np.asarray(drawn.pid), return_inverse=True)
        images.append(drawn.images)
        label.append(torch.from_numpy(row) + n_ids)
        camera.append(torch.as_tensor(drawn.camera) + n_cameras)
        n_ids, n_cameras = n_ids + len(people), n_cameras + change["cameras"]
    label = torch.cat(label).long()
    return TrainSet(torch.cat(images), label, torch.cat(camera).long(), torch.zeros_like(label))


def halved(state):
    "Weights with 16 bits; the statistics of the norms, which are few, with 32."
    return {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", default=ROOT / "data" / BUILTIN, help="for the checkpoint")
    parser.add_argument("--out", default=ROOT / "domainmix" / f"{BUILTIN}.safetensors")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    config = configure(**{"net.weights": "none", "pretrain.epochs": max(1, args.steps // 50), "pretrain.iterations": 50})
    data, folder = draw_people(), Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(data.images):,} images of {data.n_classes:,} people")
    net = train(initial_net(config), data, config.pretrain, stage="stage0", device=args.device, folder=folder, log=Log(folder / "log.jsonl")).net
    trained = dict(people=data.n_classes, images=len(data.images), steps=config.pretrain.epochs * 50, seed=SEED)
    about = dict(backbone=to_dict(replace(config.net, weights="none")), height=config.height, width=config.width, feature=config.feature,
                 flip=config.flip, **header_aspect(config), trained=trained, licence="Apache-2.0")
    print(save_weights(args.out, halved(net.cpu().state_dict()), **about))


if __name__ == "__main__":
    main()
