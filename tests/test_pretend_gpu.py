"""What a GPU would refuse, and where it would be waited for, on a GPU that is only pretended (`pretend.py`)."""
import collections
import contextlib
import gc
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from domainmix import loading, spcl, training
from domainmix.baselines.qaconv import build_matcher
from domainmix.baselines.qaconv_scores import match_images
from domainmix.bench.speed import (
    bench_features, bench_growth, bench_input, bench_ranking, bench_stage1, bench_step,
)
from domainmix.files import load_jsonl
from domainmix.evaluation import rank
from domainmix.knn import knn
from domainmix.loading import fetch_batch, to_device_if_fits
from domainmix.batches import ImageStack, TrainSet
from domainmix.bodies import BackboneConfig
from domainmix.checkpoint import StageRun
from domainmix.inference import evaluate_model
from domainmix.jaccard import jaccard_graph
from domainmix.pipeline import report_errors
from domainmix.runs.pipeline import run
from domainmix.jaccard import RerankConfig
from domainmix.runs.settings import TINY_SETTINGS, TRAINING_SECTIONS, configure
from domainmix.spcl import update_memory
from domainmix.world import toy_domain
from pretend import Recordable, gpu, recorder


def test_it_refuses_what_a_gpu_refuses():
    with gpu() as pretend:
        a, i = torch.arange(6., device="cuda").view(2, 3), torch.tensor([1])
        assert str(a.device) == str(a[i].device) == str((a * 2).T[0].device) == "cuda:0" and str(a.cpu().device) == str(i.device) == "cpu"
        for wrong in (lambda: a + torch.ones(2, 3), lambda: a.index_select(0, i), lambda: torch.ones(3)[i.to(a.device)], lambda: torch.cat([a, a.cpu()]),
                      lambda: torch.rand(2, device="cuda", generator=torch.Generator()), lambda: torch.nn.Linear(3, 2)(a), lambda: torch.nn.Linear(3, 2).to("cuda")(a.cpu())):
            with pytest.raises(RuntimeError): wrong()
        for wrong in (lambda: a.numpy(), lambda: np.asarray(a)):
            with pytest.raises(TypeError): wrong()
        net = torch.nn.Linear(3, 2).to("cuda")
        net(a).square().sum().backward()
        torch.optim.Adam(net.parameters(), fused=True).step()
        assert str(net.weight.grad.device) == "cuda:0" and torch.rand(2, device="cuda", generator=torch.Generator("cuda")).is_cuda
        assert not pretend.waits
    assert not torch.ones(1).is_cuda and not torch.cuda.is_available()


def test_it_counts_where_it_is_waited_for():
    with gpu() as pretend, StageRun("toy", 1, 3, {}, {}, device=torch.device("cuda")) as epochs:
        rows, row = torch.eye(4, device="cuda"), torch.tensor([0, 0, 1], device="cuda")
        for _ in epochs:
            for step in epochs.steps(range(3)):
                update_memory(rows, rows[:3], row, .2, **({} if step == 1 else {"max_occurrences": 2}))     # is it told how often a row occurs?
                epochs.add(1, loss=rows.sum())
            epochs.end_epoch()
    assert pretend.waits == {"spcl.py: update_memory": 1} and pretend.steps == 3


def test_it_knows_which_calls_wait():
    def put(x, at, value): x[at] = value
    with gpu() as pretend:
        a, host = torch.arange(6., device="cuda").view(2, 3), torch.tensor([0, 1])
        i, mask = host.to("cuda", non_blocking=True), a > 2
        waits = [lambda: a[mask], lambda: a[host], lambda: a[[0, 1]], lambda: a[i[0]], lambda: put(a, mask, a[0].clone()), lambda: put(a, host, a.clone()),
                 lambda: put(a, 0, torch.ones(3)), lambda: torch.where(mask), lambda: torch.argwhere(mask), lambda: i.unique_consecutive(), lambda: i.repeat_interleave(i),
                 lambda: a.cpu(), lambda: a.sum().item(), lambda: bool(i[0] == 0), lambda: torch.tensor([1.], device="cuda"), lambda: host.to("cuda")]
        does_not = [lambda: a[i], lambda: a[0, 1:], lambda: a[host[0]], lambda: put(a, mask, 0.), lambda: put(a, i, a.clone()), lambda: put(mask, i, mask.clone()),
                    lambda: torch.where(mask, a, -a), lambda: i.repeat_interleave(2), lambda: i.repeat_interleave(i, output_size=1), lambda: torch.full((2,), 1., device="cuda"),
                    lambda: a.index_put_((i,), a.clone()), lambda: host.to("cuda", non_blocking=True)]
        pretend.local.stepping = True
        for calls, waited in (waits, True), (does_not, False):
            for n, call in enumerate(calls):
                pretend.waits.clear(); call()
                assert bool(pretend.waits) == waited, (waited, n)


