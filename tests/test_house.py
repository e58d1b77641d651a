"""The rules of the house: package and notebooks in step, clean files, imports that go one way."""
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import domainmix
import style
from forks import run_code
from sync import ROOT, cleaned, exported, is_clean, modules, notebooks, place

LONGEST_CELL = 25                # lines of an exported cell
LONGEST_MODULE = 440             # lines that are neither blank nor a marker of the export
LONG_MODULES = {"world"}
LARGEST_OUTPUT = 400_000         # characters of one saved output
LARGEST_NOTEBOOK = 1_000_000     # bytes
LARGEST_SUM = 12_000_000         # bytes of all notebooks together
SHARED_NAMES = {"main"}          # every command has one

ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
ini.read(ROOT / "settings.ini", encoding="utf-8")
CFG = ini["DEFAULT"]

each_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())


def cells(path, kind="code"):
    "(number, source, outputs) of the cells of one kind."
    nb = json.loads(path.read_text(encoding="utf-8"))
    return [(i, "".join(c["source"]), c.get("outputs", [])) for i, c in enumerate(nb["cells"]) if c["cell_type"] == kind]


def floors():
    "Module name -> place of its notebook in the reading order."
    found = {}
    for path in notebooks():
        for _, source, _ in cells(path):
            match = re.match(r"\s*#\s*\|\s*default_exp\s+([\w.]+)", source)
            if match:
                found[match[1]] = place(path)
    return found


def tracked():
    "The files that git knows, or that it would take: relative paths."
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [n for n in done.stdout.split("\0") if n and (ROOT / n).is_file()]


def test_package_is_what_the_notebooks_export():
    wanted, there = exported(), modules(ROOT)
    stale = sorted(there.keys() - wanted.keys())
    missing = sorted(wanted.keys() - there.keys())
    differ = sorted(n for n in there.keys() & wanted.keys() if there[n] != wanted[n])
    assert not (stale or missing or differ), f"run `make sync` (no notebook exports {stale}, missing {missing}, out of step {differ})"


@each_notebook
def test_notebook_is_clean(path):
    text = path.read_text(encoding="utf-8")
    assert "application/vnd.jupyter.widget-state+json" not in text, "it holds the state of a widget: run `make sync`"
    assert is_clean(text), "run `make sync`"


@each_notebook
def test_saved_outputs_are_small_and_no_error(path):
    for i, source, outputs in cells(path):
        for o in outputs:
            assert o["output_type"] != "error", f"cell {i} was saved with an error: {o.get('evalue')}"
            size = len(json.dumps(o))
            assert size <= LARGEST_OUTPUT, f"an output of cell {i} takes {size} characters, more than {LARGEST_OUTPUT}"
    size = path.stat().st_size
    assert size <= LARGEST_NOTEBOOK, f"it takes {size} bytes, more than {LARGEST_NOTEBOOK}"


@each_notebook
def test_notebook_opens_with_a_title_and_why(path):
    number, source, _ = cells(path, "markdown")[0]
    assert number == 0 and re.match(r"# \S.*\n\n> \S", source), "the first cell is `# Title`, an empty line, `> subtitle`, and why"


@each_notebook
def test_cells_are_short_and_narrow(path):
    found = style.measure(path)
    assert max(found.cell_lines, default=0) <= LONGEST_CELL, f"a defining cell has {max(found.cell_lines)} lines"
    assert not found.long_lines, f"lines of over {style.COLUMNS} columns:\n" + "\n".join(found.long_lines)


@each_notebook
def test_a_component_notebook_shows_what_it_explains(path):
    found = style.measure(path)
    if found.component:
        assert found.pictures, "no saved picture: draw what it explains and run `make notebooks`"


@each_notebook
def test_saved_outputs_are_the_same_everywhere(path):
    "No address of an object, no folder of one machine, no time of day, no speed."
    changing = re.compile(r"\b0x[0-9a-f]{6,}|/tmp/|\b\d\d:\d\d:\d\d\b|\bit/s\b|images/s\b|\b\d[\d.]* seconds\b")
    for i, _, outputs in cells(path):
        for o in outputs:
            texts = [o.get("text", ""), *(v for k, v in o.get("data", {}).items() if k.startswith("text/"))]
            said = "\n".join("".join(t) for t in texts)
            assert not changing.search(said), f"cell {i} has saved {changing.search(said)[0]!r}"


