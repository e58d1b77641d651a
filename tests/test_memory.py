"""No code writes outside its memory: compiled loops with checked bounds, and the convolutions that oneDNN gets wrong."""
import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import nn

from domainmix.backbone import build_backbone
from domainmix.bodies import BODIES, MIN_STRIDED_CHANNELS, MULTI_HEAD, BackboneConfig, PointConv, _build_body
from forks import run_code
from sync import ROOT, modules

LOOPS = Path(__file__).parent / "loops.py"
RAW_MEMORY = re.compile(r"\b(njit|jit|vectorize|guvectorize|cfunc|stencil|carray|farray|ctypes|cffi|CDLL|from_buffer|frombuffer|data_ptr|"
                        r"as_strided|as_strided_|set_|memmove|__array_interface__|__cuda_array_interface__)\b")
KNOWN = {("domainmix/core.py", "njit"),                                              # `compile_loop`
         ("domainmix/bench/training.py", "ctypes"), ("domainmix/bench/training.py", "CDLL")}    # malloc_trim: no array


def functions(tree) -> dict[str, ast.FunctionDef]: return {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}


def called(node, names) -> set[str]: return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in names}


def compiled_loops(root: Path) -> set[str]:
    "The functions that the package compiles: those given to `compile_loop`, and what they call by a name of their module."
    given, defined = set(), {}
    for name in modules(root):
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        defined |= {f: (node, functions(tree)) for f, node in functions(tree).items()}
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "compile_loop" and n.args]
        assert all(isinstance(c.args[0], ast.Name) for c in calls), f"{name}: give compile_loop a function by its name"
        given |= {c.args[0].id for c in calls}
    todo, found = list(given), set()
    while todo:
        if (name := todo.pop()) in found: continue
        found.add(name)
        node, beside = defined[name]
        todo += called(node, set(beside)) - {name}
    return found


def run_loops(folder: Path, *parts: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    code = "import runpy; from numba.core import config; config.reload_config(); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    return run_code(code, LOOPS, *parts, cwd=root, env={"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(folder)}, limit=600)


def test_compiled_loops_run_with_checked_bounds(tmp_path):
    "Those of scores and augmentation; the loops of clusters are in the longer test."
    done = run_loops(tmp_path, "rankings", "augmentations")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.strip().splitlines()[-1].removeprefix("ran:").split()) >= 2
    missing = [name for name in compiled_loops(ROOT) if name not in LOOPS.read_text(encoding="utf-8")]
    assert not missing, f"tests/loops.py must run every function that compile_loop gets: {missing}"


