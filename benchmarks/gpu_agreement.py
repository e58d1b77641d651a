"""Does a device agree with the CPU, and with an oracle? Outputs and gradients, for benchmarks/gpu.py."""
import traceback
import warnings
from copy import deepcopy
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import domainmix.norms
from domainmix import losses
from domainmix.backbone import build_backbone
from domainmix.batches import AugmentConfig, TrainSet, augment
from domainmix.bench.speed import bench_features, neighbour_recall
from domainmix.bodies import BackboneConfig
from domainmix.core import generator
from domainmix.evaluation import rank
from domainmix.knn import knn
from domainmix.loading import toy_train_set
from domainmix.norms import IBN, set_bn_domain, to_domain_bn, to_ghost_bn
from domainmix.pseudolabel import ClusterConfig, cluster
from domainmix.schedule import TrainConfig
from domainmix.spcl import MemoryBank
from domainmix.training import train


def off(a, b):
    "The largest difference of two tensors beside the largest number of the first."
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (a, b))
    if a.shape != b.shape or not bool(a.isfinite().all() and b.isfinite().all()): return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) if a.numel() else 0.


def furthest(a, b):
    "The largest `off` of two dicts of tensors."
    return max((off(a[name], b[name]) for name in a), default=0.) if a.keys() == b.keys() else float("inf")


def noise(*shape, seed=0):
    "Normal numbers, the same on every machine."
    return torch.randn(*shape, generator=generator(seed, "agreement", *shape))


# ---- neighbours, clusters, ranking

def neighbours(b, device):
    "The neighbours of each method beside fp32 on the CPU."
    n, k = b.sizes.part, b.sizes.k1
    x = bench_features(n, max(64, b.sizes.dim))[0]
    exact, similarity = knn(x, k, "fp32")
    found = {}
    for method in ("auto", "fp32", "bf16"):
        there, s = knn(x.to(device), k, method)
        found[f"neighbours, {method}"] = (max(1 - neighbour_recall(exact, there), off(similarity, s)), 1e-4)
    return found


def same_clusters(b, device):
    "The share of images in another cluster."
    x = bench_features(b.sizes.part, max(64, b.sizes.dim))[0]
    c = ClusterConfig(k1=b.sizes.k1)
    cpu, there = cluster(x, c), cluster(x.to(device), c)
    return {"clusters": (float((cpu.labels != there.labels).mean()), 0.01),
            "reliable images": (float((cpu.reliable != there.reliable).mean()), 0.02)}


def ranking(b, device):
    "mAP and the CMC curve."
    x, pid, camera = bench_features(b.sizes.part, max(64, b.sizes.dim))
    q = len(x) // 4
    people = pid[:q], pid[q:], camera[:q], camera[q:]
    cpu, there = rank(x[:q], x[q:], *people), rank(x[:q].to(device), x[q:].to(device), *people)
    return {"mAP": (abs(cpu.mAP - there.mAP), 1e-5),
            "CMC": (float(np.abs(np.asarray(cpu.cmc) - np.asarray(there.cmc)).max()), 2 / q)}


# ---- losses

def loss_case(loss, x, *rest):
    "Value and gradient of a loss of features or scores."
    x = x.clone().requires_grad_()
    value = loss(x, *rest)
    value.backward()
    return dict(value=value, gradient=x.grad)


def all_losses(b, device):
    "Every loss of the method."
    label, domain = torch.arange(16).repeat_interleave(4), torch.arange(64) % 2
    x, scores, two = noise(64, 256), noise(64, 50), noise(64, 2)
    cases = {"identity loss": (lambda x, y: losses.id_loss(x, y, 0.1, 0.5), scores, label),
             "triplet loss": (losses.triplet_loss, x, label),
             "triplet loss, hinge": (lambda x, y: losses.triplet_loss(x, y, 0.3), x, label),
             "discrimination loss": (losses.discrimination_loss, two, domain),
             "domain balance": (losses.domain_balance_loss, two), "K-L divergence": (losses.kl_uniform_loss, two)}
    there = lambda args: [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    return {name: (furthest(loss_case(*case), loss_case(*there(case))), 1e-4) for name, case in cases.items()}


def memory_case(device):
    "Contrastive loss, its gradient, and the rows after an update in which rows occur twice."
    memory = MemoryBank(10, 40, 64).to(device)
    memory.rows.copy_(F.normalize(noise(50, 64)))
    memory.relabel(np.array([-1, 0, 1, 2] * 10))
    row = (torch.arange(32) % 25).to(device)
    x = F.normalize(noise(32, 64, seed=1)).to(device).requires_grad_()
    loss = memory(x, row).mean()
    loss.backward()
    memory.update(x, row, 2)
    return dict(loss=loss, gradient=x.grad, rows=memory.rows)


def memory_bank(b, device):
    return {"memory bank": (furthest(memory_case("cpu"), memory_case(device)), 1e-4)}


# ---- batch norm by group and domain

def norm_net(kind, channels, samples, domains):
    "One norm, ghost or not, of one domain or several."
    net = nn.Sequential(IBN(channels) if kind == "ibn" else nn.BatchNorm2d(channels))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.copy_(1 + 0.3 * noise(*p.shape, seed=i))
    net = to_ghost_bn(net, samples)
    if domains > 1:
        net = to_domain_bn(net, domains)
        set_bn_domain(net, "halves")
    return net.train()


def norm_case(net, x, grad, device, dtype):
    "Output, gradients and running statistics on a device."
    net = deepcopy(net).to(device, memory_format=torch.channels_last)
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype is torch.bfloat16): y = net(x)
    y.backward(grad.to(device, y.dtype))
    found = dict(output=y, gradient=x.grad)
    found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    return found | {name: v.float() for name, v in net.named_buffers() if "running" in name}


