"""What is chosen for each kind of device, with torch's answers replaced. No xpu and no mps device has run any of this."""
import contextlib
import os
import warnings
from unittest.mock import Mock, patch

import pytest
import torch
from torch import nn

from domainmix import backbone, core, distributed
from domainmix.batches import augmentation_numbers
from domainmix.body_parts import average_to_size
from domainmix.core import DomainMixError, autocast, bf16_is_fast, free_memory, pick_device, widest_float
from domainmix.knn import unit_rows
from domainmix.loading import fetch_batch, to_device_if_fits
from domainmix.optimiser import adam, memory_layout, supports_fused_adam
from forks import run_code
from sync import ROOT

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading one."
META = torch.device("meta")


@contextlib.contextmanager
def machine(cuda=(), xpu=(), mps=False, problem=None):
    "A machine with these GPUs by name; `problem`: what torch says of a driver that does not fit."
    with contextlib.ExitStack() as inside:
        for module, names in ((torch.cuda, cuda), (torch.xpu, xpu)):
            asked = dict(is_available=lambda n=names: bool(n), device_count=lambda n=names: len(n), get_device_name=lambda i=0, n=names: n[torch.device("cuda", i).index if isinstance(i, int) else i.index or 0])
            inside.enter_context(patch.multiple(module, **asked))
        inside.enter_context(patch.object(torch.backends.mps, "is_available", lambda: mps))
        inside.enter_context(patch.object(torch.backends.cuda, "is_built", lambda: bool(cuda or problem)))
        if problem: inside.enter_context(patch.object(torch.cuda, "init", Mock(side_effect=RuntimeError(problem))))
        inside.enter_context(patch.dict(os.environ))
        os.environ.pop("LOCAL_RANK", None)
        yield


class Elsewhere(torch.Tensor):
    "A tensor of the CPU that says it lies on another device."
    kind = "mps"

    @property
    def device(self): return torch.device(self.kind)
    def cpu(self): return self.as_subclass(torch.Tensor)


def elsewhere(x, kind="mps"):
    y = x.as_subclass(Elsewhere)
    y.kind = kind
    return y


@pytest.mark.parametrize("has, wanted", [
    (dict(cuda=["A"], xpu=["B"], mps=True), "cuda"), (dict(xpu=["B"], mps=True), "xpu"), (dict(mps=True), "mps"), ({}, "cpu")])
def test_auto_takes_the_first_of_cuda_xpu_mps_and_cpu(has, wanted):
    with machine(**has), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_device() == torch.device(wanted)


def refusal(name) -> str:
    with pytest.raises(DomainMixError) as said: pick_device(name)
    return str(said.value)


def test_a_missing_device_is_refused_with_what_is_there():
    with machine(cuda=["H200"], mps=True):
        assert "'cuda:1'" in refusal("cuda:1") and "finds 1 cuda devices" in refusal("cuda:1")
        for name in ("cuda:1", "xpu", "xpu:0", "mps:1", "gpu", "meta"): assert "cuda:0 (H200), mps, cpu" in refusal(name)
        assert pick_device("cuda:0").index == 0 and pick_device("mps").type == "mps"
    with machine(): assert "0 mps devices" in refusal("mps") and "0 xpu devices" in refusal("xpu") and refusal("cuda").endswith(": cpu")


def test_each_process_takes_its_own_gpu():
    with machine(cuda=["A", "B"]), patch.dict(os.environ, LOCAL_RANK="1"): assert pick_device("cuda") == pick_device() == torch.device("cuda:1")
    with machine(xpu=["A", "B"]), patch.dict(os.environ, LOCAL_RANK="1"): assert pick_device() == torch.device("xpu:1")
    with machine(cuda=["A"]), patch.dict(os.environ, LOCAL_RANK="1"): assert "'cuda:1'" in refusal("cuda") and "cuda:0 (A)" in refusal("cuda")


def test_a_driver_that_is_too_old():
    with machine(problem=TOO_OLD):
        with pytest.warns(UserWarning, match="on cpu: The NVIDIA driver on your system is too old .found version 11040.$") as said:
            assert pick_device() == torch.device("cpu")
        assert len(said) == 1
        assert "0 cuda devices: The NVIDIA driver on your system is too old (found version 11040)\n" in refusal("cuda")
    for quiet in ("Found no NVIDIA driver on your system. Please check", "No CUDA GPUs are available"):
        with machine(problem=quiet), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pick_device() == torch.device("cpu")


OLD_DRIVER = """
import sys, torch, warnings
def init(): raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.")
def is_available():
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).")
    return False
torch.cuda.init, torch.cuda.is_available, torch.backends.cuda.is_built = init, is_available, lambda: True
from domainmix.core import pick_device
from domainmix.pipeline import report_errors
sys.exit(report_errors(lambda: print(pick_device(sys.argv[1]))))
"""


