"""What the figures of benchmarks/gpu.py depend on, and their summary beside the targets."""
import importlib.util
import os
import platform
import subprocess
import time

# On one H200 or H100: ResNet-50, 256 x 128, bf16. Images a second, seconds, minutes; where in the results.
TARGETS = (
    ("step alone, bf16", "at least", 4500, "images/s", ("steps", "alone", "images_per_s")),
    ("stage 0", "at least", 4000, "images/s", ("steps", "stage0", "best", "images_per_s")),
    ("stage 2", "at least", 4000, "images/s", ("steps", "stage2", "best", "images_per_s")),
    ("stage 3, backbone", "at least", 4000, "images/s", ("steps", "stage3", "best", "images_per_s")),
    ("stage 3, discriminator", "at least", 4000, "images/s", ("steps", "stage3 discriminator", "best", "images_per_s")),
    ("stage 1", "at least", 3000, "images/s", ("steps", "stage1", "best", "images_per_s")),
    ("neighbours of 12,936", "at most", 1, "s", ("clusters", "12936", "knn", "seconds")),
    ("neighbours of 32,621", "at most", 2, "s", ("clusters", "32621", "knn", "seconds")),
    ("neighbours of 132,145", "at most", 15, "s", ("clusters", "132145", "knn", "seconds")),
    ("the paper's schedule", "at most", 60, "minutes", ("schedule", "minutes", "all")),
    ("the same, later", "at most", 25, "minutes", ("schedule", "minutes", "all")),
)


def first_line(path):
    "The first line of a file; None if it cannot be read."
    try:
        with open(path, encoding="utf-8", errors="replace") as f: return f.readline().strip()
    except OSError: return None


def cpu_name():
    "The name of the processor."
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            found = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    except OSError: found = []
    return found[0] if found else platform.processor() or platform.machine()


def driver_version():
    "Of NVIDIA's driver; None if there is none."
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try: return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError): return first_line("/proc/driver/nvidia/version")


def software(torch):
    "Versions of what computes."
    cudnn = torch.backends.cudnn
    there = {name: importlib.util.find_spec(name) is not None for name in ("faiss", "numba", "triton")}
    return dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
                cudnn=cudnn.version() if cudnn.is_available() else None, driver=driver_version(), **there)


def gpu(torch, device):
    "The GPU's name, memory and kind, and how many there are."
    found = torch.cuda.get_device_properties(device)
    return dict(name=found.name, gigabytes=found.total_memory / 1e9, multiprocessors=found.multi_processor_count,
                capability=f"{found.major}.{found.minor}", gpus=torch.cuda.device_count())


def machine(device):
    "The machine and its software; an error if the device is not there, or cannot compute."
    import torch
    wanted = "cuda" if device == "auto" else device
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        return dict(error=f"torch {torch.__version__} finds no GPU here")
    on = torch.device(wanted)
    cpu = dict(name=cpu_name(), cores=os.cpu_count(), threads=torch.get_num_threads(),
               simd=torch.backends.cpu.get_cpu_capability(), system=platform.platform())
    row = dict(device=str(on), cpu=cpu, software=software(torch), at=time.strftime("%Y-%m-%d %H:%M:%S %z"))
    name = cpu["name"]
    if on.type == "cuda":
        row["gpu"] = gpu(torch, on)
        name = row["gpu"]["name"]
        torch.ones(8, device=on).sum().item()    # a driver that is too old says so here
    return row | dict(say=f"{name}, torch {torch.__version__}")


def look_up(results, path):
    "The value at a path of nested results; None if it was not measured."
    for key in path: results = results.get(key) if isinstance(results, dict) else None
    return results


def target_line(results, name, kind, target, unit, path):
    "A figure beside its target."
    value = look_up(results, path)
    if value is None: return f"{name:<26}{'not measured':>12}   {kind} {target:,} {unit}"
    met = value >= target if kind == "at least" else value <= target
    number = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
    return f"{name:<26}{number:>12}   {kind} {target:,} {unit}: {'met' if met else 'missed'}"


def summary(results, sections):
    "All figures that have a target, and how each section ended."
    ended = {name: results[name]["status"] for name in sections}
    lines = [] if results["settings"]["small"] else [target_line(results, *target) for target in TARGETS]
    wrong = [f"{name}: {status}: {results[name].get('said', '')}" for name, status in ended.items() if status != "ok"]
    return dict(all_ok=not wrong, sections=ended, lines=lines + (wrong or ["every section ended well"]))
