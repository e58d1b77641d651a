"""Everything that wants a GPU, in one go: `python benchmarks/gpu.py --out FILE.json`.

Draws the world at the size of RandPerson and MSMT17, trains every stage for a while, and looks where time and memory go; and whether
the GPU answers what the CPU answers. The file is written after every section, so that a kill keeps what was measured.
`--device cpu --tiny` runs all of it in miniature, on any machine.
"""
import argparse
import sys
import traceback
from dataclasses import replace

import numpy as np
import torch

from domainmix.bodies import BackboneConfig
from domainmix.backbone import build_backbone
from domainmix.batches import TrainSet, union
from domainmix.bench.speed import cluster_after_knn, bench_features, machine_info, neighbour_recall
from domainmix.bench.training import STEP_PARTS, bench_input, bench_step, measure, mark_training_steps
from domainmix.core import DomainMixError, generator, pick_device
from domainmix.files import save_json
from domainmix.evaluation import rank
from domainmix.knn import knn
from domainmix.loading import embed_images
from domainmix.pseudolabel import ClusterConfig, cluster
from domainmix.spcl import SpCLConfig, adapt
from domainmix.schedule import DomainConfig, TrainConfig
from domainmix.training import train, train_invariant
from domainmix.world import STYLES, draw_domain, sample_sightings

# About as many images an identity as RandPerson (16.5) and MSMT17 (31) have.
A = replace(STYLES["a"], cameras=19, cameras_per_id=(3, 8))
B = replace(STYLES["b"], cameras=15, cameras_per_id=(4, 8), images_per_camera=(4, 8), passers_by=0.1)
PER_ID = {"a": 16.5, "b": 32.6}
TINY = dict(a_images=160, b_images=120, height=32, width=16, backbone="small", net_width=8, stripes=2, iterations=3, epochs=2, batch=16,
            part=100, rows=600, dim=64, k=5, step_batch=8, input_images=16, input_batch=8)