@pytest.mark.parametrize("name, code, out", [("auto", 0, "cpu"), ("cuda", 2, "")])
def test_the_user_reads_one_line_about_an_old_driver(name, code, out):
    done = run_code(OLD_DRIVER, name, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (code, out), done
    assert sum("too old" in line for line in done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr


def test_precision():
    fp32, bf16 = torch.device("mps"), torch.device("xpu")
    assert not bf16_is_fast(fp32)
    with autocast(fp32): assert not torch.is_autocast_enabled("mps")
    with pytest.raises(DomainMixError, match="on mps the networks run in fp32"): autocast("mps", "bf16")
    for has in (False, True):
        with patch.object(torch.xpu, "is_bf16_supported", lambda including_emulation=True: has or including_emulation):
            with autocast(bf16): assert torch.is_autocast_enabled("xpu") == bf16_is_fast(bf16) == has
    assert not torch.is_autocast_enabled("xpu")


def test_layout():
    assert memory_layout("auto", "mps") == memory_layout("off", "mps") == torch.contiguous_format
    assert memory_layout("auto", "xpu") == memory_layout("auto", "cuda") == memory_layout("on", "cpu") == torch.channels_last
    with pytest.raises(DomainMixError, match="channels come first"): memory_layout("on", "mps")
    x = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert backbone._checked_images(elsewhere(x), torch.channels_last).is_contiguous()
    assert not backbone._checked_images(x, torch.channels_last).is_contiguous()


def test_fused_adam_only_where_torch_has_it():
    refused = Mock(side_effect=RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices"))
    supports_fused_adam.cache_clear()
    try:
        with patch.object(torch.optim.Adam, "step", refused): assert not adam(nn.Linear(2, 2), 1e-3, 0.).defaults["fused"]
    finally: supports_fused_adam.cache_clear()


def test_no_double_precision_where_the_device_has_none():
    class Stream:
        device = torch.device("mps")
    with patch.object(torch, "rand", Mock(side_effect=lambda *size, dtype, generator, device: (dtype, device))):
        assert augmentation_numbers(2, Stream) == (torch.float32, torch.device("mps"))
    for has in (False, True):
        with patch.object(torch.xpu, "get_device_properties", lambda device: Mock(has_fp64=has)):
            assert widest_float("xpu") == (torch.float64 if has else torch.float32)
    numbers = augmentation_numbers(3, torch.Generator())
    assert numbers.dtype == torch.float64
    x = unit_rows(elsewhere(torch.rand(5, 4)))
    assert type(x) is torch.Tensor and x.device.type == "cpu"          # ranking and clustering of mps: on the CPU


def test_random_numbers_in_single_precision_stay_below_their_limit():
    largest = torch.tensor(1 - 2**-24)                                  # the largest float32 below 1
    for n in range(1, 5000): assert int(largest * n) < n


def test_pooling_that_mps_refuses_runs_on_the_cpu():
    x = torch.rand(2, 3, 10, 7)
    with patch.object(torch.Tensor, "to", lambda t, device: t): got = average_to_size(elsewhere(x), (4, 1))
    assert type(got) is torch.Tensor and torch.equal(got, nn.functional.adaptive_avg_pool2d(x, (4, 1)))
    assert type(average_to_size(elsewhere(x), (5, 7))) is Elsewhere     # it divides: there


def test_images_move_to_a_gpu_that_has_room():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for module, name in ((torch.xpu, "xpu"), (torch.mps, "mps")):
        for free, moves in ((4 * 192 * 2, False), (4 * 192 * 2 + 2, True)):
            asked = dict(mem_get_info=lambda d: (free, 9**9)) if name == "xpu" else dict(recommended_max_memory=lambda: free + 5, driver_allocated_memory=lambda: 5)
            with patch.multiple(module, **asked), patch.object(torch.Tensor, "to", lambda t, device: device):
                assert free_memory(torch.device(name)) == free
                assert (to_device_if_fits(images, torch.device(name)) is not images) == moves
    with patch.object(torch.Tensor, "pin_memory", Mock(side_effect=RuntimeError("no pinned memory"))):
        assert fetch_batch(images, torch.tensor([1]), META).device == META      # pinned memory is for cuda only


def gathered(*devices): return patch.object(distributed, "all_gather_objects", lambda own: list(devices))


def test_processes_on_several_gpus():
    cpu = torch.device("cpu")
    with gathered(("cuda", "H100"), ("cuda", "A100")), pytest.warns(UserWarning, match="process 1 A100. Every step waits for the slowest"):
        distributed.check_same_device(cpu)
    with gathered(("cuda", "H100"), ("xpu", "Arc")), pytest.raises(DomainMixError, match="different makers"): distributed.check_same_device(cpu)
    with gathered(("cuda", "H100"), ("cpu", "CPU")), pytest.raises(DomainMixError, match="some do not"): distributed.check_same_device(cpu)
    with machine(cuda=["A", "A"]), patch.dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"):
        with pytest.raises(DomainMixError, match="would share cuda:0"): distributed.init_distributed("cuda:0")
    with machine(mps=True), patch.dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"):
        for name in ("auto", "mps"):
            with pytest.raises(DomainMixError, match="one GPU of mps"): distributed.init_distributed(name)
