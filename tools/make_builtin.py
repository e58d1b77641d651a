"""Make the networks in the package: `python tools/make_builtin.py` and `python tools/make_builtin.py --height 128`.

Each is stage 0 of a run with the default settings, but longer, and with more people and more cameras than a run has.
The people are drawn in the three styles of the embedded world. Seeds are fixed. A run that was stopped goes on from its
checkpoint in `--folder`. On two CPU cores without AVX-512, the first takes about an hour.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from domainmix.batches import TrainSet
from domainmix.builtin import BUILTINS
from domainmix.core import to_dict, with_overrides
from domainmix.files import Log, save_weights
from domainmix.runs.settings import configure
from domainmix.runs.stages import header_aspect, initial_net
from domainmix.training import train
from domainmix.world import STYLES, draw_domain
from sync import ROOT

PEOPLE = {"a": dict(ids=3000, cameras=30), "b": dict(ids=1500, cameras=20, look_alikes=0.), "c": dict(ids=1500, cameras=20)}
SEED, STEPS = 2026, 3000
HEIGHTS = dict(zip((64, 128), BUILTINS))   # rows of an image -> network


def draw_people(size, parts=PEOPLE):
    "Labelled people of several styles; those whom only one camera sees are left out."
    images, label, camera, n_ids, n_cameras = [], [], [], 0, 0
    for name, change in parts.items():
        style = replace(STYLES[name], passers_by=0., **change)
        drawn = draw_domain(style, SEED, size, name=name, progress=f"drawing {name}")
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
    parser.add_argument("--height", type=int, default=64, choices=HEIGHTS, help="rows of an image; it has half as many columns")
    parser.add_argument("--folder", help="for the checkpoint; default: data/NAME of the network")
    parser.add_argument("--out", help="default: domainmix/NAME.safetensors")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    size, name = (args.height, args.height // 2), HEIGHTS[args.height]
    length = {"pretrain.epochs": max(1, args.steps // 50), "pretrain.iterations": 50}
    config = configure(height=size[0], width=size[1], **{"net.weights": "none"}, **length)
    data, folder = draw_people(size), Path(args.folder or ROOT / "data" / name)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(data.images):,} images of {data.n_classes:,} people")
    net = train(initial_net(config), data, config.pretrain, stage="stage0", device=args.device, folder=folder, log=Log(folder / "log.jsonl")).net
    trained = dict(people=data.n_classes, images=len(data.images), steps=config.pretrain.epochs * 50, seed=SEED)
    about = dict(backbone=to_dict(replace(config.net, weights="none")), height=config.height, width=config.width, feature=config.feature,
                 flip=config.flip, **header_aspect(config), trained=trained, licence="Apache-2.0")
    print(save_weights(args.out or ROOT / "domainmix" / f"{name}.safetensors", halved(net.cpu().state_dict()), **about))


if __name__ == "__main__":
    main()