def settings(argv=None):
    "What to measure, and at which size."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--out", required=True, help="the results (.json)")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--tiny", action="store_true", help="all sizes so small that a CPU is done within a minute")
    add("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), help="which to run, in the order of the list")
    add("--a-images", type=int, default=132_145, help="drawn images of A: RandPerson has 132,145")
    add("--b-images", type=int, default=32_621, help="drawn images of B: MSMT17 has 32,621 to train on")
    add("--height", type=int, default=256)
    add("--width", type=int, default=128)
    add("--backbone", default="resnet50", help="from random weights")
    add("--net-width", type=int, default=32, help="channels of the first stage, of 'small'")
    add("--stripes", type=int, default=4)
    add("--epochs", type=int, default=2, help="of every stage; an even number")
    add("--iterations", type=int, default=200, help="of every epoch")
    add("--batch", type=int, default=64, help="images of a training step; a multiple of 4. Stage 1 takes as many of each domain")
    add("--part", type=int, default=4096, help="images on which the CPU is asked too, and that are profiled")
    add("--rows", type=int, default=132_145, help="features whose neighbours are timed")
    add("--dim", type=int, default=2048, help="numbers of such a feature")
    add("--k", type=int, default=30, help="neighbours")
    add("--step-batch", type=int, default=64, help="images of the step that is timed in four variants")
    add("--input-images", type=int, default=640, help="files of the usual input chain")
    add("--input-batch", type=int, default=64, help="images of a batch of input")
    if "--tiny" in (sys.argv[1:] if argv is None else argv): p.set_defaults(**TINY)
    return p.parse_args(argv)


class Bench:
    "The settings, what sections share, and the results so far."
    def __init__(self, args):
        self.args, self.device, self.results = args, pick_device(args.device), {}
        self.size = args.height, args.width
        self.few = dict(epochs=args.epochs, iterations=args.iterations, p=args.batch // 4, k=4)
        self._sets = None
        self.net = build_backbone(BackboneConfig(args.backbone, width=args.net_width, stripes=args.stripes))

    def say(self, text): print(text, flush=True)

    def keep(self, name, result):
        "Put a result beside the others, and all of them on disk."
        self.results[name] = result
        save_json(self.args.out, self.results)

    @property
    def sets(self):
        "A and B as they were drawn."
        if self._sets is None and "world" in self.results: raise DomainMixError("A and B were not drawn", "see the section 'world'")
        if self._sets is None: world(self)
        return self._sets

    def mixture(self, most=None):
        "A and B in one, with their true identities; `most` images of each."
        return union(*(s.subset(slice(most)) for s in self.sets))

    def watch(self, stage):
        "Throughput, parts and memory of a stage, and what it gives."
        lines = []
        with mark_training_steps(self.device) as mark: result, cost = measure(lambda: stage(lambda **line: lines.append(line)))
        parts = {part: mark.seconds().get(part, 0.) for part in STEP_PARTS}
        images = mark.count("input") * self.args.batch * (2 if lines[0]["stage"] == "stage1" else 1)
        row = dict(whole=cost, steps=mark.count("input"), parts_seconds=parts, shares=mark.shares(), between_epochs_seconds=mark.seconds().get("between epochs", 0.),
                   images_per_s=images / max(sum(parts.values()), 1e-9), log=lines)
        self.say(f"{row['images_per_s']:,.0f} images/s, " + ", ".join(f"{k} {v:.0%}" for k, v in row["shares"].items()) + f", {memory(cost):,.0f} MB")
        return result, row


def memory(cost): return cost.get("gpu_megabytes") or cost["megabytes"] or 0


def some(style, name, n):
    "A roster of `n` images of `style`, and the style with the identities it takes."
    style = replace(style, ids=int(1.1 * n / PER_ID[name]) + 8)
    seen = sample_sightings(style, generator(0, "world", name, "roster"))
    return style, {column: rows[:n] for column, rows in seen.items()}


def world(b):
    "Draw A and B on the device."
    row, sets = {}, []
    for domain, (name, style, n) in enumerate((("a", A, b.args.a_images), ("b", B, b.args.b_images))):
        style, seen = some(style, name, n)
        drawn, cost = measure(lambda: draw_domain(style, 0, b.size, b.device, name, seen, progress=f"drawing {name.upper()}"))
        pid = drawn.pid.unique(return_inverse=True)[1]
        sets.append(TrainSet(drawn.images, pid, drawn.camera, torch.full_like(pid, domain)))
        row[name] = dict(images=len(drawn), identities=drawn.n_ids, images_per_s=len(drawn) / cost["seconds"], **cost)
        b.say(f"{name.upper()}: {len(drawn):,} images of {drawn.n_ids:,} people, {row[name]['images_per_s']:,.0f} images/s")
    b._sets = sets
    return row


def stage0(b):
    "Stage 0: on A alone; its network is where stage 1 starts."
    done, row = b.watch(lambda log: train(b.net, b.sets[0], TrainConfig(**b.few), stage="stage0", device=b.device, log=log))
    b.trained = done.net.cpu()
    return row


def stage1(b):
    "Stage 1: adapt to B, clustered every epoch."
    (a, real), config = b.sets, SpCLConfig(**b.few, cluster=ClusterConfig(reliability=False))   # so young a network gives few clusters to believe
    (_, clusters, _), row = b.watch(lambda log: adapt(getattr(b, "trained", b.net), a, real.images, real.camera, config, device=b.device, log=log, truth=real.label.numpy()))
    return row | dict(clusters=clusters.n_clusters)


def stage2(b):
    "Stage 2: on A and B, with B's true identities for labels."
    data = b.mixture()
    done, row = b.watch(lambda log: train(b.net, data, TrainConfig(**b.few), device=b.device, log=log))
    b.classifier, b.second = done.classifier, done.net.cpu()
    return row


def stage3(b):
    "Stage 3: the same with a discriminator in turn."
    data = b.mixture()
    _, row = b.watch(lambda log: train_invariant(getattr(b, "second", b.net), data, DomainConfig(**b.few), device=b.device, log=log, classifier=getattr(b, "classifier", None)))
    return row


def profile(b):
    "The ten costliest operators of stage 2."
    from torch.profiler import ProfilerActivity, profile as profiler
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (b.device.type == "cuda")
    config, data = TrainConfig(**b.few | dict(epochs=1, iterations=min(b.args.iterations, 20))), b.mixture(b.args.part)
    train(b.net, data, replace(config, iterations=2), device=b.device)                       # whatever is slow the first time
    with profiler(activities=kinds) as p: train(b.net, data, config, device=b.device)
    own = (lambda e: e.self_device_time_total) if b.device.type == "cuda" else (lambda e: e.self_cpu_time_total)
    events = sorted(p.key_averages(), key=own, reverse=True)
    if b.device.type == "cuda":                                                              # kernels, or the operators that start them: not both
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    whole = max(sum(map(own, events)), 1e-9)
    top = [dict(name=e.key, calls=e.count, milliseconds=own(e) / 1e3, share=own(e) / whole) for e in events[:10]]
    for t in top: b.say(f"{t['share']:6.1%} {t['milliseconds']:10,.1f} ms {t['calls']:7,} x {t['name'][:80]}")
    return dict(iterations=config.iterations, top=top)


def precision(b):
    "Do bf16 and fp32 see the same losses?"
    config = TrainConfig(**b.few | dict(epochs=4, iterations=1), lr=3.5e-5)
    data, losses = b.mixture(b.args.part), {}
    for kind in ("fp32", "bf16"):
        lines = train(b.net, data, replace(config, precision=kind), device=b.device).history
        losses[kind] = [line["loss"] for line in lines]
    off = [abs(x - y) / abs(x) for x, y in zip(*losses.values())]
    b.say(f"losses of four steps: fp32 {losses['fp32']}, bf16 {losses['bf16']}")
    return dict(losses=losses, relative_difference=off, agrees=off[0] < 0.02)


def clustering(b):
    "Features of B and their clusters; neighbours of as many rows as RandPerson has, and all that follows."
    net, x = getattr(b, "trained", b.net).to(b.device), b.sets[1].images
    features, cost = measure(lambda: embed_images(net, x, b.device))
    row = dict(embed=dict(images_per_s=len(x) / cost["seconds"], **cost))
    _, row["cluster"] = measure(lambda: cluster(features, ClusterConfig()))
    row["cluster"]["images"] = len(x)
    x, c = bench_features(b.args.rows, b.args.dim)[0], ClusterConfig(k1=b.args.k).resolved(b.args.rows)
    lists, row["neighbours"] = measure(lambda: knn(x.to(b.device), c.k1))
    clusters, row["after"] = measure(lambda: cluster_after_knn(x, *lists, c))
    row |= dict(rows=b.args.rows, dim=b.args.dim, clusters=clusters.n_clusters)
    b.say(f"{row['embed']['images_per_s']:,.0f} images/s embedded; clusters of {len(features):,} in {row['cluster']['seconds']:.1f} s; "
          f"neighbours of {b.args.rows:,} in {row['neighbours']['seconds']:.1f} s, then {row['after']['seconds']:.1f} s")
    return row


def agreement(b):
    "Neighbours and ranking on the device and on the CPU, of the same features."
    n = max(b.args.part, 64)
    x, pid, camera = bench_features(n, b.args.dim)
    exact, similarity = knn(x, b.args.k, "fp32")
    row, on = dict(part=n, knn={}), x.to(b.device)
    for method in ("auto", "fp32", "bf16"):
        there, s = knn(on, b.args.k, method)
        row["knn"][method] = dict(found=neighbour_recall(exact, there), similarity_off=float(np.abs(s - similarity).max()))
    q = n // 4
    people = pid[:q], pid[q:], camera[:q], camera[q:]
    cpu, gpu = rank(x[:q], x[q:], *people), rank(on[:q], on[q:], *people)
    row["rank"] = dict(mAP_cpu=cpu.mAP, mAP_device=gpu.mAP, cmc_off=float(np.abs(np.asarray(cpu.cmc) - np.asarray(gpu.cmc)).max()))
    row["agrees"] = (all(v["found"] > 0.9999 and v["similarity_off"] < 1e-5 for v in row["knn"].values())
                     and abs(cpu.mAP - gpu.mAP) < 1e-5 and row["rank"]["cmc_off"] < 2 / q)
    b.say(f"{row['knn']}\n{row['rank']}")
    return row


def step(b):
    "One training step in four variants."
    a = b.args
    ways = {} if not a.tiny else dict(ways=("usual", "channels_last", "bf16"), rounds=2, classes=50)      # compiling takes a minute
    return bench_step(a.step_batch, a.backbone, *b.size, device=str(b.device), tell=b.say, **ways)


def files(b):
    "From file to tensor: the usual chain and ours."
    return bench_input(b.args.input_images, b.args.input_batch, *b.size, rounds=3 if b.args.tiny else 15, device=str(b.device), tell=b.say)


SECTIONS = dict(agreement=agreement, step=step, input=files, world=world, stage0=stage0, stage1=stage1, stage2=stage2, stage3=stage3,
                profile=profile, precision=precision, clustering=clustering)


def main(argv=None):
    "Run the sections; the exit code is 1 where one failed or an answer disagrees."
    args = settings(argv)
    b = Bench(args)
    b.keep("machine", machine_info(torch.get_num_threads(), b.device))
    b.keep("settings", {k: v for k, v in vars(args).items() if k != "out"})
    wrong = []
    for name in args.sections:
        b.say(f"-- {name}: {SECTIONS[name].__doc__}")
        try:
            result, cost = measure(lambda: SECTIONS[name](b))
            b.keep(name, result | dict(section_seconds=cost["seconds"]))
            if result.get("agrees") is False: wrong.append(f"{name}: the answers disagree")
        except Exception as e:                               # the others are still worth having
            b.keep(name, dict(error=f"{type(e).__name__}: {e}", where=traceback.format_exc().splitlines()[-6:]))
            wrong.append(f"{name}: {type(e).__name__}: {e}")
    b.say(f"\n{args.out}")
    for line in wrong: print(line, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