def test_what_cannot_be_recorded_is_refused():
    with gpu() as pretend:
        x, i, mask = torch.arange(6., device="cuda").view(2, 3), torch.tensor([0, 1], device="cuda"), torch.ones(2, 3, dtype=torch.bool, device="cuda")
        weight = torch.ones(3, device="cuda", requires_grad=True)
        def put(value): x[mask] = value
        refused = [lambda: x[mask], lambda: x.nonzero(), lambda: i.unique(), lambda: i.bincount(), lambda: x.sum().item(), lambda: bool(mask.all()), lambda: put(x.flatten()),
                   lambda: i.repeat_interleave(i), lambda: torch.equal(x, x), lambda: torch.ones(2).to("cuda"), lambda: x.cpu(), lambda: torch.tensor([1.], device="cuda"),
                   lambda: x * torch.tensor(2.), lambda: torch.where(mask, x, torch.tensor(0.))]
        recorded = [lambda: x.argmax(1), lambda: x[i], lambda: torch.where(mask, x, -x), lambda: x.masked_fill(mask, 0.), lambda: x.sort(), lambda: (x * weight).sum().backward(),
                    lambda: torch.full((2,), 1., device="cuda"), lambda: torch.nn.functional.cross_entropy(x, i)]
        for call in refused:
            with pytest.raises(RuntimeError, match="record"): recorder(pretend)(call, None)()
        for call in recorded: recorder(pretend)(call, None)()
        weight.grad = None
        with pytest.raises(RuntimeError, match="record"): recorder(pretend)(lambda: (x @ weight).square()[i > 0].sum().backward(), None)()      # in a backward pass too


def test_what_depends_on_values_is_refused_in_a_backward_pass_too():
    class Sparse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x * 2

        @staticmethod
        def backward(ctx, gradient): return gradient[gradient.nonzero()[:, 0]] * 2
    x, mask = torch.ones(3, requires_grad=True), torch.tensor([True, False])
    for call in (lambda: Sparse.apply(x).sum().backward(), lambda: x.sum().item(), lambda: torch.ones(2)[mask], lambda: torch.equal(mask, mask)):
        with Recordable(), pytest.raises(RuntimeError, match="depends on values"): call()
    with Recordable(): (x * 2).sum().backward()


def test_a_replay_runs_no_python_of_the_step():
    "What is a number when a step is recorded stays so; what is a tensor is read again; a backward pass and dropout of a counter are replayed."
    with gpu() as pretend:
        weight, factor, python = torch.ones(3, device="cuda", requires_grad=True), torch.ones((), device="cuda"), [2.]
        def step():
            loss = (weight * factor * python[0]).sum()
            weight.grad = None
            loss.backward()
            with torch.no_grad(): weight.sub_(weight.grad)
            return dict(loss=loss.detach())
        before = weight.detach().clone()
        replay = recorder(pretend)(step, None)
        with torch.no_grad(): weight.copy_(before)
        python[0] = 100.
        assert replay()["loss"] == 6 and weight.tolist() == [-1.] * 3
        factor.fill_(3.)
        assert replay()["loss"] == -18 and weight.tolist() == [-7.] * 3