def norm_oracle(kind, net, x, grad, groups, domains):
    "Output and input gradient by torch's own norms in float64 on the CPU, group by group."
    x = x.double().requires_grad_()
    out = []
    for d, part in enumerate(x.chunk(domains)):
        bns = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        bn, half = bns[d], net[0].IN.num_features if kind == "ibn" else 0
        one = [F.batch_norm(g[:, half:], None, None, bn.weight.double(), bn.bias.double(), True, 0., bn.eps)
               for g in part.tensor_split(groups)]
        y = torch.cat(one)
        if half:
            weight, bias = net[0].IN.weight.double(), net[0].IN.bias.double()
            y = torch.cat([F.instance_norm(part[:, :half], weight=weight, bias=bias), y], 1)
        out.append(y)
    y = torch.cat(out)
    y.backward(grad.double())
    return dict(output=y, gradient=x.grad)


def norms(b, device):
    "Ghost and domain BN, and IBN, for 1 to 16 groups: beside the CPU, and beside torch's BN group by group."
    found, batch, channels = {}, 64, 16 if b.small else 64
    x, grad = noise(batch, channels, 8, 4) + 0.5, noise(batch, channels, 8, 4, seed=1)
    with patch.object(domainmix.norms, "COMPILE_NORMS", "off"): cases_of_norms(b, device, found, x, grad)
    if b.gpu and domainmix.norms.COMPILE_NORMS != "off":    # each shape and type is compiled by itself, for seconds
        with patch.object(domainmix.norms, "COMPILE_NORMS", "on"), warnings.catch_warnings():
            warnings.filterwarnings("error", "torch.compile does not work")
            compare_norm(found, "ibn", 4, 2, device, x, grad, "compiled, ")
    return found


def cases_of_norms(b, device, found, x, grad):
    "All numbers of groups and domains, by torch's own kernels."
    cases = [(kind, groups, domains) for kind in ("bn", "ibn") for groups in (1, 2, 4, 8, 16) for domains in (1, 2)]
    for kind, groups, domains in cases: compare_norm(found, kind, groups, domains, device, x, grad)


def compare_norm(found, kind, groups, domains, device, x, grad, how=""):
    "One kind of norm: beside the CPU, and beside the oracle in fp32 and bf16."
    net = norm_net(kind, x.shape[1], len(x) // domains // groups, domains)
    name = f"{how}{kind}, {groups} groups, {domains} domains"
    there = norm_case(net, x, grad, device, torch.float32)
    oracle = norm_oracle(kind, net, x, grad, groups, domains)
    found[name] = (furthest(norm_case(net, x, grad, "cpu", torch.float32), there), 1e-4)
    found[f"{name}, oracle"] = (furthest(oracle, {k: there[k] for k in oracle}), 1e-4)
    half = norm_case(net, x, grad, device, torch.bfloat16)
    found[f"{name}, bf16, oracle"] = (furthest(oracle, {k: half[k] for k in oracle}), 0.05)


# ---- augmentation, networks, whole steps

def augmentation(b, device):
    data = toy_train_set(0)
    call = lambda images: augment(images, AugmentConfig(), generator(0, "augment"))
    return {"augmentation": (off(call(data.images), call(data.images.to(device))), 1e-5)}


def network(b, device):
    "Features of a whole network in fp32; a GPU's convolutions may use TF32."
    net = build_backbone(BackboneConfig("small" if b.small else "resnet50_ibn", stripes=1, weights="none")).eval()
    x = noise(8, 3, 64, 32)
    with torch.no_grad():
        return {"features of a network": (off(net.embed(x), deepcopy(net).to(device).embed(x.to(device))), 0.02)}


def training(b, device):
    "Losses of six steps of stage 2, without augmentation, which draws on each device for itself."
    parts = toy_train_set(0), toy_train_set(1)
    data = TrainSet(*(torch.cat([getattr(p, k) + (8 * i if k == "label" else 0) for i, p in enumerate(parts)])
                      for k in ("images", "label", "camera", "domain")))
    net = build_backbone(BackboneConfig("small", width=8, stripes=2))
    plain = AugmentConfig(flip=0., pad=0, erase=0.)
    config = TrainConfig(epochs=3, iterations=2, p=8, k=4, lr=1e-4, ema=0.9, augment=plain)

    def history(device, precision):
        config.precision = precision
        return torch.tensor([line["loss"] for line in train(net, data, config, device=device).history])

    cpu = history("cpu", "fp32")
    return {"losses of steps": (off(cpu, history(device, "fp32")), 0.01),
            "losses of steps, bf16": (off(cpu, history(device, "bf16")), 0.03)}


CHECKS = (neighbours, same_clusters, ranking, all_losses, memory_bank, augmentation, network, training, norms)


def agreement(b):
    "All checks; one that raises an error does not keep the others from theirs."
    wrong, n = [], 0
    for check in CHECKS:
        try: found = check(b, b.device)
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{check.__name__}: {type(error).__name__}: {error}"[:500])
            b.keep(**{check.__name__: dict(error=wrong[-1])})
            continue
        rows = {name: dict(off=value, within=within, agrees=value <= within) for name, (value, within) in found.items()}
        n += len(rows)
        wrong += [f"{name} is off by {row['off']:.1e}" for name, row in rows.items() if not row["agrees"]]
        b.keep(**{check.__name__: rows})
    told = f"{len(wrong)} differ: {'; '.join(wrong[:3])}" if wrong else "all agree"
    return dict(agrees=not wrong, wrong=wrong, say=f"{n} comparisons, {told}")
