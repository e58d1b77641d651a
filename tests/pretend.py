"""A GPU for machines that have none: tensors that say they lie on cuda:0, are computed on the CPU, and are refused what a GPU refuses.

It knows on which side every tensor's storage lies, from the calls of torch's Python interface that made it. Two sides in one call,
NumPy on a tensor of the GPU, or a random stream of the other side are errors, as they are on a GPU; and every place in the
package at which the host would wait for a GPU is counted. Speed, memory, kernels and several GPUs are not pretended.
(torch's own `FakeTensorMode` has sides and no values, and a backward pass in it asks for a driver. The device `meta` has no values
either, and takes numbers of the host in more calls than a GPU does.)
What a GPU takes from the host is listed in `taken_from_host`; in doubt it is refused. `test_two_devices.py` has a case for each kind.
"""
import collections
import contextlib
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import domainmix
from domainmix import capture, norms
from domainmix.checkpoint import StageSteps

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = str(Path(domainmix.__file__).parent)

ABOUT = {Tensor.device.__get__: lambda t: GPU if on_gpu(t) else t.device, Tensor.is_cuda.__get__: lambda t: on_gpu(t), Tensor.is_cpu.__get__: lambda t: not on_gpu(t)}
MOVES = {Tensor.cuda: True, Tensor.cpu: False}
CROSSES = {Tensor.copy_, Tensor.data.__set__, Tensor.fill_, Tensor.new_tensor, Tensor.new_full, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as,
           torch._has_compatible_shallow_copy_type}     # of two sides, all of them; what they give is where their first argument is
PUTS = {Tensor.index_put_, Tensor.index_put, torch.index_put, torch.index_put_}
INDEXES = {Tensor.__getitem__, *PUTS}
MAKES = {torch.tensor, torch.as_tensor, torch.asarray}
OWN_SIDE = CROSSES | MAKES | {Tensor.__setitem__}
OF_NUMBERS = {torch.full, torch.arange, torch.linspace, torch.zeros, torch.ones, torch.empty}     # a tensor of no dimension is read as a number
OPERATORS = set("add sub mul truediv div floordiv mod pow and or xor lshift rshift eq ne lt le gt ge".split())     # as Python names them
ARITHMETIC = OPERATORS | set("""subtract multiply divide true_divide floor_divide remainder fmod maximum minimum fmax fmin rsub
    not_equal less less_equal greater greater_equal logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor""".split())
BACKWARD = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
WAITS = {Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.__format__, Tensor.__contains__,
         Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique, Tensor.masked_select, torch.masked_select, Tensor.bincount, torch.bincount,
         Tensor.equal, torch.equal, Tensor.allclose, torch.allclose, Tensor.argwhere, torch.argwhere, Tensor.unique_consecutive, torch.unique_consecutive}
REPEATS = {Tensor.repeat_interleave, torch.repeat_interleave}


def on_gpu(t: Tensor) -> bool: return getattr(t.untyped_storage(), "on_gpu", False)


def is_gpu(device) -> bool: return device is not None and torch.device(device).type == "cuda"


def list_tensors(*values) -> list[Tensor]:
    "All tensors in them that have a side."
    found, rest = [], [*values]
    for v in rest:             # which grows; torch's pytree takes ten times as long
        if isinstance(v, Tensor):
            if v.is_cpu and v.layout is torch.strided: found.append(v)
        elif isinstance(v, (tuple, list)): rest.extend(v)
        elif isinstance(v, dict): rest.extend(v.values())
    return found


def put(values):
    "Whatever tensors are in it lie on the GPU from now on."
    for t in list_tensors(values): t.untyped_storage().on_gpu = True
    return values


def operation(f) -> tuple[str, bool]:
    "The name of an operation without its variants, such as add for add_, __add__, __radd__ and _foreach_add_; and does it change its first argument?"
    name = getattr(f, "__name__", "").removeprefix("_foreach_")
    plain = name.strip("_")
    if name.startswith("__"):
        turned = plain[:1] in "ri" and plain[1:] in OPERATORS and plain not in OPERATORS
        return plain[1:] if turned else plain, turned and plain[0] == "i"
    return plain, name.endswith("_")


def is_number(t) -> bool:
    "A tensor of no dimension on the host?"
    return isinstance(t, Tensor) and not t.dim() and not on_gpu(t)


