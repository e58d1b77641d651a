"""Run notebooks and save their outputs. `make notebooks` runs this.

Every cell runs in order in a fresh kernel, on one thread, without progress bars. Cells with a flag of `tst_flags`
(slow, cuda, data) are not run and keep their saved outputs. What differs between two runs or two machines is not
saved: warnings, execution counts, widget state. Pictures are saved with at most 256 colours. The first picture of each
notebook also becomes a thumbnail for the index.

The companions (90 to 98) show a run with the default settings on the embedded world. It is trained first where it is
missing, in data/runs/notebooks; this takes about a quarter of an hour on two cores. `--small` takes the small example
that the tests use.
"""
import argparse
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from sync import ROOT, cleaned, notebooks

SETUP = """
import os, warnings
warnings.filterwarnings("ignore")
%matplotlib inline
%config InlineBackend.figure_formats = ["png"]
import matplotlib
matplotlib.rcParams["figure.dpi"] = 80
"""
EXAMPLE = "notebooks"    # the run that the companions show
THUMBNAIL = 220          # columns
FOLDER = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")    # a folder that exists for one run only
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}


def skipped_flags():
    "The directives whose cells are not run: `tst_flags` in settings.ini."
    line = re.search(r"(?m)^tst_flags\s*=\s*(.*)$", (ROOT / "settings.ini").read_text(encoding="utf-8"))
    return line[1].split()


def is_skipped(source, flags):
    "Does a cell carry one of `flags`, or `eval: false`?"
    head = re.match(r"(\s*#\s*\|[^\n]*\n?)*", source)[0]
    return any(re.search(rf"#\s*\|\s*{flag}\b", head) for flag in flags) or bool(re.search(r"eval:\s*false", head))


def smaller_png(data):
    "The same picture with a palette of 256 colours, where that is smaller; base64 in, base64 out."
    raw = base64.b64decode(data)
    image, out = Image.open(io.BytesIO(raw)).convert("RGB"), io.BytesIO()
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return data if out.tell() >= len(raw) else base64.b64encode(out.getvalue()).decode()


def saved_outputs(outputs):
    "The outputs of a cell that are worth keeping."
    kept = [o for o in outputs if not (o["output_type"] == "stream" and o["name"] == "stderr")]
    for output in kept:
        if "text" in output:
            output["text"] = FOLDER.sub("FOLDER", output["text"])
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = smaller_png(data["image/png"])
    return kept


def first_picture(nb):
    "The first picture of a notebook as bytes, or None."
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    found = [o["data"][kind] for o in outputs for kind in ("image/png", "image/jpeg") if kind in o.get("data", {})]
    return base64.b64decode(found[0]) if found else None


def save_thumbnail(path, nb):
    "Write the first picture of a notebook, made small, for the index."
    picture = first_picture(nb)
    if picture:
        name = path.relative_to(ROOT / "nbs").with_suffix(".png").as_posix().replace("/", "_")
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        out = ROOT / "nbs" / "images" / "thumbnails" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        image.quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


def make_example():
    "Train the run that the companions show, or what is missing of it; it has a stage 0 of its own."
    sets = ["--synthetic", "world", "--real", "world", "--target", "world"]
    command = [sys.executable, "-m", "domainmix.cli", "run", *sets, "--net.weights", "none", "--run", EXAMPLE, "--data", str(ROOT / "data")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def is_companion(path):
    return path.parent.name == "nbs" and path.stem.startswith("9")


def run(path, small=False, timeout=None):
    "Run one notebook and write it back with its outputs; an error in a cell is raised and nothing is written."
    nb = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    size = "small" if small else "full"
    flags = skipped_flags()
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    with client.setup_kernel(env={**os.environ, **ENVIRONMENT, "DOMAINMIX_SIZE": size}):
        first = nb.cells[0]
        client.execute_cell(nbformat.v4.new_code_cell(SETUP), 0)
        nb.cells[0] = first    # the client puts what it executes there
        for number, cell in enumerate(nb.cells):
            if cell.cell_type == "code" and cell.source.strip() and not is_skipped(cell.source, flags):
                cell.outputs = []
                client.execute_cell(cell, number)
                cell.outputs = saved_outputs(cell.outputs)
                if "parameters" in cell.metadata.get("tags", []) and not small:
                    client.execute_cell(nbformat.v4.new_code_cell(f'run, again = "{EXAMPLE}", True'), number)
                    nb.cells[number] = cell
    path.write_text(cleaned(nbformat.writes(nb)), encoding="utf-8")
    save_thumbnail(path, nb)


def main():
    "Run the notebooks that are named, or all of them."
    parser = argparse.ArgumentParser(description="Run notebooks and save their outputs.")
    parser.add_argument("names", nargs="*", help="parts of paths below nbs/, such as 26_losses or runs/; none: all notebooks")
    parser.add_argument("--small", action="store_true", help="companions: the small example instead of the default settings")
    args = parser.parse_args()
    names = args.names
    chosen = [p for p in notebooks() if not names or any(n in p.relative_to(ROOT).as_posix() for n in names)]
    failed = []
    if any(is_companion(p) for p in chosen) and not args.small:
        make_example()
    for path in chosen:
        start = time.perf_counter()
        try:
            run(path, args.small)
            said = f"{time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} KB"
        except CellExecutionError as error:
            failed.append(path)
            said = f"failed\n{error}"
        print(f"{path.relative_to(ROOT)}: {said}", flush=True)
    return f"{len(failed)} of {len(chosen)} notebooks failed" if failed else 0


if __name__ == "__main__":
    sys.exit(main())
