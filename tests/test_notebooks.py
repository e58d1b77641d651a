"""Every notebook runs, in a process of its own, through nbdev's own test command (`forks.py`: torch is imported once for all).

That command says nothing about what it ran: it succeeds when no cell was eligible, and a cell that ends
the process ends it in silence. So the eligible cells are counted here, and success must be said aloud.
"""
import configparser
import json
import os
import re
import shutil
import sys
import tempfile

import pytest

from forks import shared
from sync import ROOT, notebooks

LIMIT = 400  # seconds for one notebook, on a slow and busy core


def skip_flags(root=ROOT):
    "The directives that keep a cell from running in a test."
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(root / "settings.ini", encoding="utf-8")
    return set(ini["DEFAULT"]["tst_flags"].split())


def directives(source):
    "The `#| name` lines at the top of a cell: name -> the words after it."
    found = {}
    for line in source.splitlines():
        match = re.match(r"\s*#\s*\|\s*([\w-]+:?)\s*(.*)", line)
        if match:
            found[match[1]] = match[2]
        elif line.strip():
            break
    return found


def eligible(path, root=ROOT):
    "The code cells that a test of the notebook must run."
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    if any(kind != "code" and re.search(r"(?m)^\W*skip_exec\s*:", source) for kind, source in cells):
        return []
    code = [source for kind, source in cells if kind == "code" and source.strip()]
    return [s for s in code if not directives(s).keys() & skip_flags(root) and directives(s).get("eval:", "").lower() != "false"]


def forks():
    "Has imported what nearly every notebook imports from others; nothing of this package."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return shared("import nbdev.test, torchvision, sklearn.cluster, matplotlib.pyplot, ipywidgets", PYTHONPATH=path, MPLBACKEND="agg")


def run(path, root=ROOT):
    "Run one notebook as `nbdev_test` does; return what is wrong with it, or nothing."
    if not eligible(path, root):
        return f"{path.name}: no cell is eligible for testing"
    with tempfile.NamedTemporaryFile("r", suffix=".txt", errors="replace") as out:
        code = forks()("nbdev.test:nbdev_test", path=str(path), n_workers=0, do_print=True, cwd=root, out=out.name, limit=LIMIT)
        said = out.read()
    if code is None:
        return f"{path.name} did not end within {LIMIT} s\n{said[-3000:]}"
    started = [line for line in said.splitlines() if line.startswith("Starting ")]
    if code == 0 and "Success." in said.splitlines() and started == [f"Starting {path}"]:
        return ""
    cell = re.search(r"While Executing Cell #(\d+)", said)
    source = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][int(cell[1]) - 1]["source"]) if cell else "unknown"
    return f"{path.name} failed (exit status {code}) in the cell\n\n{source}\n\n{said[-8000:]}"


# From a folder of images to a model: the walkthrough does the same stages.
LONGER = {"96_your_footage"}


@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.slow) if p.stem in LONGER else p for p in notebooks()],
                         ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_notebook(path):
    problem = run(path)
    if problem:
        pytest.fail(problem, pytrace=False)


# The runner itself: each way in which a notebook can be broken must be noticed.

def project(folder, *cells, front=None):
    "A project of one notebook with these code cells."
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "nbs").mkdir()
    cells = [{"cell_type": "code", "source": s, "metadata": {}, "outputs": [], "execution_count": None, "id": f"c{i}"}
             for i, s in enumerate(cells)]
    if front:
        cells.insert(0, {"cell_type": "raw", "source": front, "metadata": {}, "id": "front"})
    nb = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path = folder / "nbs" / "00_one.ipynb"
    path.write_text(json.dumps(nb))
    return path


def test_a_good_notebook_passes(tmp_path):
    path = project(tmp_path, "x = 1", "#| cuda\nraise SystemError('flagged cells do not run')", "assert x == 1")
    path.with_name("10_other.ipynb").write_text(path.read_text().replace("x = 1", "raise SystemError('this one was not asked for')"))
    assert run(path, tmp_path) == ""


def test_a_notebook_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 0.5)
    assert "did not end" in run(project(tmp_path, "import time; time.sleep(600)"), tmp_path)


@pytest.mark.parametrize("cell, words", [
    ("assert x == 2, 'x is one'", ["x is one", "assert x == 2"]),
    ("x ==", ["SyntaxError"]),
    ("raise SystemExit(0)", ["SystemExit"]),
    ("import os; os._exit(0)", ["exit status 0"]),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ["exit status -11"]),
], ids=["assertion", "syntax", "exit", "silent-exit", "crash"])
def test_a_broken_notebook_fails(tmp_path, cell, words):
    problem = run(project(tmp_path, "x = 1", cell), tmp_path)
    assert all(w in problem for w in words), problem


@pytest.mark.parametrize("cell", ["#| slow\n1", "#| eval: false\n1", "#|cuda\n1", "  "])
def test_a_notebook_without_an_eligible_cell_fails(tmp_path, cell):
    assert "no cell is eligible" in run(project(tmp_path, cell), tmp_path)


def test_a_notebook_that_asks_to_be_skipped_fails(tmp_path):
    path = project(tmp_path, "1 / 0", front="---\nskip_exec: true\n---")
    assert "no cell is eligible" in run(path, tmp_path)


# The companions on what their readers have: a run, one that is being written, a folder without any.