@pytest.mark.slow
def test_every_compiled_loop_runs_with_checked_bounds(tmp_path):
    done = run_loops(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = set(done.stdout.strip().splitlines()[-1].removeprefix("ran:").split())
    assert ran == compiled_loops(ROOT), "tests/loops.py must run every function that compile_loop gets"


def test_a_loop_that_goes_one_too_far_is_found(tmp_path):
    shutil.copytree(ROOT / "domainmix", tmp_path / "domainmix", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "domainmix" / "batches.py"
    right, text = "for x in range(len(piece)):", file.read_text(encoding="utf-8")
    assert text.count(right) == 1
    file.write_text(text.replace(right, "for x in range(len(piece) + 1):"), encoding="utf-8")
    done = run_loops(tmp_path, "augmentations", root=tmp_path)
    assert done.returncode and "IndexError" in done.stderr, done.stdout + done.stderr


def test_a_new_loop_is_noticed(tmp_path):
    (tmp_path / "domainmix").mkdir()
    text = "def helper(a): pass\ndef loop(a): helper(a)\ndef caller(): compile_loop(loop)\n"
    (tmp_path / "domainmix" / "new.py").write_text(text)
    assert compiled_loops(tmp_path) == {"helper", "loop"}


def test_raw_memory_is_used_nowhere_else():
    found = set()
    for name in modules(ROOT):
        if name.endswith("_modidx.py"): continue
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        words = [getattr(n, key) for n in ast.walk(tree) for key in ("id", "attr", "module") if isinstance(getattr(n, key, None), str)]
        words += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
        found |= {(Path(name).as_posix(), w) for word in words for w in RAW_MEMORY.findall(word)}
    assert found == KNOWN, "code that can write outside an array goes through compile_loop, or its check comes with it"


CONVOLUTIONS = """
import ctypes, torch
ctypes.CDLL(None).mallopt(-6, 165)     # M_PERTURB: new and freed memory is filled with other bytes
from domainmix.bodies import ResidualBlock
g = torch.Generator().manual_seed(0)
for channels in (3, 4, 7, 8, 12, 15, 16, 20):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(channels)
        conv = ResidualBlock(channels, 2 * channels, (2, 2)).downsample[0].to(memory_format=torch.channels_last)
        x = torch.rand(32, channels, 32, 16, generator=g).contiguous(memory_format=torch.channels_last)
        y = conv(x)
        gradient = torch.rand(y.shape, generator=g).contiguous(memory_format=torch.channels_last)
        got, = torch.autograd.grad(y, conv.weight, gradient)
        kept = x[:, :, ::2, ::2].double()
        wanted = torch.einsum("bohw,bihw->oi", gradient.double(), kept)[:, :, None, None]
        assert ((got - wanted).abs().max() / wanted.abs().max()).item() < 1e-4, f"{channels} channels, {threads} threads"
        assert torch.allclose(y, torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], kept.float()), atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last)
print("fine")
"""


def test_strided_convolutions_of_few_channels_stay_in_their_memory(tmp_path):
    "In a process of its own: oneDNN's fault gives wrong gradients, destroys the heap, or never ends."
    done = run_code(CONVOLUTIONS, cwd=ROOT, limit=120)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stdout + done.stderr


NARROW_MAPS = """
import torch
from torch import nn
from domainmix.bodies import guard_convolutions
torch.set_num_threads(1)

def leave_nan():
    "Free much memory that is full of NaN: what reads memory that nobody has written gets it."
    for size in (2**8, 2**10, 2**12, 2**14, 2**16, 2**18):
        full = [torch.full((size,), float("nan"), dtype=torch.bfloat16) for _ in range(20)]
        del full

for kernel, stride, columns in ((3, 2, 1), (5, 2, 1), (3, (1, 2), 1), (3, 3, 2), (3, 2, 2)):
    for layout in (torch.channels_last, torch.contiguous_format):
        net = guard_convolutions(nn.Sequential(nn.Conv2d(32, 32, kernel, stride, kernel // 2, bias=False))).to(memory_format=layout)
        x = torch.randn(8, 32, 3, columns).contiguous(memory_format=layout)
        leave_nan()
        with torch.autocast("cpu", torch.bfloat16): y = net(x)
        leave_nan()
        got, = torch.autograd.grad(y.float().sum(), net[0].weight)
        exact = net[0].weight.detach().double().requires_grad_()
        wanted, = torch.autograd.grad(nn.functional.conv2d(x.double(), exact, None, stride, kernel // 2).sum(), exact)
        assert ((got - wanted).abs().max() / wanted.abs().max()).item() < .05, (kernel, stride, columns, layout)
print("fine")
"""


def test_strided_convolutions_of_narrow_maps_read_nothing_but_their_input():
    done = run_code(NARROW_MAPS, cwd=ROOT, limit=120)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stdout + done.stderr


def risky(net: nn.Module) -> list[str]:
    "Convolutions that oneDNN may compute with a fault: 1 x 1, a stride, few input channels; or larger, a stride, and not guarded."
    plain = [name for name, m in net.named_modules() if type(m) is nn.Conv2d and m.stride[1] > 1 and m.kernel_size != (1, 1)]
    return plain + [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and not isinstance(m, PointConv)
            and m.kernel_size == (1, 1) and max(m.stride) > 1 and m.in_channels // m.groups < MIN_STRIDED_CHANNELS]


@pytest.mark.parametrize("name", BODIES)
def test_no_body_has_a_risky_convolution(name):
    for width in (8, 12, 16) if name == "small" else (32,):
        assert not risky(_build_body(BackboneConfig(name, width=width), 0)[0])
    assert risky(nn.Sequential(nn.Conv2d(8, 16, 1, 2))) == ["0"] == risky(nn.Sequential(nn.Conv2d(32, 32, 3, 2)))


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_no_network_with_several_heads_has_a_risky_convolution(name):
    assert not risky(build_backbone(BackboneConfig(name, width=8, stripes=1)))
