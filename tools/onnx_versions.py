"""Run exported networks in several versions of onnxruntime, and compare their features with PyTorch's.

    python tools/onnx_versions.py                            # the oldest that installs here, and the newest
    python tools/onnx_versions.py --versions 1.16.3 1.20.1
    python tools/onnx_versions.py --python python3.10        # versions for another Python

Each version is installed in a virtual environment of its own, which is deleted afterwards. Which versions install depends
on the version of Python. Exit code: 0 all agree, 1 some do not, 3 none could be installed.
"""
import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from domainmix.backbone import build_backbone
from domainmix.deploy import INPUT_KINDS, export, parity_images, prepare_input
from domainmix.evaluation import extract_features
from domainmix.runs.settings import configure
from domainmix.runs.stages import save_net

OLD = ("1.14.1", "1.15.1", "1.16.3", "1.17.3", "1.18.1", "1.19.2", "1.20.1", "1.22.1")   # opset 18 came with 1.14
NUMPY_2 = (1, 19)           # the first onnxruntime that works with NumPy 2
KINDS = ("uint8", "float32")
BATCHES = (0, 1, 5)
TOLERANCE = 1e-4
INSIDE = """
import sys
import numpy as np
import onnxruntime
onnxruntime.set_default_logger_severity(3)
folder, found = sys.argv[1], {}
for name, batch in np.load(folder + "/batches.npz").items():
    kind = name.split("-")[0]
    session = onnxruntime.InferenceSession(folder + "/" + kind + "/model.onnx", providers=["CPUExecutionProvider"])
    found[name] = session.run(None, {"images": batch})[0]
np.savez(folder + "/found.npz", **found)
print(onnxruntime.__version__, "Python", sys.version.split()[0], "NumPy", np.__version__)
"""


def write_models(folder):
    "Export a small network once for each input, write the batches, and return PyTorch's features for each."
    config = configure(height=32, width=16, **{"net.width": 8, "net.stripes": 2})
    net = build_backbone(config.net, 1)
    with torch.no_grad():      # statistics as after training
        net.train()(torch.randn(16, 3, 32, 16, generator=torch.Generator().manual_seed(0)))
    net.eval()
    save_net(net, config, folder)
    images, batches, wanted = parity_images(32, 16)["structured"], {}, {}
    features = extract_features(net, images[:max(BATCHES)], feature="raw", flip=True)
    for kind in KINDS:
        export(folder/"model.safetensors", folder/kind, config, formats=("onnx",), input=kind, feature="raw", flip=True)
        for n in BATCHES:
            batches[f"{kind}-{n}"] = prepare_input(images[:n].numpy(), kind)
            wanted[f"{kind}-{n}"] = features[:n]
    np.savez(folder/"batches.npz", **batches)
    return wanted


def run(*command):
    "What a command prints, and whether it succeeded."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.returncode == 0, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def make_environment(python, version, folder):
    "The Python of a new environment with this onnxruntime; None where it does not install. An empty version: the newest."
    if not run(python, "-m", "venv", folder)[0]: return None
    inside = folder/("Scripts" if sys.platform == "win32" else "bin")/"python"
    old = version and tuple(map(int, version.split(".")[:2])) < NUMPY_2
    package = f"onnxruntime=={version}" if version else "onnxruntime"
    ok, _ = run(inside, "-m", "pip", "install", "-q", "--only-binary", ":all:", package, "numpy<2" if old else "numpy")
    return inside if ok else None


def compare(folder, inside, wanted):
    "Run the models in an environment and print how far the features are from PyTorch's; do all agree?"
    (folder/"found.npz").unlink(missing_ok=True)
    ok, said = run(inside, "-c", INSIDE, folder)
    if not ok:
        print("failed:", re.sub(r"\s+", " ", said)[-300:])
        return False
    found = np.load(folder/"found.npz")
    shapes = all(found[name].shape == w.shape for name, w in wanted.items())
    off = {kind: max(np.abs(found[n] - w).max(initial=0) for n, w in wanted.items() if n.startswith(kind)) for kind in KINDS}
    good = shapes and all(v <= TOLERANCE for v in off.values())
    numbers = ", ".join(f"{kind} {v:.1e}" for kind, v in off.items())
    print(f"onnxruntime {said.strip()}: largest difference {numbers}; batches of {', '.join(map(str, BATCHES))}",
          "agree" if good else "DIFFER")
    return good


def main(versions, python):
    "Compare in the given versions; none given: the oldest that installs, and the newest."
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted = write_models(folder)
        for group in ([[v] for v in versions] if versions else [OLD, ("",)]):
            for version in group:
                inside = make_environment(python, version, folder/f"env{version}")
                if inside is None:
                    print("onnxruntime", version or "newest", "does not install here")
                    continue
                results.append(compare(folder, inside, wanted))
                break
    return 3 if not results else int(not all(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="*", default=[], help="versions of onnxruntime")
    parser.add_argument("--python", default=sys.executable, help="the Python of the environments")
    args = parser.parse_args()
    assert set(KINDS) <= set(INPUT_KINDS)
    sys.exit(main(args.versions, args.python))