def is_place(i) -> bool:
    "Does this index stand for one row, or a slice of them? Rows that are listed in a tensor, a mask or a list are gathered by another kernel."
    if isinstance(i, Tensor): return not i.dim() and i.dtype not in (torch.bool, torch.uint8)
    return i is None or i is Ellipsis or isinstance(i, (slice, int, np.integer)) and not isinstance(i, bool)


def has_places_only(index) -> bool: return all(map(is_place, index if isinstance(index, tuple) else [index]))


def put_from_host(x, index, value, *_) -> list[Tensor]:
    "x[index] = value for listed rows: an index may be on either side, values of one or more dimensions must be where `x` is."
    index = list_tensors(index)
    values = [value] if isinstance(value, Tensor) and not on_gpu(value) else []
    masked = len(index) == 1 and index[0].dtype is torch.bool and on_gpu(index[0])
    return index + [v for v in values if not v.dim() or masked and v.numel() == 1]


def taken_from_host(f, args, kwargs) -> list[Tensor]:
    "The tensors of the host that a GPU takes in a call with tensors of the GPU. All others are refused."
    name, in_place = operation(f)
    out = list_tensors(kwargs.get("out"))
    inputs = [*args[in_place:2], *(kwargs[k] for k in ("input", "other") if k in kwargs)]
    numbers = list_tensors([kwargs[k] for k in ("alpha", "value", "lr") if k in kwargs and is_number(kwargs[k])])
    if name in ARITHMETIC:       # one number, not the tensor that is written (ATen/TensorIterator.cpp: allow_cpu_scalars; gpu_kernel_with_scalars)
        return numbers + ([] if out and not any(map(on_gpu, list_tensors(inputs))) else [t for t in inputs if is_number(t)][:1])
    if name == "where": return [t for t in args if is_number(t)]                              # all three (TensorCompare.cpp: where_self_out)
    if name in ("addcmul", "lerp"): return numbers + [t for t in args[2:3] if is_number(t)]   # tensor2, weight (PointwiseOps.cpp, Lerp.cpp); never in addcdiv
    if name in ("masked_fill", "index_fill"): return [t for t in args[-1:] if is_number(t)]     # read by item(), see masked_fill__cuda
    if f is Tensor.__getitem__: return list_tensors(args[1]) if on_gpu(args[0]) else []       # IndexingUtils.h: checkIndexTensorTypes, make_info
    if f in PUTS: return put_from_host(*args) if on_gpu(args[0]) else []                      # TensorAdvancedIndexing.cpp: _index_put_impl_
    if f is Tensor.__setitem__: return list_tensors(args) if has_places_only(args[1]) else put_from_host(*args) if on_gpu(args[0]) else []
    if f in OF_NUMBERS: return [t for t in list_tensors(args, kwargs) if is_number(t)]
    if f in CROSSES or f in MAKES or name == "copy": return list_tensors(args, kwargs)
    return numbers if name.startswith("fused_") else []


def each_of(f, args) -> list[tuple]:
    "The arguments of the calls that a `_foreach` operation stands for."
    n = len(next(a for a in args if isinstance(a, (list, tuple))))
    return [tuple(a[i] if isinstance(a, (list, tuple)) and len(a) == n else a for a in args) for i in range(n)]


def asks(f, args, kwargs) -> bool:
    "Does the size of what `f` gives, or a place in a tensor of the GPU, have to come from there, or an index or a value from the host?"
    if f in WAITS or f in MAKES and args and not isinstance(args[0], Tensor) or f in OF_NUMBERS or f is torch.where and len(args) == 1: return True
    if f in (Tensor.__setitem__, Tensor.fill_) and not on_gpu(args[0]): return True
    if f in REPEATS: return (len(args) == 1 or isinstance(args[1], Tensor)) and kwargs.get("output_size") is None
    if f not in INDEXES | {Tensor.__setitem__} or not on_gpu(args[0]): return False
    index, value = args[1], args[2] if len(args) > 2 else None
    if f in (Tensor.__getitem__, Tensor.__setitem__) and any(isinstance(i, list) for i in (index if isinstance(index, tuple) else [index])): return True
    many = isinstance(value, Tensor) and value.dim() > 0
    for i in list_tensors(index):
        if i.dtype is torch.bool and (many or f is not Tensor.__setitem__) or on_gpu(i) == (i.dim() == 0): return True
    return many and not on_gpu(value)


def place() -> str:
    "The function of the package that is at work."
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE): frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}" if frame else "elsewhere"