def test_the_style_of_all_notebooks_together():
    "The figures that `python tools/style.py` prints."
    found = style.summary([style.measure(p) for p in notebooks()])
    assert found["median lines of a defining cell"] <= 10, found
    assert found["cells with two or more definitions, %"] < 5, found
    assert found["size of all notebooks, MB"] * 1e6 < LARGEST_SUM, found


def test_style_counts(tmp_path, monkeypatch):
    "By hand: two functions and a long line in one cell, a picture in another."
    monkeypatch.setattr(style, "ROOT", tmp_path)
    code = lambda source, *outputs: {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": list(outputs)}
    picture = {"output_type": "display_data", "data": {"image/png": ""}}
    wide = "x = 1  # " + "." * style.COLUMNS
    nb = {"cells": [code("#| default_exp a"), code(f"#| export\ndef f(): return 1\n\ndef g(): return 2\n{wide}"), code("f()", picture)]}
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "00_a.ipynb").write_text(json.dumps(nb))
    found = style.measure(tmp_path / "nbs" / "00_a.ipynb")
    assert (found.name, found.component, found.cell_lines, found.definitions) == ("00_a", True, [3], [2])
    assert (found.lines, found.long_lines, found.pictures, found.cells_with_output) == (4, [wide], 1, 1)


def test_modules_are_short():
    for name, text in modules(ROOT).items():
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("# %%")]
        if Path(name).stem not in {"_modidx", *LONG_MODULES}:
            assert len(lines) <= LONGEST_MODULE, f"{name} has {len(lines)} lines"


def test_no_name_stands_in_two_modules():
    where = {}
    for name, text in modules(ROOT).items():
        for node in ast.parse(text).body if Path(name).stem not in ("_modidx", "__init__") else []:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                where.setdefault(node.name, []).append(name)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id != "__all__":
                        where.setdefault(target.id, []).append(name)
    twice = {name: files for name, files in where.items() if len(set(files)) > 1 and name not in SHARED_NAMES}
    assert len(where) > 500 and not twice, twice


