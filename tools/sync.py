"""Bring the package in step with the notebooks, and the notebooks into the form that git keeps.

`make sync` runs this. The tests ask the same functions whether there is anything left to do.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


FOLDERS = {"baselines": "45", "runs": "55", "views": "65", "bench": "66"}  # where each folder of nbs/ stands in the order


def place(path):
    "Where a notebook stands in the reading order: a notebook imports only modules of earlier ones."
    folder = path.parent.name if path.parent.name in FOLDERS else ""
    return (FOLDERS.get(folder, path.stem[:2]), path.stem)


def notebooks(root=ROOT):
    "Every notebook of the project, in reading order."
    found = [p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return sorted(found, key=lambda p: ("99",) if p.stem == "index" else place(p))


def modules(root):
    "The package's modules: file name -> text."
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8")
            for p in sorted((root / "domainmix").rglob("*.py"))}


def exported(root=ROOT):
    "What the notebooks export: file name -> text. Made in a copy, so that the package is never half there."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(root / "settings.ini", copy)
        for name in ("nbs", "domainmix"):
            (copy / name).mkdir()
        shutil.copy(root / "domainmix" / "__init__.py", copy / "domainmix")
        for nb in notebooks(root):
            beside = copy / nb.relative_to(root)
            beside.parent.mkdir(exist_ok=True)
            shutil.copy(nb, beside)
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"the notebooks cannot be exported:\n{done.stdout}{done.stderr}")
        return modules(copy)


def is_progress(output):
    "Is it a live widget and nothing else, as a progress bar is? A saved notebook would show an error in its place."
    kinds = output.get("data", {}).keys()
    return "application/vnd.jupyter.widget-view+json" in kinds and kinds <= {"application/vnd.jupyter.widget-view+json", "text/plain"}


def cleaned(text):
    "A notebook's JSON without what changes from one execution to the next: counts, ids, widget state, progress bars."
    from nbdev.clean import clean_nb
    nb = json.loads(text)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"], clean_ids=True)    # papermill looks for a cell tagged `parameters`
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if not is_progress(o)]
            for output in cell["outputs"]:
                if "image/jpeg" in output.get("data", {}):     # the same picture, five times as large
                    output["data"].pop("image/png", None)
                if any(kind.startswith("image/") for kind in output.get("data", {})):    # without a kernel a view is its picture
                    output["data"].pop("application/vnd.jupyter.widget-view+json", None)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def is_clean(text):
    "Is there nothing to clean? The order of the keys is left to whoever wrote them."
    return json.loads(text) == json.loads(cleaned(text))


def sync(root=ROOT):
    "Write every file that is out of step, and say which."
    texts = {nb: nb.read_text(encoding="utf-8") for nb in notebooks(root)}
    changes = {nb: cleaned(text) for nb, text in texts.items() if not is_clean(text)}
    wanted = exported(root)
    changes |= {root / name: text for name, text in wanted.items()}
    for path, text in changes.items():
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print("wrote", path.relative_to(root))
    for name in modules(root).keys() - wanted.keys():
        (root / name).unlink()
        print("removed", name, "which no notebook exports")


if __name__ == "__main__":
    sync()