def called_by(folder: str) -> bool:
    "Is a function of a file in `folder` the nearest that is neither this file's nor the mode's?"
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or "torch/overrides" in frame.f_code.co_filename): frame = frame.f_back
    return frame is not None and folder in frame.f_code.co_filename


class Pretend(TorchFunctionMode):
    "Every call of torch, held against what a GPU would say."
    def __init__(self):
        super().__init__()
        self.waits, self.steps, self.local = collections.Counter(), 0, threading.local()      # waits inside of training steps; those steps

    def wait(self) -> None:
        if getattr(self.local, "recording", False): raise RuntimeError(f"a recorded step waits for the GPU: {place()}")
        if getattr(self.local, "stepping", False): self.waits[place()] += 1

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f in ABOUT: return ABOUT[f](args[0])
        if getattr(f, "__name__", "") == "__get__": return self.attribute(f, args[0])
        if f in MOVES: return self.move(args[0], MOVES[f], Tensor.clone)
        if f is Tensor.to: return self.to(*args, **kwargs)
        if f is Tensor.pin_memory: return self.pinned(args[0])
        if f is Tensor.type_as: return self.to(*args)
        tensors = list_tensors(args[:1] if f is Tensor.__deepcopy__ else (args, kwargs))     # not those that were copied before
        sides = [on_gpu(t) for t in tensors]
        if not (kwargs or any(sides)): return f(*args)
        kwargs = dict(kwargs)
        name, device = getattr(f, "__qualname__", str(f)), kwargs.pop("device", None)
        if f in (Tensor.__getitem__, Tensor.__setitem__) and not on_gpu(args[0]): args, tensors, sides = self.read_places(f, args, tensors, sides)
        if any(sides) and device is None: self.refuse(f, name, args, kwargs, tensors, sides)
        self.look_at(f, args, kwargs, tensors, sides, device)
        self.same_side(name, kwargs.get("generator"), is_gpu(device) if device is not None else any(sides))
        if device is not None: kwargs["device"] = CPU if is_gpu(device) else device
        if f in BACKWARD: return self.backward(f, args, kwargs, any(sides))
        if name.split(".")[-1].startswith("_foreach_"): return self.foreach(f, args, kwargs, sides)
        out = f(*args, **kwargs)
        if device is not None: onto = is_gpu(device)
        elif f in OF_NUMBERS: onto = False
        elif f in OWN_SIDE and args: onto = isinstance(args[0], Tensor) and on_gpu(args[0])
        else: onto = any(sides)
        if f in MAKES and tensors and onto != any(sides) and isinstance(out, Tensor): out = out.clone()
        return put(out) if onto and f is not Tensor.data.__set__ else out

    def attribute(self, f, t: Tensor):
        "What a property of a tensor gives; a tensor that it gives, such as `grad`, is on the side of `t`."
        out = f(t)
        return put(out) if isinstance(out, Tensor) and on_gpu(t) else out

    def read_places(self, f, args, tensors, sides):
        "A place in a tensor of the host may be a number of the GPU, which is read."
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        there = [isinstance(i, Tensor) and is_place(i) and on_gpu(i) for i in index]
        if not any(there): return args, tensors, sides
        self.wait()
        args = (args[0], tuple(int(i.cpu()) if far else i for i, far in zip(index, there)), *args[2:])
        tensors = list_tensors(args)
        return args, tensors, [on_gpu(t) for t in tensors]

    def foreach(self, f, args, kwargs, sides):
        "One operation on the tensors of lists; each gives what it would alone."
        out = f(*args, **kwargs)
        for i, one in enumerate(each_of(f, args)):
            if any(map(on_gpu, list_tensors(one))): put(out[i] if isinstance(out, (list, tuple)) else one[0])
        return out

    def refuse(self, f, name, args, kwargs, tensors, sides) -> None:
        "What a GPU cannot do with these tensors."
        if f in (Tensor.numpy, Tensor.__array__) and not kwargs.get("force"): raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if all(sides): return
        if getattr(self.local, "recording", False) and not called_by("torch/optim"):     # a number of the host would stay as it is
            raise RuntimeError(f"{name}: a recorded step uses a tensor of the host: {place()}")
        if name.split(".")[-1].startswith("_foreach_"): return self.refuse_each(f, name, args, kwargs)
        taken = {id(t) for t in taken_from_host(f, args, kwargs)}
        if any(not side and id(t) not in taken for t, side in zip(tensors, sides)):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu: " +
                               ", ".join(f"{tuple(t.shape)} on {GPU if side else CPU}" for t, side in zip(tensors, sides)))

    def refuse_each(self, f, name, args, kwargs) -> None:
        "A `_foreach` operation takes the slow way, one tensor after another, where a list has two sides."
        for one in each_of(f, args):
            tensors = list_tensors(one, kwargs)
            taken, sides = {id(t) for t in taken_from_host(f, one, kwargs)}, [on_gpu(t) for t in tensors]
            if any(sides) and any(not side and id(t) not in taken for t, side in zip(tensors, sides)):
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")

    def look_at(self, f, args, kwargs, tensors, sides, device) -> None:
        "Does the host wait here?"
        if any(sides):
            if asks(f, args, kwargs) or f in MAKES and device is not None and not is_gpu(device): self.wait()
            if f is Tensor.copy_ and not all(sides) and not (kwargs.get("non_blocking") or len(args) > 2): self.wait()
        elif f in MAKES and is_gpu(device): self.wait()

    def same_side(self, name, stream, onto) -> None:
        if stream is not None and is_gpu(stream.device) != onto: raise RuntimeError(f"{name}: expected a generator on {GPU if onto else CPU}, got one on {stream.device}")

    def backward(self, f, args, kwargs, onto):
        "What autograd does in C++ is believed; backward passes in Python are looked at."
        with Sides() if onto else contextlib.nullcontext(): out = f(*args, **kwargs)
        return put(out) if onto else out

    def pinned(self, t: Tensor) -> Tensor:
        if on_gpu(t): raise RuntimeError("cannot pin a tensor of cuda:0")
        return t

    def to(self, t: Tensor, *rest, **kwargs) -> Tensor:
        "`Tensor.to` in all its forms."
        named = [a for a in (*rest, kwargs.get("device")) if isinstance(a, (str, torch.device))]
        like = [a for a in rest if isinstance(a, Tensor)]
        device = torch.device(named[0]) if named else GPU if on_gpu(like[0] if like else t) else CPU
        if device.type not in ("cuda", "cpu"): return t.to(*rest, **kwargs)
        rest, kwargs = [CPU if a in named else a for a in rest], {k: CPU if k == "device" else v for k, v in kwargs.items()}
        return self.move(t, is_gpu(device), Tensor.to, *rest, **kwargs)

    def move(self, t: Tensor, onto: bool, change, *rest, **kwargs) -> Tensor:
        "`change` of `t`, onto the GPU or not; what comes from there is always waited for."
        moves = on_gpu(t) != onto
        if moves and getattr(self.local, "recording", False) and called_by("torch/optim"): return t      # which asks C++ where the weights are: here
        if moves and getattr(self.local, "recording", False): raise RuntimeError(f"a recorded step copies between host and GPU: {place()}")
        if moves and not (onto and (kwargs.get("non_blocking") or True in [a for a in rest if isinstance(a, bool)])): self.wait()
        out = change(t, *rest, **kwargs) if rest or kwargs or change is not Tensor.clone else t
        if moves and out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr(): out = out.clone()
        return put(out) if onto else out


