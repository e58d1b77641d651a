"""What a GPU takes and refuses when the tensors of one call lie on two devices, kind by kind, on the pretended GPU (`pretend.py`).

Each case names its source: a file of torch's (ATen is below aten/src/), or "seen" for what a real GPU said to this package.
A pretended GPU that lets through what a real one refuses hides a crash, so where no source says that a call is taken, it is refused.
"""
import copy

import pytest
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from domainmix.checkpoint import load_checkpoint, save_checkpoint
from domainmix.core import DomainMixError
from domainmix.optimiser import adam, make_ema
from pretend import gpu


class Two:
    "Tensors of both sides, new ones for each call: g... on the GPU, h... on the host; ...0 without a dimension."
    def __init__(self):
        make = dict(x=torch.arange(6.).view(3, 2) + 1, v=torch.tensor([1., 2., 3.]), n=torch.tensor(2.), i=torch.tensor([0, 2]), i0=torch.tensor(1),
                    m=torch.tensor([True, False, True]), m0=torch.tensor(True), one=torch.tensor([5.]), none=torch.empty(()))
        for name, t in make.items():
            setattr(self, "h" + name, t.clone())
            setattr(self, "g" + name, t.to("cuda"))


def assign(x, index, value): x[index] = value


def grad(x, value): x.requires_grad_(True).grad = value


