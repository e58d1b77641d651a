"""The sections of benchmarks/gpu.py. Each takes a `Bench`, keeps its results part by part and returns the last part."""
import importlib.util
import time
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from domainmix import norms, spcl
from domainmix.backbone import build_backbone
from domainmix.batches import TrainSet
from domainmix.bench.speed import compile_stage1, neighbour_recall
from domainmix.bench.training import bench_input, bench_step, measure
from domainmix.bodies import BackboneConfig
from domainmix.capture import WARM_UP
from domainmix.checkpoint import StageRun, StageSteps
from domainmix.core import fingerprint, generator, pick_device
from domainmix.evaluation import rank
from domainmix.files import save_json
from domainmix.images import normalise
from domainmix.jaccard import jaccard_graph
from domainmix.knn import knn, toy_features, unit_rows
from domainmix.loading import embed_images, to_device_if_fits
from domainmix.norms import to_ghost_bn
from domainmix.optimiser import move_to_device
from domainmix.pseudolabel import ClusterConfig, Clusters, cluster_graph
from domainmix.runs.settings import configure
from domainmix.schedule import DomainConfig, TrainConfig
from domainmix.spcl import SpCLConfig, adapt
from domainmix.training import make_train_state, train, train_step
from domainmix.world import STYLES, draw_domain

# As many identities and images as RandPerson and MSMT17 have; a feature as long as ResNet-50's.
FULL = dict(height=256, width=128, batch=64, a_ids=8000, a_per_id=4, b_ids=1041, b_per_id=31, warm=25, timed=60,
            profiled=4, dim=2048, rows=(12_936, 32_621, 132_145), k1=30, queries=11_659, gallery=82_161, part=4096,
            drawn=4000, files=640, input_batch=64, rounds=10)
SMALL = dict(height=32, width=16, batch=8, a_ids=10, a_per_id=4, b_ids=6, b_per_id=8, warm=1, timed=2, profiled=1,
             dim=64, rows=(300, 500), k1=8, queries=60, gallery=400, part=120, drawn=30,
             files=16, input_batch=8, rounds=2)


class Bench:
    "The settings and sizes of a section, what was measured before it, and its own results so far."
    def __init__(self, args, results, deadline, file):
        self.args, self.results, self.deadline, self.file = args, results, deadline, file
        self.device = pick_device("cuda" if args.device == "auto" else args.device)
        self.small, self.row = args.small, {}
        self.sizes = SimpleNamespace(**(SMALL if args.small else FULL))
        self.gpu = self.device.type == "cuda"

    def keep(self, **parts):
        "Put parts of the results beside the others, and all of them on disk."
        self.row |= parts
        save_json(self.file, self.row)

    def left(self):
        "Seconds until the section is ended."
        return self.deadline - time.time()

    def wait(self):
        "Until the GPU has finished its work."
        if self.gpu: torch.cuda.synchronize(self.device)


def runs(b):
    "The default preset and ResNet-50-IBN through the pipeline to their end, each also with a kill and a resume."
    import gpu_runs
    return gpu_runs.runs(b)


def agreement(b):
    "The device and the CPU, or an oracle, on the same numbers."
    import gpu_agreement
    return gpu_agreement.agreement(b)


# ---- training steps

class Enough(Exception):
    "All that is measured of a stage was measured."


class StepWatch:
    "Times some steps of each epoch after a warm-up and profiles some more; ends the stage after the last epoch."
    def __init__(self, b, epochs):
        self.b, self.epochs, self.epoch = b, epochs, -1
        self.rows, self.losses = [{} for _ in range(epochs)], [[] for _ in range(epochs)]

    def steps(self, steps):
        "What takes the place of `StageSteps.steps`."
        def watched(run, all_steps):
            self.epoch += 1
            for i, step in enumerate(steps(run, all_steps)):
                self.before(i)
                yield step
        return watched

    def add(self, add):
        "What takes the place of `StageRun.add`: keeps the first losses."
        def watched(run, images, **terms):
            losses = self.losses[self.epoch]
            if len(losses) < 8: losses.append(next(iter(terms.values())).detach().clone())
            add(run, images, **terms)
        return watched

    def before(self, i):
        "Before step `i` of an epoch."
        s, row = self.b.sizes, self.rows[self.epoch]
        if i == s.warm: self.start_clock()
        if i == s.warm + s.timed:
            self.b.wait()
            row |= dict(milliseconds=(time.perf_counter() - self.start) / s.timed * 1e3, **self.memory())
            self.profile = start_profile(self.b)
        if i == s.warm + s.timed + s.profiled:
            row |= end_profile(self.b, self.profile, s.profiled)
            if self.epoch == self.epochs - 1: raise Enough

    def start_clock(self):
        self.b.wait()
        if self.b.gpu: torch.cuda.reset_peak_memory_stats(self.b.device)
        self.start = time.perf_counter()

    def memory(self):
        "Of the GPU, in megabytes: the most that tensors took, and what torch holds."
        if not self.b.gpu: return {}
        on = self.b.device
        return dict(peak_megabytes=torch.cuda.max_memory_allocated(on) / 1e6,
                    reserved_megabytes=torch.cuda.memory_reserved(on) / 1e6)