ATEN = torch.ops.aten


def is_from_python() -> bool:
    "In a backward pass: does a function of Python call this operation, and not autograd itself?"
    frame = sys._getframe(2)
    while frame.f_code is not Pretend.backward.__code__:
        if frame.f_code.co_filename != __file__ and "/torch/" not in frame.f_code.co_filename: return True
        frame = frame.f_back
    return False


class Sides(TorchDispatchMode):
    "In a backward pass: what comes from tensors of the GPU is there too, and in a pass of Python, which autograd calls, tensors of two sides do not meet."
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        tensors = list_tensors(args, kwargs or {})
        onto = any(map(on_gpu, tensors))
        if onto and any(t.dim() and not on_gpu(t) for t in tensors) and f.overloadpacket not in (ATEN.copy_, ATEN._to_copy) and is_from_python():
            raise RuntimeError(f"{f} in a backward pass: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        out = f(*args, **(kwargs or {}))
        return put(out) if onto else out


DEPENDS_ON_DATA = {ATEN._local_scalar_dense, ATEN.item, ATEN.is_nonzero, ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN.bincount,
                   ATEN._unique, ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive, ATEN.repeat_interleave}
MASKED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}


class Recordable(TorchDispatchMode):
    "Refuses, also in a backward pass, what a CUDA graph cannot record: sizes and decisions that depend on values."
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        mask = f.overloadpacket in MASKED and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1])
        sized = f.overloadpacket is ATEN.repeat_interleave and (kwargs or {}).get("output_size") is not None
        if (f.overloadpacket in DEPENDS_ON_DATA or mask) and not sized: raise RuntimeError(f"{f} cannot be recorded: it depends on values")
        return f(*args, **(kwargs or {}))