def test_links_between_notebooks_and_texts_lead_somewhere():
    "Every relative link in a notebook or a text; tests/test_docs.py follows them to their place on the page."
    texts = {p: "\n".join(source for _, source, _ in cells(p, "markdown")) for p in notebooks()}
    texts |= {ROOT / n: (ROOT / n).read_text(encoding="utf-8") for n in tracked() if n.endswith(".md")}
    broken, followed = [], 0
    for path, text in texts.items():
        for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", re.sub(r"`[^`\n]*`|\$[^$]*\$", "", text)):
            if not re.match(r"[a-z]+:", link):
                followed += 1
                if not (path.parent / link).exists():
                    broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert followed > 50 and not broken, "\n".join(broken)


def imports(tree, module):
    "(module, names) of every import in a syntax tree; modules of this package as nbdev names them: runs.settings."
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                yield a.name.removeprefix("domainmix."), []
        elif isinstance(node, ast.ImportFrom):
            names = [a.name for a in node.names]
            start = package[:len(package) + 1 - node.level] if node.level else []
            target = ".".join(start + ([node.module] if node.module else [])).removeprefix("domainmix.")
            if target in ("", "domainmix"):
                for name in names:
                    yield name, []
            else:
                yield target, names


def test_imports_go_down():
    floor = floors()
    assert floor, "no notebook exports anything"
    wrong, seen = [], 0
    for name, text in modules(ROOT).items():
        module = Path(name).relative_to("domainmix").with_suffix("").as_posix().replace("/", ".")
        for target, names in imports(ast.parse(text), module):
            if target in floor and module in floor:
                seen += 1
                if floor[target] > floor[module]:
                    wrong.append(f"{module} {floor[module]} imports {target} {floor[target]}")
            if "*" in names:
                wrong.append(f"{module} imports everything from {target}")
    assert seen > 100 and not wrong, "\n".join(wrong)


HEADLESS = """
import importlib, sys
root, blocked, *names = sys.argv[1:]
blocked = blocked.split(',')
there = {name.partition('.')[0] for name in sys.modules}
if there & {'domainmix', *blocked}: sys.exit(f'imported already: {there & {"domainmix", *blocked}}')
sys.modules.update(dict.fromkeys(blocked))   # None there: the import fails, as if it were not installed
for name in names:
    try: importlib.import_module('domainmix.' + name)
    except ModuleNotFoundError as e: sys.exit(f'domainmix.{name}: {e}')
"""


def headless(root, names, blocked="nbdev,fastcore,execnb,tyro,faiss,umap,IPython,ipywidgets,matplotlib,jscatter,pandas"):
    "Import modules of the package where only what the headless path needs is installed."
    return run_code(HEADLESS, root, blocked, *names, cwd=root)


def test_package_imports_where_there_are_no_notebooks():
    done = headless(ROOT, sorted(floors()))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_headless_check_notices(tmp_path):
    (tmp_path / "domainmix").mkdir()
    (tmp_path / "domainmix" / "__init__.py").write_text("")
    (tmp_path / "domainmix" / "bad.py").write_text("import matplotlib.pyplot")
    done = headless(tmp_path, ["bad"])
    assert done.returncode and "domainmix.bad: " in done.stderr and "matplotlib" in done.stderr


WITHOUT_NUMBA = """
import sys, warnings, numpy as np, torch
torch.set_num_threads(1)
from domainmix.knn import toy_features
from domainmix.pseudolabel import ClusterConfig, cluster
from domainmix.evaluation import rank
from domainmix.jaccard import RerankConfig
def answers():
    x, pid, camera = toy_features(40, 12, noise=1.0)
    found = cluster(x, ClusterConfig(k1=12, k2=3))
    q, g = slice(0, 80), slice(80, None)
    scores = [rank(x[q], x[g], pid[q], pid[g], camera[q], camera[g], rerank=r) for r in (None, RerankConfig(8, 3))]
    return [found.labels, found.labels_tight, found.labels_loose, found.r_comp, found.r_indep] + [s.average_precision for s in scores]
if len(sys.argv) > 2: sys.modules["numba"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    np.savez(sys.argv[1], *answers())
print(sum("numba" in str(w.message) for w in said))
"""


@pytest.mark.slow
def test_clusters_and_scores_are_the_same_without_numba(tmp_path):
    found = []
    for name, *more in (("with",), ("without", "blocked")):
        command = [sys.executable, "-c", WITHOUT_NUMBA, str(tmp_path / f"{name}.npz"), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        found.append([v for _, v in sorted(np.load(tmp_path / f"{name}.npz").items())])
    assert int(done.stdout) >= 1, "it should say that numba is missing"
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_version_and_author_stand_in_one_place():
    assert domainmix.__version__ == CFG["version"]
    quoted = re.compile(r"[\"' ]" + re.escape(CFG["version"]) + r"(?![\w.])")
    for name in ["setup.py", "pyproject.toml", "CITATION.cff", "Makefile", *(n for n in modules(ROOT) if not n.endswith("__init__.py"))]:
        assert not quoted.search((ROOT / name).read_text(encoding="utf-8")), f"{name} repeats the version"
    assert CFG["author"] in (ROOT / "CITATION.cff").read_text(encoding="utf-8"), "CITATION.cff names another author than settings.ini"


def test_setup_reads_the_settings():
    fields = ["--name", "--version", "--author", "--license"]
    done = subprocess.run([sys.executable, "setup.py", "-q", *fields], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.split("\n")[:4] == [CFG["lib_name"], CFG["version"], CFG["author"], "Apache-2.0"], done.stdout + done.stderr


def test_no_file_names_a_place_on_one_machine():
    places = ["/" + n + r"/[\w.-]" for n in ("home", "root", "Users", "tmp/ipykernel")]
    places += [re.escape(str(p)) + "/" for p in (ROOT, Path.home()) if len(p.parts) > 2]
    pattern = re.compile(r"(?<![\w./-])(?:" + "|".join(places) + ")")
    found = []
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data:
            found += [f"{name}: {line.strip()[:120]}" for line in data.decode("utf-8", "replace").splitlines() if pattern.search(line)]
    assert not found, "\n".join(found)


def test_no_data_is_tracked():
    shipped = {"domainmix/parsing.safetensors": 300_000, "domainmix/builtin.safetensors": 4_000_000,      # learned from synthetic people alone
               "domainmix/builtin-128.safetensors": 4_000_000}
    wrong = [n for n in tracked() if n.startswith("data/") and n != "data/README.md" or n not in shipped and n.endswith((".safetensors", ".npz", ".ckpt"))]
    assert not wrong and all((ROOT / name).stat().st_size < size for name, size in shipped.items()), wrong


def test_progress_bars_are_cleaned_away():
    bar = {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": ["0%"]}}
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "", "text/plain": ["<Figure>"]}}
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": 3, "source": ["1"], "outputs": [bar, picture]}
    text = json.dumps({"cells": [cell], "metadata": {"widgets": {}}, "nbformat": 4, "nbformat_minor": 5})
    assert not is_clean(text) and json.loads(cleaned(text))["cells"][0]["outputs"] == [picture]


def test_a_view_is_saved_as_its_picture():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "image/png": "aGk=", "text/plain": "a view"}
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "execution_count": 1, "source": [],
            "outputs": [{"output_type": "display_data", "metadata": {}, "data": widget}]}
    nb = json.loads(cleaned(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})))
    assert nb["cells"][0]["outputs"][0]["data"].keys() == {"image/png", "text/plain"}
    assert nb["cells"][0]["metadata"] == {"tags": ["parameters"]}


def test_papermill_lists_the_parameters_of_a_companion(caplog):
    import papermill
    for path in (p for p in notebooks() if p.stem[:2] in ("91", "92", "93", "94")):
        found = papermill.inspect_notebook(str(path))
        assert list(found)[:2] == ["run", "data"] and found["run"]["default"] == "None" and all(p["help"] for p in found.values()), (path.name, found)
    assert not caplog.records, caplog.text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_slurm_job_is_put_back_while_it_gets_on(tmp_path):
    "srun and scontrol are stand-ins: a job that was stopped is put back, one that fails in the same place is not."
    home, bin = tmp_path/"runs/far", tmp_path/"bin"
    home.mkdir(parents=True), bin.mkdir()
    (tmp_path/"run.json").write_text(json.dumps({"data": str(tmp_path), "run": "far"}))
    (bin/"srun").write_text('#!/bin/sh\necho "$@" >> "$HERE/said"\n[ -e "$HERE/done" ] && exit 0\nexit 143\n')
    (bin/"scontrol").write_text('#!/bin/sh\necho scontrol "$@" >> "$HERE/said"\n[ "$1" = show ] && echo node7 && echo node8\nexit 0\n')
    for f in bin.iterdir(): f.chmod(0o755)
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "HERE": str(tmp_path), "PYTHON": sys.executable, "SLURM_JOB_NODELIST": "node[7-8]",
           "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "99"}
    def job():
        done = subprocess.run(["bash", ROOT/"tools/slurm.sh", str(tmp_path/"run.json")], env=env, capture_output=True, text=True)
        return done.returncode, (tmp_path/"said").read_text().count("scontrol requeue 99")
    (home/"last.ckpt").touch()
    assert job() == (143, 1)
    assert job() == (143, 1)                                       # no further than before
    (home/"last.ckpt").unlink(), (home/"stage.json").touch()
    assert job() == (143, 2)
    (tmp_path/"done").touch()
    assert job() == (0, 2)
    said = (tmp_path/"said").read_text()
    assert "--nnodes 2 --nproc_per_node 4" in said and "--rdzv_endpoint node7:29500" in said and "-m domainmix.pipeline --config" in said