def start_profile(b):
    "A running profile of the GPU's work, or of the CPU's operators."
    from torch.profiler import ProfilerActivity, profile
    found = profile(activities=[ProfilerActivity.CUDA if b.gpu else ProfilerActivity.CPU])
    found.start()
    return found


def end_profile(b, profile, steps):
    "Kernels, copies and launches of one step; of the CPU, operators."
    b.wait()
    profile.stop()
    events = [e for e in profile.events() if not getattr(e, "is_user_annotation", False)]
    if not b.gpu:
        top = [e for e in events if e.cpu_parent is None]
        return dict(operators=len(top) / steps, top=heaviest(top, steps))
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e for e in on_gpu if e.name.startswith(("Memcpy", "Memset"))]
    marks = ("Memcpy", "Memset", "Optimizer.")
    kernels = [e for e in on_gpu if not e.name.startswith(marks)]
    calls = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    launches = [n for n in calls if "Launch" in n]
    return dict(kernel_milliseconds=duration(kernels) / steps, copy_milliseconds=duration(copies) / steps,
                kernels=len(kernels) / steps, copies=len(copies) / steps, launches=len(launches) / steps,
                graph_launches=sum("GraphLaunch" in n for n in launches) / steps, top=heaviest(kernels, steps))


def duration(events):
    "Milliseconds of all events together."
    return sum(e.time_range.elapsed_us() for e in events) / 1e3


def heaviest(events, steps, most=8):
    "The names that take most of the time."
    by_name = {}
    for e in events: by_name.setdefault(e.name, []).append(e)
    rows = [dict(name=name[:120], calls=len(found) / steps, milliseconds=duration(found) / steps)
            for name, found in by_name.items()]
    return sorted(rows, key=lambda r: -r["milliseconds"])[:most]


def noise_images(b, n):
    "Images of noise on the device, uint8 (n, 3, H, W)."
    return torch.randint(0, 256, (n, 3, b.sizes.height, b.sizes.width), dtype=torch.uint8, device=b.device,
                         generator=generator(0, "bench", "images", device=b.device))


def step_data(b):
    "A and B, as large as RandPerson and MSMT17 or as the memory allows, in one set of noise."
    s = b.sizes
    a_ids, b_ids = s.a_ids, s.b_ids
    if b.gpu:
        need = (a_ids * s.a_per_id + b_ids * s.b_per_id) * 3 * s.height * s.width
        share = min(1., torch.cuda.mem_get_info(b.device)[0] / 4 / need)
        a_ids, b_ids = (max(64, int(n * share)) for n in (a_ids, b_ids))
    pid = torch.cat([torch.arange(a_ids).repeat_interleave(s.a_per_id),
                     a_ids + torch.arange(b_ids).repeat_interleave(s.b_per_id)])
    return TrainSet(noise_images(b, len(pid)), pid, torch.arange(len(pid)) % 4, (pid >= a_ids).long())


@contextmanager
def known_labels(label):
    "Inside, stage 1 has these labels and a memory of noise: no features, no clustering."
    def fill(memory, net, union_batches, synthetic=True):
        rng = generator(0, "bench", "memory", device=memory.rows.device)
        memory.rows.copy_(F.normalize(torch.randn(memory.rows.shape, generator=rng, device=memory.rows.device)))
    zeros = np.zeros(len(label))
    found = Clusters(label, label, label, zeros, zeros, 1., label >= 0)
    with ExitStack() as inside:
        inside.enter_context(patch.object(spcl, "init_memory", fill))
        inside.enter_context(patch.object(spcl, "cluster_labels", lambda *_: (found, label)))
        yield