def test_a_backward_pass_of_the_package_is_looked_at():
    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x * 2

        @staticmethod
        def backward(ctx, gradient): return gradient * torch.full((3,), 2.)
    with gpu():
        x = torch.ones(3, device="cuda", requires_grad=True)
        with pytest.raises(RuntimeError, match="same device"): Mixed.apply(x).sum().backward()
    x = torch.ones(3, requires_grad=True)
    Mixed.apply(x).sum().backward()


CASES = {
    "spcl, kl": {"method": "domainmix-kl"},
    "parts and both views": {"net": {"parts": True, "view": "both"}, "method": "only-a"},
    "mmt, control": {"labeller": "mmt", "method": "control"},
    "plain, images stay on the host": {"labeller": "plain"},
    "sda": {"method": "stage1-sda"},
}


@pytest.mark.filterwarnings("error:training goes on without a CUDA graph")
@pytest.mark.parametrize("case", [case if case == "spcl, kl" else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_stages_run_on_it_and_their_steps_wait_only_to_look_at_losses(case, tmp_path):
    longer = {s: {"epochs": 1 + (s == "stage3"), "iterations": 21} for s in TRAINING_SECTIONS}
    config = configure(TINY_SETTINGS, longer, CASES[case], dict(real="world", target="world", run="tiny", data=str(tmp_path), device="cuda"))
    maps = []
    look = lambda m, x: maps.append(m.weight.is_contiguous(memory_format=torch.channels_last) and x[0].is_contiguous(memory_format=torch.channels_last)) if isinstance(m, torch.nn.Conv2d) and not m.weight.is_meta else None
    with gpu(free=1000 if "host" in case else 2**36) as pretend, register_module_forward_pre_hook(look): result = run(config)
    assert len(maps) > 500 and all(maps)     # no convolution has to turn its map
    epochs = [line["epoch"] for line in load_jsonl(tmp_path/"runs/tiny/log.jsonl")]
    assert len(epochs) >= 2 and pretend.steps == 21*len(epochs)
    checks = {place: n for place, n in pretend.waits.items() if place.startswith("capture.py")}     # of each recording, once
    assert pretend.waits - collections.Counter(checks) == {"checkpoint.py: flush": len(epochs)}     # at the twentieth step; at the last when the epoch is over
    assert checks
    assert 0 < result["mAP"] < 1


@pytest.fixture
def copies():
    "The copies of images on a GPU, none at first."
    with patch.object(loading, "_COPIES", WeakTensorKeyDictionary()) as found: yield found


@pytest.mark.parametrize("labeller, n", [("spcl", 7), ("mmt", None)])
def test_images_are_copied_to_it_once_in_a_run(labeller, n, copies, tmp_path):
    "Stages 0 to 3 train on the same arrays of A and B, which are on the GPU after the first that needs them; and no longer than the run."
    calls, copy_once = [], loading.copy_once
    def watched(images, device):
        calls.append((images.data_ptr(), loading.find_copy(images, device) is None))
        return copy_once(images, device)
    brief = {s: {"epochs": 1 + (s == "stage3"), "iterations": 2} for s in TRAINING_SECTIONS}
    with gpu(), patch.object(loading, "copy_once", watched):
        run(configure(TINY_SETTINGS, brief, dict(real="world", target="world", run="tiny", data=str(tmp_path), device="cuda", labeller=labeller)))
    assert len({array for array, _ in calls}) == sum(new for _, new in calls) == 2
    assert n is None or len(calls) == n       # A; A and B; both in one stack, twice
    gc.collect()
    assert not copies


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_copy_of_changed_images_is_not_used(device, copies):
    here, there = torch.device(device), torch.device("cuda", 1)
    a, b = (torch.randint(0, 256, (n, 3, 4, 2), dtype=torch.uint8) for n in (20, 30))
    rows = torch.tensor([3, 25, 40, 3])
    expected, at = torch.cat([a, b])[rows], torch.device("cuda", 0)
    with gpu() as pretend:
        first, stack = to_device_if_fits(a, here), to_device_if_fits(ImageStack.concat(a, b).select_images(rows), here)
        assert stack.device == at and stack.sources[0] is first and torch.equal(stack[:].cpu(), expected)
        assert to_device_if_fits(first, here) is first and to_device_if_fits(stack, here) is stack and len(copies) == 2      # they are there
        pretend.local.stepping = True
        fetch_batch(stack, torch.tensor([0, 1]), here)
        pretend.local.stepping = False
        assert not pretend.waits                                           # a batch out of several arrays
        assert loading.find_copy(a, here) is first
        a[0] += 1
        assert loading.find_copy(a, here) is None and len(copies) == 1 and torch.equal(to_device_if_fits(a, here).cpu(), a)
        assert loading.find_copy(b, there) is None
        del first, stack, a, b
        gc.collect()
        assert not copies


def test_copies_fill_at_most_half_of_the_memory(copies):
    here, whole = torch.device("cuda", 0), torch.randint(0, 256, (60, 3, 4, 2), dtype=torch.uint8)
    a, b = whole[:20].clone(), whole[20:].clone()
    with gpu(free=2 * a.nbytes + 2):
        assert to_device_if_fits(b, here) is b                             # the larger of the two would fill more than half
        assert to_device_if_fits(a, here).is_cuda
    with gpu(free=a.nbytes + 2):                                           # what is left beside the copy of `a`
        assert to_device_if_fits(a, here).is_cuda and to_device_if_fits(b[:1].clone(), here).is_cpu and len(copies) == 1
    with gpu(free=2 * 24 * 5):                                             # four images are copied out of arrays that do not fit
        few = to_device_if_fits(ImageStack.concat(a, b).select_images(torch.tensor([3, 25, 40, 3])), here)
        assert isinstance(few, torch.Tensor) and few.is_cuda and torch.equal(few.cpu(), whole[[3, 25, 40, 3]])
        assert not copies                                                  # that of `a` was of no use


def test_stage_1_has_its_real_images_on_the_gpu_before_the_synthetic_ones(copies):
    "B is embedded in every epoch; the copy of A that stage 0 has left goes, if there is no room for both."
    here, data, real = torch.device("cuda", 0), toy_domain(6, 2, size=(16, 8)), toy_domain(8, 2, size=(16, 8), seed=1)[0]
    a = TrainSet(data[0], data[1], data[2], torch.zeros(12))
    for free, sides in ((2 ** 30, [True, True]), (2 * real.nbytes + 2, [False, True]), (100, [False, False])):
        copies.clear()
        with gpu(free=2 ** 30): to_device_if_fits(a.images, here)
        with gpu(free=free): assert [x.is_cuda for x in spcl._image_sets(a, real, here)] == sides, free


@pytest.mark.parametrize("precision, off", [("fp32", 1e-2), pytest.param("bf16", 5e-2, marks=pytest.mark.slow)])
def test_the_first_losses_are_those_of_the_cpu(precision, off, tmp_path):
    logs = {}
    for device in ("cpu", "cuda"):
        brief = {s: {"epochs": 1 + (s == "stage3"), "iterations": 6 if precision == "fp32" else 2, "precision": precision} for s in TRAINING_SECTIONS}      # from the fourth on they are recorded
        config = configure(TINY_SETTINGS, brief, dict(real="world", target="world", run="tiny", data=str(tmp_path/device), device=device))
        with gpu(capability=(8, 0)) if device == "cuda" else contextlib.nullcontext(): run(config)
        logs[device] = load_jsonl(tmp_path/device/"runs/tiny/log.jsonl")
    assert [line["stage"] for line in logs["cuda"]] == ["stage0", "stage1", "stage2", "stage3", "stage3"]
    for a, b in zip(*logs.values()):
        for name in a.keys() & {"loss", "id", "triplet", "synthetic", "real", "d", "dm"}:
            assert math.isclose(a[name], b[name], rel_tol=off), (a, b)


def test_neighbours_and_ranks_are_those_of_the_cpu():
    x, pid, camera = bench_features(500, 64)
    exact, _ = knn(x, 20, "fp32")
    with gpu():
        on = x.to("cuda")
        for method in ("auto", "fp32", "bf16"): assert (knn(on, 20, method)[0] == exact).all(), method
        assert abs(jaccard_graph(on, 20, 5, .6) - jaccard_graph(x, 20, 5, .6)).max() < 1e-5
        people = pid[:90], pid[90:], camera[:90], camera[90:]
        assert abs(rank(on[:90], on[90:], *people).mAP - rank(x[:90], x[90:], *people).mAP) < 1e-9


def test_scores_of_pairs_are_those_of_the_cpu_and_no_tile_is_larger_than_allowed():
    "A tile is the largest tensor of a comparison: its responses, in 16 bits on a GPU."
    net = build_matcher(BackboneConfig(width=8, stripes=1), 32, 16).eval()
    for module in net.modules():      # the new head of a matcher gives every pair nearly the same score
        if isinstance(module, torch.nn.BatchNorm1d): module.running_var.fill_(.01)
    query, gallery = toy_domain(4, 2, size=(32, 16))[0], toy_domain(6, 2, size=(32, 16), seed=1)[0]
    everything = torch.arange(len(query)), torch.arange(len(gallery))
    expected, largest = match_images(net, query, gallery)(*everything), 0
    pair = 2 * net.head.positions ** 2
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "mm" in function.name(): largest = max(largest, out.numel() * 2)
            return out
    with gpu():
        scores = match_images(net, query, gallery, "cuda", 2 * 9 * pair + 100)
        with Sizes(): found = scores(*everything)
    assert found.shape == (8, 12) and (found.cpu() - expected).abs().max() < .02 * expected.std() + .01
    assert pair < largest <= 9 * pair + 50


def test_a_model_is_evaluated_and_benchmarks_run_on_it(tmp_path):
    run(configure(TINY_SETTINGS, dict(target="world", run="tiny", method="only-a", data=str(tmp_path))))
    how = dict(data=str(tmp_path), centre_cameras=True, camera_norms=True, rerank=RerankConfig(k1=5, k2=2), flip=True)
    quiet = dict(device="cuda", tell=lambda _: None)
    expected = evaluate_model("tiny", "world", device="cpu", **how)
    with gpu():
        found = evaluate_model("tiny", "world", device="cuda", **how)
        assert bench_stage1(400, 64, methods=("fp32", "bf16"), **quiet)["agrees"]["bf16"]["labels"] == 1
        assert bench_ranking(40, 300, 64, few=20, **quiet)["agrees"] and bench_growth((300,), 64, **quiet)[0]["clusters"] > 1
        assert bench_input(images=32, batch=16, height=32, width=16, rounds=1, **quiet)
        row = bench_step(batch=8, backbone="resnet50", height=64, width=32, classes=8, ways=("usual", "channels_last"), rounds=1, **quiet)
    assert row["ways"].keys() == {"usual", "channels_last"} and abs(found["mAP"] - expected["mAP"]) < 1e-3


def test_a_full_memory_says_what_to_lower_and_what_was_finished_is_kept(tmp_path, capsys):
    config = configure(TINY_SETTINGS, dict(real="world", target="world", run="tiny", data=str(tmp_path), device="cuda"))
    whole, steps = training.backbone_loss, []

    def full(*args):
        steps.append(args)
        if len(steps) > 8: raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(*args)
    with gpu():
        with patch.object(training, "backbone_loss", full): assert report_errors(lambda: run(config)) == 2
        # stage 0 calls it five times (three steps, a recording, its check), stage 1 has a loss of its own; in stage 2 it is the recording that fails
        said, home = capsys.readouterr().err, tmp_path/"runs/tiny"
        assert "without a CUDA graph: CUDA out of memory" in said and "memory is full" in said and "Tried to allocate 2.00 GiB" in said and "stage2.p" in said and "Traceback" not in said
        before = [(home/stage/"model.safetensors").stat().st_mtime_ns for stage in ("stage0", "stage1")]
        assert (home/"stage2/last.ckpt").is_file() and not (home/"stage2/model.safetensors").exists()            # its first epoch is kept too
        result = run(config)
    assert before == [(home/stage/"model.safetensors").stat().st_mtime_ns for stage in ("stage0", "stage1")] and result["mAP"] > 0