COMPANIONS = ("91_noisy_clusters", "92_domain_map", "93_rerun_stage", "94_retrieval")
SAID = {  # what the pages must say where something is missing; `begun`: stage 1 is being written
    "done": {"92_domain_map": ["has not been probed epoch by epoch"]},
    "half": {"92_domain_map": ["stage3 of half is not there"]},
    "begun": {"91_noisy_clusters": ["stage1 of begun is not finished"], "92_domain_map": ["stage3 of begun is not there"]},
    "none": dict.fromkeys(COMPANIONS, ["there is no run", "no config.json", "there are begun, done, half"])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Folders of runs: finished, with stages 0 and 1 only, with the second of these half done, and empty."
    from domainmix.runs.settings import TINY_SETTINGS, configure
    from domainmix.runs.pipeline import run
    data = tmp_path_factory.mktemp("companions")
    run(configure(TINY_SETTINGS, real="world", target="world", run="done", data=str(data)))
    home = data / "runs"
    half = shutil.copytree(home / "done", home / "half", ignore=shutil.ignore_patterns("stage2", "stage3", "metrics.json"))
    log = half / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if json.loads(line)["run"] in ("stage0", "stage1")))
    seal = shutil.copytree(half, home / "begun") / "stage1" / "stage.json"
    seal.write_text(seal.read_text().replace('"finished": true', '"finished": false'))
    (home / "none").mkdir()
    return home


def with_parameters(name, **parameters):
    "A companion with papermill's cell of parameters, without the cells that no test runs."
    import papermill.iorw
    import papermill.parameterize
    nb = papermill.parameterize.parameterize_notebook(papermill.iorw.load_notebook_node(str(ROOT / "nbs" / f"{name}.ipynb")), parameters)
    assert any("injected-parameters" in c.metadata.get("tags", []) for c in nb.cells), f"{name} has no cell tagged `parameters`"
    nb.cells = [c for c in nb.cells if not directives(c.source).keys() & skip_flags()]
    return nb


def page(nb):
    "All that a notebook's outputs say, and the kinds of its outputs; an error is raised."
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    for o in outputs:
        assert o["output_type"] != "error", "\n".join(o["traceback"])
    told = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return "\n".join("".join(t) for t in told), [kind for o in outputs for kind in o.get("data", {})]


def told_by(name, **parameters):
    "A companion, run: all that it says, and the kinds of its outputs."
    from execnb.nbio import dict2nb
    from execnb.shell import CaptureShell
    nb = dict2nb(json.loads(json.dumps(with_parameters(name, **parameters))))
    for cell in nb.cells:
        cell.outputs = []
    CaptureShell(mpl_format=None).run_all(nb, exc_stop=True)
    return page(nb)


@pytest.mark.parametrize("name", COMPANIONS)
@pytest.mark.parametrize("state", SAID)
def test_companion_says_what_is_missing(runs, state, name):
    "Each runs to its end, shows what there is, and says the rest."
    if state == "done" and not os.environ.get("DOMAINMIX_SLOW"): pytest.skip("a longer test: DOMAINMIX_SLOW=1; the example's run is done too")
    text, kinds = told_by(name, run=str(runs / state), data=str(runs.parent))
    assert all(words in text for words in SAID[state].get(name, [])), text
    assert sum(k.startswith("image/") for k in kinds) >= (0 if state == "none" or (state, name) == ("begun", "91_noisy_clusters") else 1), kinds
    assert ("text/html" in kinds) == (name in SAID[state]), text       # nothing else is missing


def test_retrieval_of_a_matcher(tmp_path):
    "Its rankings are shown; it has no feature, so there are no maps of where it looks."
    from domainmix.runs.settings import TINY_SETTINGS, configure
    from domainmix.runs.pipeline import run
    run(configure(TINY_SETTINGS, method="qaconv", target="world", run="pairs", data=str(tmp_path)))
    text, kinds = told_by("94_retrieval", run="pairs", data=str(tmp_path))
    assert "mAP" in text and "has no feature of one image" in text and any(k.startswith("image/") for k in kinds), text


def test_papermill_runs_a_companion(runs, tmp_path):
    "The real thing, once: a kernel of its own."
    import papermill
    source, out = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    shutil.copy(ROOT / "nbs" / "94_retrieval.ipynb", source)
    done = papermill.execute_notebook(str(source), str(out), dict(run="done", data=str(runs.parent)), progress_bar=False, log_output=False)
    assert "run done, seed 0" in page(done)[0]


@pytest.mark.slow
def test_a_page_of_the_companions(runs):
    "All of them, executed on a finished run, on one page that asks for nothing."
    from domainmix.views.report import notebook_report
    from domainmix.views.results import Results
    there = sorted(p.name for p in runs.iterdir())
    page, errors = notebook_report(Results(runs / "done"))
    text = page.read_text(encoding="utf-8")
    assert not errors and page == runs / "done" / "notebooks.html"
    sections = re.split(r'<section id="([^"]*)">', text)
    assert tuple(sections[1::2]) == COMPANIONS
    assert all("run done, seed 0" in s and s.count('src="data:image/') >= n for s, n in zip(sections[2::2], (4, 3, 3, 2))), [s.count('src="data:image/') for s in sections[2::2]]
    assert not re.search(r"""<script|<link|(?:src|href)=["'](?!data:|#)|url\(|@import""", text) and "default-src 'none'" in text and "<math" in text
    assert sorted(p.name for p in runs.iterdir()) == there                  # the stage that 93 could run again was not