def cluster_numbers(pid):
    "Labels (N,) of the real images for stage 1: a sixth of the identities is in no cluster."
    label = np.where(pid % 6 == 0, -1, pid)
    return np.unique(label, return_inverse=True)[1].astype(np.int64) - 1


def stage_calls(b, data, net):
    "The names of what is watched in each epoch -> (images of a step, what trains: a function of the config's changes)."
    s, n_a = b.sizes, int((data.domain == 0).sum())
    a, images, camera = data.subset(slice(n_a)), data.images[n_a:], data.camera[n_a:]
    few = dict(p=s.batch // 4, k=4, iterations=s.warm + s.timed + s.profiled + 2, lr=1e-6)    # noise teaches nothing
    label = cluster_numbers(data.label[n_a:].numpy() - a.n_classes)
    rows = torch.randn(data.n_classes, net.feature_dim, generator=generator(0, "bench", "rows")) * 1e-3

    def stage1(change):
        config = change(SpCLConfig(epochs=1, **few))
        with known_labels(label): adapt(net, a, images, camera, config, device=b.device)

    def stage(config, data, classifier=None):
        return lambda change: train(net, data, change(config), device=b.device, classifier=classifier)
    return {("stage1",): (2 * s.batch, stage1),
            ("stage2",): (s.batch, stage(TrainConfig(epochs=1, **few), data)),
            ("stage3 discriminator", "stage3"): (s.batch, stage(DomainConfig(epochs=2, **few), data, rows)),
            ("stage0",): (s.batch, stage(TrainConfig(epochs=1, **few), a))}


def capture_modes(device):
    "The values of the setting `capture` to compare, eager first; a CPU has eager steps only."
    eager = {"eager": dict(capture="off")}
    return eager | {"captured": dict(capture="on")} if device.type == "cuda" else eager


def watch_stage(b, names, images, train_stage, changes):
    "Name -> what a step costs."
    watch = StepWatch(b, len(names))
    with ExitStack() as inside:
        inside.enter_context(patch.object(StageSteps, "steps", watch.steps(StageSteps.steps)))
        inside.enter_context(patch.object(StageRun, "add", watch.add(StageRun.add)))
        said = inside.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        began = time.perf_counter()
        try: train_stage(lambda config: replace(config, **changes))
        except Enough: pass
    more = dict(whole_seconds=time.perf_counter() - began)
    telling = ("captur", "graph", "compile")
    told = sorted({str(w.message)[:300] for w in said if any(word in str(w.message) for word in telling)})
    if told: more["warnings"] = told
    return {name: row | dict(images_per_s=images / row["milliseconds"] * 1e3, losses=[float(x) for x in losses], **more)
            for name, row, losses in zip(names, watch.rows, watch.losses)}


def stage_row(rows):
    "The modes of a stage side by side, the fastest of them, and how far losses are from those of the first."
    good = {mode: row for mode, row in rows.items() if "images_per_s" in row}
    if not good: return rows
    name = max(good, key=lambda mode: good[mode]["images_per_s"])
    best = dict(mode=name, images_per_s=good[name]["images_per_s"], milliseconds=good[name]["milliseconds"])
    if len(good) < 2: return rows | dict(best=best)
    first, *others = (row["losses"] for row in good.values())
    off = max(abs(x - y) / max(abs(x), 1e-3) for losses in others for x, y in zip(first, losses))
    return rows | dict(best=best, losses_off=off)


def steps(b):
    "A step of every stage: time, kernels and memory, eager beside captured."
    net = build_backbone(BackboneConfig("small" if b.small else b.args.backbone, width=8 if b.small else 32, stripes=1))
    data, modes, wrong = step_data(b), capture_modes(b.device), []
    for names, (images, call) in stage_calls(b, data, net).items():
        rows = {name: {} for name in names}
        for mode, changes in modes.items():
            if b.gpu: torch.cuda.empty_cache()
            try: found = watch_stage(b, names, images, call, changes)
            except Exception as error:
                traceback.print_exc()
                found = dict.fromkeys(names, dict(error=f"{type(error).__name__}: {error}"[:1000]))
                wrong.append(f"{names[-1]}, {mode}: {found[names[-1]]['error']}")
            for name in names: rows[name][mode] = found[name]
            b.keep(**{name: stage_row(row) for name, row in rows.items()})
    b.keep(plain=plain_step(b))
    b.keep(alone=step_alone(b, net))
    found = ", ".join(f"{name} {row['best']['images_per_s']:,.0f}" for name, row in b.row.items() if "best" in row)
    off = [name for name, row in b.row.items() if row.get("losses_off", 0) > 0.02]
    if wrong: raise RuntimeError("; ".join(wrong))
    told = f"; captured losses differ: {', '.join(off)}" if off else ""
    return dict(modes=list(modes), agrees=not off, say=f"images/s: {found}{told}")


def launch_ways(device):
    "Name -> settings of a stage and the mode of torch.compile, if it is used: what may spare the GPU from waiting."
    ways = {name: (changes, None) for name, changes in capture_modes(device).items()}
    if len(ways) < 2: return ways
    whole = dict(compile=True)
    return ways | {"compiled": (whole | ways["eager"][0], "default"),
                   "compiled and captured": (whole | ways["captured"][0], "default"),
                   "reduce-overhead": (whole | ways["eager"][0], "reduce-overhead")}


def choice(b):
    "A step of stage 2 in each of the `launch_ways`: are recorded steps, the default, the fastest?"
    net = build_backbone(BackboneConfig("small" if b.small else b.args.backbone, width=8 if b.small else 32, stripes=1))
    names, (images, call) = list(stage_calls(b, step_data(b), net).items())[1]
    for way, (changes, mode) in launch_ways(b.device).items():
        if b.gpu: torch.cuda.empty_cache()
        torch.compiler.reset()                             # each way compiles for itself
        by_mode = partialmethod(torch.nn.Module.compile, mode=mode)
        with patch.object(torch.nn.Module, "compile", by_mode):
            try: row = watch_stage(b, names, images, call, changes)[names[0]]
            except Exception as error:
                traceback.print_exc()
                row = dict(error=f"{type(error).__name__}: {error}"[:1000])
        missing = [said for said in row.get("warnings", []) if "runs uncompiled" in said or "without a CUDA graph" in said]
        b.keep(**{way: dict(error=missing[0]) if missing else row})      # it would stand there as what it is not
    told = ", ".join(f"{way} {row['images_per_s']:,.0f}" for way, row in b.row.items() if "images_per_s" in row)
    wrong = [f"{way}: {row['error']}" for way, row in b.row.items() if "error" in row]
    if wrong: raise RuntimeError("; ".join(wrong))
    row = stage_row(b.row)
    return row | dict(agrees=row.get("losses_off", 0) <= 0.02, say=f"images/s: {told}")


def plain_step(b):
    "A step without what surrounds it, as `domainmix bench --what step` takes it: images a second by precision."
    s, ways = b.sizes, ("usual", "channels_last") if b.small else ("usual", "bf16")
    backbone, classes = ("small", 50) if b.small else (b.args.backbone, 1000)
    where = dict(device=str(b.device), tell=print)
    return bench_step(s.batch, backbone, s.height, s.width, classes, ways, s.rounds, **where)["ways"]


def step_alone(b, net):
    "A recorded step of stage 2 in bf16 on a batch that stays on the GPU: no input, no augmentation."
    s, on_gpu = b.sizes, b.gpu
    config = TrainConfig(p=s.batch // 4, k=4, precision="bf16" if on_gpu else "auto", capture="on" if on_gpu else "auto")
    label = torch.arange(s.batch // 4).repeat_interleave(4)
    data = TrainSet(noise_images(b, s.batch), label, label % 4, label % 2)
    state = make_train_state(net, data, config, 0, "alone", b.device, torch.zeros(data.n_classes, net.feature_dim))
    image = normalise(data.images).contiguous(memory_format=torch.channels_last)
    batch = image, label.to(b.device), data.domain.to(b.device)

    def some(n):
        for _ in range(n): train_step(state, batch, False, 1e-6, 1., config)
        b.wait()
    some(WARM_UP + 2)                                          # the last of these are recorded
    _, cost = measure(lambda: some(5 * s.rounds))
    milliseconds = cost["seconds"] / (5 * s.rounds) * 1e3
    return dict(images_per_s=s.batch / milliseconds * 1e3, milliseconds=milliseconds, recordings=len(state.recorder.recordings))


# ---- what surrounds the steps of a stage

def outside(b):
    "Placing images, fingerprints, first features, and compiled norms: what a stage does before its first step."
    s = b.sizes
    n = min(s.rows[0], 4 * s.part)
    images = torch.randint(0, 256, (n, 3, s.height, s.width), dtype=torch.uint8, generator=generator(0, "bench", "outside"))
    found = dict(images=n, megabytes=images.numel() / 1e6)
    found["fingerprint"] = measure(lambda: fingerprint(images))[1]
    b.keep(**found)
    place = lambda: (to_device_if_fits(images, b.device), b.wait())[0]
    placed, found["placing"] = measure(place)
    found["placing, next stage"] = measure(place)[1]           # they are there
    b.keep(**found)
    net = build_backbone(BackboneConfig("small" if b.small else b.args.backbone, width=8 if b.small else 32, stripes=1))
    net = move_to_device(net.eval(), b.device)
    embed = lambda: (embed_images(net, placed, b.device, precision="auto"), b.wait())
    found["features, first"] = measure(embed)[1]               # with what is slow the first time
    found["features"] = measure(embed)[1]
    found["images_per_s"] = n / found["features"]["seconds"]
    b.keep(**found)
    if b.gpu: found["norm"] = compile_cost(b)
    told = ", ".join(f"{name} {found[name]['seconds']:.2f} s" for name in ("fingerprint", "placing", "features"))
    return found | dict(say=f"{n:,} images: {told}")


def compile_cost(b):
    "The first step of one ghost norm, and a later one: compiled, and by torch's own kernels."
    x = torch.randn(2 * b.sizes.batch, 256, 64, 32, device=b.device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found = {}
    for how in ("on", "off"):
        net = to_ghost_bn(torch.nn.Sequential(torch.nn.BatchNorm2d(256)), 16).to(b.device).train()
        step = lambda: (net(x.requires_grad_()).sum().backward(), b.wait())
        with patch.object(norms, "COMPILE_NORMS", how):
            found[how] = dict(first=measure(step)[1]["seconds"], later=min(measure(step)[1]["seconds"] for _ in range(5)))
    return found


# ---- clusters and evaluation

def features(n, dim, device, seed=0):
    "Unit features (n, dim) on the device like those of `bench_features`, with their pid (n,) and camera (n,)."
    x, pid, camera = toy_features(-(-n // 17), 17, 64, 6, noise=0.9, shift=0.6, seed=seed)
    turn = torch.linalg.qr(torch.randn(dim, 64, generator=generator(seed, "bench", "turn"))).Q
    full = x[:n].to(device) @ turn.T.to(device)
    rng = generator(seed, "bench", "noise", device=device)
    for part in full.split(4096):
        part.add_(torch.randn(part.shape, generator=rng, device=device), alpha=0.3 / dim**0.5)
    return unit_rows(full), pid[:n].numpy(), camera[:n].numpy()


def clusters(b):
    "Neighbours, Jaccard distance and clusters of many features; neighbours by faiss on a GPU beside ours."
    _, first = measure(compile_stage1)
    b.keep(compiling=first)
    for n in b.sizes.rows:
        b.keep(**{str(n): cluster_row(b, n)})
    rows = {n: b.row[str(n)] for n in b.sizes.rows}
    after = {n: row["jaccard"]["seconds"] + row["dbscan"]["seconds"] for n, row in rows.items()}
    done = ", ".join(f"{n:,}: {row['knn']['seconds']:.2f} + {after[n]:.2f} s" for n, row in rows.items())
    wrong = [n for n, row in rows.items() if row["faiss"].get("found", 1) < 0.999]
    told = f"; faiss finds others at {wrong}" if wrong else ""
    return dict(agrees=not wrong, say=f"neighbours + the rest of {done}{told}")


def cluster_row(b, n):
    "One size."
    x, pid, _ = features(n, b.sizes.dim, b.device)
    c = ClusterConfig(k1=b.sizes.k1).resolved(n)
    knn(x[:500], c.k1)                                     # what is slow the first time
    row = dict(dim=b.sizes.dim, k1=c.k1)
    lists, row["knn"] = measure(lambda: knn(x, c.k1))
    b.keep(**{str(n): row})
    row["faiss"] = by_faiss(b, x, c.k1, lists[0])
    b.keep(**{str(n): row})
    graph, row["jaccard"] = measure(lambda: jaccard_graph(x, c.k1, c.k2, c.eps + c.eps_gap, *lists))
    b.keep(**{str(n): row})
    found, row["dbscan"] = measure(lambda: cluster_graph(graph, c))
    return row | dict(clusters=found.n_clusters, identities=len(np.unique(pid)))


def by_faiss(b, x, k, ours):
    "faiss's exact index on the GPU: seconds, and the share of our neighbours that it finds."
    if importlib.util.find_spec("faiss") is None: return dict(left_out="faiss is not installed")
    import faiss
    if not b.gpu or not getattr(faiss, "get_num_gpus", int)(): return dict(left_out="faiss has no GPU here")
    try:
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), x.shape[1])
        rows = x.cpu().numpy()

        def search():
            index.add(rows)
            parts = np.array_split(rows, max(1, len(rows) // 8192))
            return np.concatenate([index.search(part, k)[1] for part in parts])
        found, cost = measure(search)
    except Exception as error:                             # it is here only to be compared with
        return dict(left_out=f"{type(error).__name__}: {error}"[:300])
    some = np.linspace(0, len(rows) - 1, min(len(rows), 2000)).astype(int)
    return cost | dict(found=neighbour_recall(ours[some], found[some]))


def evaluation(b):
    "Ranking at the size of MSMT17's test."
    q, g = b.sizes.queries, b.sizes.gallery
    x, pid, camera = features(q + g, b.sizes.dim, b.device)
    rank(x[:50], x[:50], pid[:50], pid[:50])               # what is slow the first time
    people = pid[:q], pid[q:], camera[:q], camera[q:]
    found, cost = measure(lambda: rank(x[:q], x[q:], *people))
    said = f"{q:,} x {g:,} in {cost['seconds']:.2f} s"
    return dict(queries=q, gallery=g, dim=b.sizes.dim, mAP=found.mAP, rank=cost, say=said)


# ---- images and input

def images(b):
    "Drawing the world, and batches of training images from files, from memory and from the memory map."
    s = b.sizes
    for size in {(64, 32), (s.height, s.width)}:
        style = replace(STYLES["a"], ids=max(4, s.drawn // 11))
        draw_domain(replace(style, ids=4), 0, size, b.device)            # what is slow the first time
        drawn, cost = measure(lambda: draw_domain(style, 0, size, b.device))
        row = cost | dict(images=len(drawn), images_per_s=len(drawn) / cost["seconds"])
        b.keep(**{f"draw {size[0]}x{size[1]}": row})
    found = bench_input(s.files, s.input_batch, s.height, s.width, s.rounds, device=str(b.device), tell=print)
    speed = found["images_per_s"]
    drawn = b.row[f"draw {s.height}x{s.width}"]["images_per_s"]
    names = dict(usual="files", memory="memory", map="map")
    said = ", ".join(f"{where} {speed[name]:,.0f}" for name, where in names.items())
    return dict(input=found, say=f"images/s: drawn {drawn:,.0f}, from {said}")


# ---- the paper's schedule

def schedule(b):
    "Minutes of the paper's whole schedule, from the steps and clusters measured before."
    c, rows = configure(backbone="resnet50"), b.sizes.rows

    def step(name):
        found = b.results.get("steps", {}).get(name, {}).get("best")
        if found is None: raise RuntimeError(f"the steps of {name} were not measured: run the section steps too")
        return found["milliseconds"] / 6e4                 # minutes
    size = b.results.get("clusters", {}).get(str(rows[1]))
    if not size or "dbscan" not in size:
        raise RuntimeError(f"clusters of {rows[1]:,} rows were not measured: run the section clusters too")
    once = sum(size[part]["seconds"] for part in ("knn", "jaccard", "dbscan")) / 60
    half = c.stage3.epochs * c.stage3.iterations / 2       # of the steps are the discriminator's
    minutes = dict(stage1=c.spcl.epochs * c.spcl.iterations * step("stage1"), clusters=(c.spcl.epochs + 1) * once,
                   stage2=c.stage2.epochs * c.stage2.iterations * step("stage2"),
                   stage3=half * (step("stage3") + step("stage3 discriminator")))
    minutes["all"] = sum(minutes.values())
    parts = dict(stage1=c.spcl, stage2=c.stage2, stage3=c.stage3)
    plan = {name: dict(epochs=part.epochs, iterations=part.iterations) for name, part in parts.items()}
    return dict(minutes=minutes, plan=plan, left_out=["start-up", "first features", "evaluation"],
                say="minutes: " + ", ".join(f"{name} {m:,.1f}" for name, m in minutes.items()))


SECTIONS = dict(runs=runs, agreement=agreement, steps=steps, clusters=clusters, outside=outside, evaluation=evaluation,
                input=images, schedule=schedule, choice=choice)