KINDS = {
    # ATen/TensorIterator.cpp, compute_types: with allow_cpu_scalars one input of no dimension may be on the CPU, never an output ("Trying to pass too
    # many CPU scalars"); ATen/native/cuda/Loops.cuh, gpu_kernel_with_scalars, reads it.
    "arithmetic": ([lambda t: t.gv + t.hn, lambda t: t.hn * t.gv, lambda t: 1 - t.gn, lambda t: t.gv ** t.hn, lambda t: t.gv > t.hn, lambda t: t.hn <= t.gv, lambda t: t.hn / t.gn,
                    lambda t: t.gm & t.hm0, lambda t: torch.maximum(t.gv, t.hn), lambda t: torch.add(t.gv, t.gv, alpha=t.hn), lambda t: t.gv // t.hn, lambda t: t.gv.sub(other=t.hn)],
                   [lambda t: t.gv + t.hv, lambda t: t.gn + t.hv, lambda t: t.gv == t.hv, lambda t: t.hv ** t.gn, lambda t: torch.maximum(t.gv, t.hv), lambda t: t.gm | t.hm]),
    # ATen/native/cuda: these kernels are launched by plain gpu_kernel, which asserts that every operand is on the GPU.
    "arithmetic that reads no number of the host": ([lambda t: torch.atan2(t.gv, t.gv)],
                                                    [lambda t: torch.atan2(t.gv, t.hn), lambda t: torch.hypot(t.gv, t.hn), lambda t: torch.nextafter(t.gv, t.hn)]),
    # The same check: the tensor that is written is an output, of whatever size.
    "in place": ([lambda t: t.gv.add_(t.hn), lambda t: t.gn.mul_(t.hn), lambda t: t.gv.copy_(t.hv), lambda t: t.hv.copy_(t.gv), lambda t: t.gv.fill_(t.hn), lambda t: t.hv.fill_(t.gn)],
                 [lambda t: t.hv.add_(t.gn), lambda t: t.hn.add_(t.gn), lambda t: t.hn.__iadd__(t.gn), lambda t: t.gv.add_(t.hv), lambda t: t.hv.mul_(t.gv), lambda t: t.hn.sub_(t.gn)]),
    # torchgen/dest/register_dispatch_key.py: "Expected out tensor to have device cuda:0, but got cpu instead".
    "out=": ([lambda t: torch.add(t.gv, t.hn, out=torch.empty_like(t.gv)), lambda t: torch.mm(t.gx, t.gx.T, out=torch.empty(3, 3, device="cuda"))],
             [lambda t: torch.add(t.gv, t.gv, out=t.hv), lambda t: torch.add(t.gn, t.gn, out=t.hnone), lambda t: torch.mul(t.hv, t.hv, out=t.gv), lambda t: torch.add(t.hn, 1, out=t.gnone),
              lambda t: torch.cat([t.gv, t.gv], out=torch.empty(6)), lambda t: torch.sum(t.gv, 0, out=t.hnone)]),
    # Generated wrappers (RegisterCUDA) call c10::impl::check_and_update_common_device (ATen/core/op_registration/adaption.h), which exempts no size. seen: stack.
    "stack and cat": ([lambda t: torch.stack([t.gn, t.gn]), lambda t: torch.cat([t.gv, t.gone])],
                      [lambda t: torch.stack([t.gn, t.hn]), lambda t: torch.stack([t.hm0, t.gm0]), lambda t: torch.cat([t.gv, t.hv]), lambda t: torch.hstack([t.gn, t.hn]),
                       lambda t: torch.vstack([t.gn, t.hn]), lambda t: torch.dstack([t.gn, t.hn]), lambda t: torch.column_stack([t.gn, t.hn]), lambda t: torch.concat([t.gone, t.hone]),
                       lambda t: torch.concatenate([t.gv, t.hone]), lambda t: torch.block_diag(t.gn, t.hn), lambda t: torch.meshgrid(t.gn, t.hn, indexing="ij")]),
    # ATen/native/TensorCompare.cpp, where_self_out: "allow CPU scalars on non-cpu device", condition and both values; then TensorIterator's check.
    "where": ([lambda t: torch.where(t.gm, t.gv, t.hn), lambda t: torch.where(t.gm, t.hn, t.hn), lambda t: torch.where(t.hm0, t.gv, t.gv), lambda t: t.gv.where(t.gm, t.hn), lambda t: torch.where(t.gm, t.gv, 0)],
              [lambda t: torch.where(t.gm, t.gv, t.hv), lambda t: torch.where(t.hm, t.gv, t.gv), lambda t: torch.where(t.hm, t.hv, t.gn), lambda t: torch.where(t.gm, t.hv, t.hv)]),
    # ATen/native/PointwiseOps.cpp and cuda/PointwiseOpsKernel.cu: addcmul takes a number as tensor2 only (since 2.7); addcdiv takes none (pytorch issue 143306).
    # cuda/Lerp.cu: is_cpu_scalar(3), the weight. ATen/native/TensorCompare.cpp: clamp with tensors has no allow_cpu_scalars.
    "addcmul, addcdiv, lerp, clamp": ([lambda t: torch.addcmul(t.gv, t.gv, t.hn), lambda t: t.gv.addcmul_(t.gv, t.hn), lambda t: torch.lerp(t.gv, t.gv, t.hn), lambda t: t.gv.lerp_(t.gv, .5),
                                       lambda t: torch.addcdiv(t.gv, t.gv, t.gv), lambda t: t.gv.clamp(t.gn, t.gn)],
                                      [lambda t: torch.addcmul(t.hn, t.gv, t.gv), lambda t: torch.addcmul(t.gv, t.hn, t.gv), lambda t: torch.addcmul(t.gv, t.gv, t.hv), lambda t: t.hv.addcmul_(t.gv, t.gv),
                                       lambda t: torch.addcdiv(t.gv, t.gv, t.hn), lambda t: torch.addcdiv(t.gv, t.hv, t.gv), lambda t: torch.lerp(t.gv, t.hn, t.gn), lambda t: torch.lerp(t.hn, t.gv, t.gn),
                                       lambda t: torch.lerp(t.gv, t.gv, t.hv), lambda t: t.hn.lerp_(t.gn, t.gn), lambda t: t.gv.clamp(min=t.hn)]),
    # ATen/native/cuda/Indexing.cu, masked_fill__cuda: a value of no dimension is read by item(), on either side; the mask must be with the tensor.
    "masked_fill": ([lambda t: t.gv.masked_fill(t.gm, t.hn), lambda t: t.gv.masked_fill_(t.gm, 0), lambda t: t.gv.index_fill(0, t.gi, t.hn)],
                    [lambda t: t.gv.masked_fill(t.hm, 0), lambda t: t.hv.masked_fill(t.gm, 0), lambda t: t.hv.masked_fill(t.hm, t.gn), lambda t: t.gv.masked_fill(t.hm0, 0), lambda t: t.gv.index_fill(0, t.hi, 0)]),
    # ATen/native/IndexingUtils.h: "indices should be either on cpu or on the same device as the indexed tensor"; python_variable_indexing.cpp: a whole
    # number of no dimension is read by item(), on either side.
    "read by an index": ([lambda t: t.gv[t.hi], lambda t: t.gv[t.hm], lambda t: t.gx[t.hi, t.gi - t.gi], lambda t: t.gv[t.gi], lambda t: t.gv[t.hi0], lambda t: t.hv[t.gi0], lambda t: t.gv[[0, 1]]],
                         [lambda t: t.hv[t.gi], lambda t: t.hv[t.gm], lambda t: t.hx[0, t.gi - t.gi], lambda t: t.hv[t.gm0]]),
    # ATen/native/TensorAdvancedIndexing.cpp, _index_put_impl_: a value of no dimension is moved; canDispatchToMaskedFill takes one number for a mask; other values
    # must be with the tensor. A place or a slice is a view that is copied to (ATen/TensorIndexing.h, copy_to), from either side.
    "written by an index": ([lambda t: assign(t.gv, t.hi, t.gx[0] * 1), lambda t: assign(t.gv, t.gi, t.hn), lambda t: assign(t.gv, t.gm, 0.), lambda t: assign(t.gv, t.gm, t.hone),
                             lambda t: assign(t.gx, 0, t.hv[:2]), lambda t: assign(t.hx, slice(0, 2), t.gx[:2]), lambda t: assign(t.gx, (slice(None), 0), t.hv), lambda t: t.gv.index_put_((t.hi,), t.hn),
                             lambda t: assign(t.hv, t.gi0, 1.)],
                            [lambda t: assign(t.gv, t.gi, t.hx[0]), lambda t: assign(t.gv, t.gm, t.hx[0]), lambda t: assign(t.gv, t.hm, t.hone), lambda t: assign(t.gv, [0, 1], t.hx[0]),
                             lambda t: assign(t.hv, t.gi, 0.), lambda t: assign(t.hv, t.gm, 0.), lambda t: assign(t.hv, t.hi, t.gx[0]), lambda t: t.gv.index_put_((t.gi,), t.hv[:2]),
                             lambda t: t.hv.index_put_((t.gi,), t.hn)]),
    # The generated wrappers again.
    "select, gather, scatter": ([lambda t: t.gv.index_select(0, t.gi), lambda t: t.gv.gather(0, t.gi)],
                                [lambda t: t.gv.index_select(0, t.hi), lambda t: t.gv.index_select(0, t.hi0), lambda t: t.hv.index_select(0, t.gi0), lambda t: t.gn.index_select(0, t.hi0), lambda t: t.gv.gather(0, t.hi),
                                 lambda t: t.gv.take(t.hi0), lambda t: t.gv.scatter(0, t.hi, t.gv), lambda t: t.gv.index_add(0, t.hi, t.gv[:2]), lambda t: t.gv.index_copy(0, t.gi, t.hv[:2]),
                                 lambda t: t.gv.scatter_add(0, t.gi, t.hv), lambda t: t.gv.masked_select(t.hm), lambda t: t.gv.repeat_interleave(t.hi0), lambda t: t.gi.bincount(t.hv[:2])]),
    "products, norms, comparisons of whole tensors": ([lambda t: t.gx @ t.gv[:2], lambda t: F.linear(t.gx, t.gx)],
                                                      [lambda t: t.gx @ t.hv[:2], lambda t: t.gv.dot(t.hv), lambda t: F.linear(t.gx, t.hx), lambda t: F.batch_norm(t.gx, t.hv[:2], t.gv[:2], training=False),
                                                       lambda t: F.cross_entropy(t.gx, t.hi.repeat(2)[:3] // 2), lambda t: torch.isin(t.gv, t.hn), lambda t: torch.searchsorted(t.gv, t.hv), lambda t: torch.bucketize(t.gn, t.hv),
                                                       lambda t: torch.equal(t.gv, t.hv), lambda t: torch.allclose(t.gv, t.hn), lambda t: F.mse_loss(t.gv, t.hn), lambda t: torch.einsum("i,i", t.gv, t.hv)]),
    # torch/csrc/autograd/python_variable.cpp: "assigned grad has data located on a different device".
    "gradients": ([lambda t: grad(t.gv, t.gv.detach() * 1)], [lambda t: grad(t.gv, t.hv), lambda t: grad(t.gn, t.hn), lambda t: grad(t.hv, t.gv)]),
    # ATen/native/cuda/ForeachBinaryOpList.cu and others: lists of two sides take the slow way, one operation after another; _fused_adam_ is a generated wrapper.
    "lists": ([lambda t: torch._foreach_add_([t.gv, t.hv], [t.gv, t.hv]), lambda t: torch._foreach_mul([t.gv], t.hn), lambda t: torch._foreach_copy_([t.gv], [t.hv]), lambda t: torch._foreach_add_([t.hn], 1)],
              [lambda t: torch._foreach_add_([t.gv, t.gv], [t.gv, t.hv]), lambda t: torch._foreach_add_([t.hn], [t.gn]), lambda t: torch._foreach_lerp_([t.gv], [t.hv], .5),
               lambda t: torch._foreach_addcdiv_([t.gv], [t.gv], [t.hn]),
               lambda t: torch._fused_adam_([t.gv], [t.gv * 1], [t.gv * 0], [t.gv * 0], [], [t.hn], lr=.1, beta1=.9, beta2=.99, weight_decay=0., eps=1e-8, amsgrad=False, maximize=False)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_taken_or_refused_as_on_a_gpu(kind):
    taken, refused = KINDS[kind]
    with gpu():
        for n, call in enumerate(taken):
            t = Two()
            answer = call(t)
            if isinstance(answer, torch.Tensor) and answer is not t.hv: assert answer.is_cuda or kind == "read by an index" and not answer.dim(), n
        for n, call in enumerate(refused):
            try: call(Two())
            except RuntimeError as e: assert "same device" in str(e), (n, e)
            else: raise AssertionError(f"{kind}: refused call {n} was taken")


def test_what_is_made_lies_where_a_gpu_would_have_it():
    with gpu() as pretend:
        t = Two()
        there = [torch.full((2,), 1., device="cuda"), t.gv.new_tensor(t.hv), t.hv.type_as(t.gv), torch.tensor(t.gv), torch.as_tensor(t.gv), t.gv.expand_as(t.gx.T), t.gv.view_as(t.hv),
                 torch.where(t.gm, t.hn, t.hn), t.hv.to(t.gn), torch.zeros_like(t.hv, device="cuda")]
        here = [torch.full((2,), t.gn), torch.arange(t.gn), torch.tensor([t.gn, t.hn]), t.gv.type_as(t.hv), t.hv[t.gi0], t.hv.fill_(t.gn), torch.zeros_like(t.gv, device="cpu")]
        assert [x.is_cuda for x in there + here] == [True] * len(there) + [False] * len(here)
        pretend.local.stepping = True
        for wait in (lambda: torch.full((2,), t.gn), lambda: torch.tensor([t.gn]), lambda: t.hv[t.gi0], lambda: t.hv.fill_(t.gn), lambda: assign(t.hx, 0, t.gx[0]), lambda: torch.tensor(t.gv, device="cpu")):
            pretend.waits.clear(); wait()
            assert pretend.waits


@pytest.mark.parametrize("how", [dict(fused=True), dict(foreach=True), dict(foreach=False), dict(capturable=True)], ids=lambda d: next(iter(d.items())))
def test_the_state_of_an_optimiser_must_be_with_its_parameters(how):
    """torch/optim/adam.py: `exp_avg` and `exp_avg_sq` are made with the parameter, `step` too if fused or capturable, else it stays on the CPU;
    `load_state_dict` moves all but that `step`. A state that is left on the other device fails in the next step."""
    with gpu():
        net, lr = torch.nn.Linear(3, 2).to("cuda"), dict(lr=.1)
        def step(optimiser):
            optimiser.zero_grad()
            net(torch.ones(4, 3, device="cuda")).sum().backward()
            optimiser.step()
        optimiser = torch.optim.Adam(net.parameters(), **lr, **how)
        step(optimiser)
        state = optimiser.state[net.weight]
        assert state["exp_avg"].is_cuda and state["step"].is_cuda == ("fused" in how or "capturable" in how)
        other = torch.optim.Adam(net.parameters(), **lr, **how)
        other.load_state_dict(copy.deepcopy({k: v for k, v in _on_host(optimiser.state_dict()).items()}))
        assert other.state[net.weight]["exp_avg"].is_cuda and other.state[net.weight]["step"].is_cuda == state["step"].is_cuda
        step(other)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            broken = torch.optim.Adam(net.parameters(), **lr, **how)
            step(broken)
            broken.state[net.weight][name] = broken.state[net.weight][name].cpu()
            if name == "step" and "foreach" in how: step(broken)     # that is where it is
            else:
                with pytest.raises((RuntimeError, AssertionError), match="device"): step(broken)


def _on_host(values):
    "A state dict as it comes from a file."
    if isinstance(values, dict): return {k: _on_host(v) for k, v in values.items()}
    return values.cpu() if isinstance(values, torch.Tensor) else values


def test_buffers_that_a_library_makes_by_itself():
    """torch/optim/swa_utils.py: `AveragedModel.n_averaged` is made on the CPU unless a device is given, and `update_parameters` moves it where it is used.
    torch/nn/modules/batchnorm.py: `num_batches_tracked` moves with the module, and only a number is added to it; the running statistics are an
    argument of the kernel. `torch.nn.Module.to` moves everything that is registered, and nothing else."""
    with gpu():
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to("cuda")
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(.9))
        assert not average.n_averaged.is_cuda and next(average.module.parameters()).is_cuda and AveragedModel(net, device="cuda").n_averaged.is_cuda
        for _ in range(3): average.update_parameters(net)
        average.to("cuda").update_parameters(net)
        assert average.n_averaged.is_cuda and int(average.n_averaged) == 4
        assert net[1].num_batches_tracked.is_cuda
        x = torch.ones(5, 3, device="cuda")
        net[1].num_batches_tracked = net[1].num_batches_tracked.cpu()
        net(x)
        assert net[1].num_batches_tracked == 1
        net[1].running_var = net[1].running_var.cpu()
        with pytest.raises(RuntimeError, match="same device"): net(x)
        copied = copy.deepcopy(make_ema(torch.nn.Linear(3, 2).to("cuda"), .9))       # of two sides: each tensor stays where it is
        assert copied.module.weight.is_cuda and not copied.n_averaged.is_cuda


def test_a_checkpoint_holds_parts_of_two_devices(tmp_path):
    "A real GPU said: `torch.stack` of the flags of `AveragedModel.n_averaged` and of the weights, in the first checkpoint of every run with an average."
    with gpu():
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to("cuda")
        def parts():
            average = make_ema(net, .9)
            return dict(net=net, average=average, optimiser=adam(net, .1, 0.))
        here = parts()
        net(torch.ones(5, 3, device="cuda")).sum().backward()
        here["optimiser"].step()
        here["average"].update_parameters(net)
        file, line = tmp_path/"last.ckpt", dict(iterations=1)
        save_checkpoint(file, {"a": 1}, here, [line])
        there = parts()
        assert load_checkpoint(file, {"a": 1}, there) == ([line], {})
        assert there["average"].n_averaged == 1 and not there["average"].n_averaged.is_cuda and there["average"].module[0].weight.is_cuda
        assert there["optimiser"].state[net[0].weight]["step"].is_cuda
        before = file.read_bytes()
        for broken in (net[1].running_mean, here["average"].module[0].weight.data):
            good = broken.clone()
            broken[0] = float("nan")
            with pytest.raises(DomainMixError, match="not finite"): save_checkpoint(file, {"a": 1}, here, [line, line])
            broken.copy_(good)
        here["average"].n_averaged = torch.tensor(float("inf"))                        # the flag of the other device counts too
        with pytest.raises(DomainMixError, match="weights of average are not finite"): save_checkpoint(file, {"a": 1}, here, [line, line])
        assert file.read_bytes() == before
