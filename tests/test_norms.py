"""Batch norm by group, by domain and IBN as one operation, held against torch's layers group by group; and how much it launches."""
import copy
import itertools
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import Bottleneck, ResNet

from domainmix import norms
from domainmix.bodies import resnet50_body
from domainmix.distributed import update_running_stats
from domainmix.norms import IBN, DomainBatchNorm, GhostBatchNorm, set_bn_domain, to_domain_bn, to_ghost_bn
from pretend import gpu

B, C = 48, 6


def layer(kind, domains, samples, seed=0):
    "One layer with random parameters: a BN of vectors or maps, or an IBN, with ghost BN and domains."
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential({"vectors": nn.BatchNorm1d, "maps": nn.BatchNorm2d, "ibn": IBN}[kind](C))
    net = to_ghost_bn(net, samples)
    if domains > 1:
        net = to_domain_bn(net, domains)
        set_bn_domain(net, "halves")
    for p in net.parameters():
        nn.init.normal_(p, 1, .5, generator=g)
    return net.train()


def torch_layer(x, net, domains, samples):
    "The same by torch's layers: each group of each domain by itself, and the mean of their statistics."
    ibn = isinstance(net[0], IBN)
    bn = net[0].BN if ibn else net[0]
    out = []
    for d, part in enumerate(x.chunk(domains)):
        own = bn.domains[d] if domains > 1 else bn
        means, variances = [], []
        for group in part.split(samples):
            mean, var = torch.zeros(len(own.running_mean)), torch.zeros(len(own.running_mean))
            last = group[:, C // 2:] if ibn else group
            y = F.batch_norm(last, mean, var, own.weight, own.bias, True, 1., own.eps)
            if ibn: y = torch.cat([F.instance_norm(group[:, :C // 2], weight=net[0].IN.weight, bias=net[0].IN.bias, eps=net[0].IN.eps), y], 1)
            out.append(y)
            means.append(mean)
            variances.append(var)
        with torch.no_grad(): update_running_stats(own, torch.stack(means).mean(0), torch.stack(variances).mean(0))
    return torch.cat(out)


def values(kind, layout, dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((B, C) if kind == "vectors" else (B, C, 4, 3), generator=g) * 2 + torch.arange(C).view(C, *[1, 1][:2 * (kind != "vectors")])
    return x.contiguous(memory_format=layout).to(dtype) if kind != "vectors" else x.to(dtype)


def step(net, x, up, norm=None):
    "Output, gradients and running statistics after one step."
    x = x.clone().requires_grad_()
    y = F.relu((norm or net)(x), inplace=True)
    (y.float() * up).sum().backward()
    return [y, x.grad, *(p.grad for p in net.parameters()), *(b for k, b in net.named_buffers())]


LAST, FIRST = torch.channels_last, torch.contiguous_format
CASES = [(kind, layout, domains, groups) for kind, layout in (("vectors", FIRST), ("maps", FIRST), ("maps", LAST), ("ibn", FIRST), ("ibn", LAST))
         for domains in (1, 2, 3) for groups in (1, 2, 4, 8, 16) if B // domains % groups == 0 and B // domains // groups > 1]


SLOW, HALF = pytest.mark.slow, torch.bfloat16


@pytest.mark.parametrize("way, dtype", [("cpu", torch.float32), ("operation", torch.float32), ("cpu, large maps", HALF), pytest.param("compiled", torch.float32, marks=SLOW),
                                        *(pytest.param(way, HALF, marks=SLOW) for way in ("cpu", "operation", "compiled"))], ids=str)
def test_it_is_torchs_norm_group_by_group(way, dtype):
    "On the CPU's paths, on the path of a GPU, and on that path as a compiler sees it."
    cases = CASES[::7] if way == "compiled" else CASES
    for kind, layout, domains, groups in cases:
        samples = B // domains // groups
        ours, theirs = layer(kind, domains, samples), layer(kind, domains, samples)
        x, up = values(kind, layout, dtype), values(kind, layout, torch.float32, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("error", "torch.compile does not work")
            b = step(theirs, x, up, lambda x: torch_layer(x, theirs, domains, samples))
            if way == "cpu": a = step(ours, x, up)
            elif way == "cpu, large maps":
                with patch.object(norms, "LARGE_MAP", 1): a = step(ours, x, up)
            elif way == "compiled":
                with patch.object(norms, "COMPILE_NORMS", "on"), patch.object(torch, "compile", eager_compile): a = step(ours, x, up)
            else:
                with gpu():                                          # which takes the path of a GPU, uncompiled
                    ours.cuda()
                    a = [t.cpu() for t in step(ours, x.cuda(), up.cuda())]
        rough = dtype is torch.bfloat16
        for n, (s, t) in enumerate(zip(a, b, strict=True)):
            limit = (2e-2 if rough else 5e-5) * max(1, t.detach().abs().max().item())
            assert s.dtype == t.dtype and (s.float() - t.float()).abs().max() <= limit, (kind, layout, domains, groups, n)
        assert way == "operation" or a[0].stride() == x.stride() and (kind != "maps" or a[1].stride() == x.stride())
        assert list(ours.state_dict()) == list(theirs.state_dict())


real_compile = torch.compile
def eager_compile(f, **options): return real_compile(f, backend="aot_eager", **options)


@pytest.mark.slow
def test_the_gradient_in_float64():
    for n, groups, half, layout in itertools.product((1, 2), (1, 3), (0, 2, 4), (FIRST, LAST)):
        g = torch.Generator().manual_seed(n)
        x = torch.randn(12, 4, 2, 3, generator=g, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        w, b = (torch.randn(n, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(lambda *t: norms._GroupedNorm.apply(*t, groups, half, 1e-5)[0], (x, w, b), check_undefined_grad=False)
        own = [v.detach()[d, half:].clone().requires_grad_() for v in (w, b) for d in range(n)]
        shared = [v.detach()[0, :half].clone().requires_grad_() for v in (w, b)] if half else []
        if half < 4: assert torch.autograd.gradcheck(lambda x, *t: norms._MergedNorm.apply(x, groups, half, 1e-5, *t)[0], (x, *shared, *own), check_undefined_grad=False)
        if not half: assert torch.autograd.gradcheck(lambda *t: norms._LoopedNorm.apply(*t, groups, 1e-5)[0], (x, w, b), check_undefined_grad=False)


def test_other_batches_and_layers():
    "Unequal groups, a slice of channels, an average over all batches, activations, evaluation, and what torch refuses."
    x = values("maps", LAST, torch.float32)
    ghost = GhostBatchNorm(C, 10)
    with pytest.raises(RuntimeError): GhostBatchNorm(C + 1, 8)(x)
    with pytest.raises(RuntimeError): norms._norm_parts(x, [nn.BatchNorm2d(1), nn.BatchNorm2d(1)])
    with pytest.raises(ValueError): GhostBatchNorm(C, 2)(torch.zeros(1, C))
    parts = [F.batch_norm(p, None, None, training=True) for p in x[:45].tensor_split(4)]
    assert torch.allclose(ghost(x[:45]), torch.cat(parts), atol=1e-5)
    wide = torch.cat([x, x], 1)[:, 3:3 + C]
    assert torch.allclose(GhostBatchNorm(C, 8)(wide), GhostBatchNorm(C, 8)(wide.contiguous()), atol=1e-5)
    mean = GhostBatchNorm(C, 8, momentum=None)
    for part in (x, x + 1): mean(part)
    assert torch.allclose(mean.running_mean, x.mean((0, 2, 3)) + .5, atol=1e-5) and mean.num_batches_tracked == 2
    for act in (nn.ReLU(inplace=True), nn.PReLU(C)):
        one = GhostBatchNorm(C, 8)
        one.drop, one.act = nn.Identity(), act
        two = DomainBatchNorm(one, 2)
        two.domain = "halves"
        by_hand = torch.cat([bn(p) for p, bn in zip(x.chunk(2), copy.deepcopy(two).domains)])
        assert torch.allclose(two(x), by_hand, atol=1e-5)
        two.domain = torch.arange(2).repeat_interleave(len(x) // 2)
        assert torch.allclose(copy.deepcopy(two)(x), by_hand, atol=1e-5)
        two.domain = 1
        assert torch.allclose(two(x), one(x), atol=1e-5)
        bn = two.eval().domains[1]
        assert torch.allclose(two(x), bn.act(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)), atol=1e-5)


class Count(TorchDispatchMode):
    "Counts the operators that compute: no views, nothing that only makes a tensor; the gradient of a slice is zeros and a copy."
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        self.n += 2 * (name == "slice_backward") or not (f.is_view or name in ("empty", "empty_like", "new_empty", "detach", "_unsafe_view", "empty_strided", "promote_types"))
        return f(*args, **(kwargs or {}))


class OldGhost(GhostBatchNorm):
    "How ghost BN was computed before: group by group, and a concatenation."
    def forward(self, x): return norms._norm_group_by_group(x, self, len(x) // self.samples_per_bn)


class OldDomain(DomainBatchNorm):
    def forward(self, x): return torch.cat([bn(part) for part, bn in zip(x.chunk(2), self.domains)])


class OldIBN(IBN):
    def forward(self, x):
        return torch.cat([torch.cat([self.IN(p[:, :self.IN.num_features]), bn(p[:, self.IN.num_features:])], 1) for p, bn in zip(x.chunk(2), self.BN.domains)])


def launched(net, images):
    "Operators of one step, forward and backward, on a device that computes nothing."
    net = net.to("meta").train().to(memory_format=LAST)
    x = torch.empty(images, 3, 128, 64, device="meta").contiguous(memory_format=LAST)
    with Count() as count: net(x).sum().backward()
    return count.n


@pytest.mark.parametrize("images, samples", [(128, 16), (64, 4)], ids=["the paper's 64 + 64 images", "many groups"])
@pytest.mark.parametrize("ibn", [pytest.param(False, marks=pytest.mark.slow), True])
def test_stage_1_launches_a_quarter_for_its_norms(ibn, images, samples, monkeypatch):
    "ResNet-50(-IBN), with IBN of one block in each stage, groups of 16 or 4 images in each of 2 domains; the step without norms is taken off."
    if ibn: monkeypatch.setattr(torchvision.models, "resnet50", lambda weights=None: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8))
    def build():
        net = to_domain_bn(to_ghost_bn(resnet50_body(ibn), samples))
        set_bn_domain(net, "halves")
        return net
    new, old, none = build(), build(), build()
    for m in old.modules():
        if isinstance(m, GhostBatchNorm): m.__class__ = OldGhost
        if isinstance(m, DomainBatchNorm): m.__class__ = OldDomain
        if isinstance(m, IBN): m.__class__ = OldIBN
    norms._replace_modules(none, (DomainBatchNorm, IBN), lambda m: nn.Identity())
    rest = launched(none, images)
    before, after = launched(old, images) - rest, launched(new, images) - rest
    layers = sum(isinstance(m, DomainBatchNorm) for m in new.modules())
    print(f"{layers} norms: {before} operators before, {after} after, {before / after:.1f} times fewer")
    assert before > 4 * after and after <= 14 * layers + 10 * sum(isinstance(m, IBN) for m in new.modules())