def changes(f) -> list[int]:
    "Which arguments of an operation it writes."
    return [i for i, a in enumerate(f._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


class Tape(Recordable):
    "Records the operations of a step with their tensors, as a CUDA graph does, and does them again without Python's part of the step."
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(f, types, args, kwargs)
        self.calls.append((f, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        "Each operation again, on the tensors of the recording; what it gives goes where it went then."
        with torch._C.DisableTorchFunction():      # what was recorded has been looked at
            for f, args, kwargs, out in self.calls:
                if f.is_view: continue             # of memory that stays
                again = f(*args, **kwargs)
                if changes(f): continue
                for old, new in zip(list_all(out), list_all(again)): old.copy_(new)


def list_all(value) -> list[Tensor]:
    "The tensors that an operation gives."
    return [value] if isinstance(value, Tensor) else [t for v in value for t in list_all(v)] if isinstance(value, (tuple, list)) else []


def recorder(pretend):
    """A recording that refuses what a CUDA graph cannot record. A replay runs no Python of the step: a number, a choice or a tensor of the
    moment of recording stays for ever. (The step is done while it is recorded, which `first_replay` undoes.)"""
    def record(step, device):
        tape, pretend.local.recording = Tape(), True
        try:
            with tape: terms = step()
        finally: pretend.local.recording = False

        def replay():
            tape.replay()
            return terms
        return replay
    return record


class Stream(torch.Generator):
    "A random stream that says where it is."
    def __new__(cls, device="cpu"): return super().__new__(cls, "cpu")
    def __init__(self, device="cpu"): self.where = torch.device(device)

    @property
    def device(self): return self.where

    def manual_seed(self, number):
        super().manual_seed(number)
        return self


class Event:
    "A mark in time, as `torch.cuda.Event`."
    def __init__(self, **_): pass
    def record(self) -> None: self.at = time.perf_counter()
    def elapsed_time(self, other) -> float: return (other.at - self.at) * 1e3


def pretended(free: int, capability: tuple[int, int]) -> dict:
    "What `torch.cuda` says of the GPU, with so many bytes free."
    nothing = lambda *_, **__: None
    return dict(_lazy_init=nothing, is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, get_device_name=lambda *_: "none, but for tests",
                get_device_capability=lambda *_: capability, mem_get_info=lambda *_: (free, free), memory_allocated=lambda *_: 0, max_memory_allocated=lambda *_: 0,
                reset_peak_memory_stats=nothing, synchronize=nothing, empty_cache=nothing, Event=Event)


@contextlib.contextmanager
def gpu(free: int = 2**36,                       # bytes of its memory; images that want more than half of them stay on the host
        capability: tuple[int, int] = (7, 5)     # from (8, 0) on it multiplies bf16, which many CPUs are very slow at
       ):
    "Inside, there is a GPU; gives the `Pretend` that watches it."
    mode, run, steps, autocast = Pretend(), threading.Thread.run, StageSteps.steps, torch.autocast

    def watched(thread):
        with mode: run(thread)

    def counted(epochs, all_steps):
        for step in steps(epochs, all_steps):
            mode.steps, mode.local.stepping = mode.steps + 1, True
            yield step
            mode.local.stepping = False

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs): super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    with contextlib.ExitStack() as inside:
        for where, changes in ((torch.cuda, pretended(free, capability)), (torch, dict(Generator=Stream, autocast=Autocast)),
                               (threading.Thread, dict(run=watched)), (StageSteps, dict(steps=counted)),
                               (capture, dict(_on_side_stream=lambda step, device: step(), FAILURES=[], _record=recorder(mode))), (norms, dict(COMPILE_NORMS="off"))):
            for name, value in changes.items(): inside.enter_context(patch.object(where, name, value))
        for check in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):     # would ask the driver
            if hasattr(torch.optim.Optimizer, check): inside.enter_context(patch.object(torch.optim.Optimizer, check, lambda _: None))
        with mode: yield mode
