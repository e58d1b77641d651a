"""The script of GPU checks, in miniature on a CPU: all sections are there, none takes another with it, wrong answers are noticed."""
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pretend
import run_flagged
from domainmix.files import load_json
from domainmix.runs.settings import configure
from forks import run_code
from sync import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu                                                          # noqa: E402
import gpu_agreement                                                # noqa: E402
import gpu_machine                                                  # noqa: E402
import gpu_sections                                                 # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu.py"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}       # the script finds the package by itself


def call(*argv, script=SCRIPT, timeout=400):
    "The script as a process: exit code, output, errors."
    done = subprocess.run([sys.executable, script, *map(str, argv)], env=ONE_THREAD, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def bench(tmp_path):
    "What a section is given, in miniature."
    def make(device="cpu", results=None):
        args = SimpleNamespace(device=device, small=True, backbone="small", scratch=str(tmp_path))
        return gpu_sections.Bench(args, results or {}, time.time() + 300, tmp_path / "section.json")
    return make


@pytest.mark.slow
def test_all_of_it_in_miniature(tmp_path):
    out = tmp_path / "small.json"
    code, said, error = call("--device", "cpu", "--small", "--out", out)
    assert code == 0, said + error
    found = load_json(out)
    assert list(found) == ["machine", "settings", *gpu.SHARES, "summary"] and found["summary"]["all_ok"]
    assert all(found[name]["status"] == "ok" and found[name]["seconds"] <= found[name]["limit_seconds"] + 1 for name in gpu.SHARES)
    assert [line.split()[0] for line in said.splitlines()[:1 + len(gpu.SHARES)]] == ["machine", *gpu.SHARES]        # a line for each
    assert found["machine"]["software"]["torch"] == torch.__version__ and found["machine"]["cpu"]["name"]
    assert {"driver", "cuda", "cudnn"} <= found["machine"]["software"].keys()
    for name, how in (("small", "SIGKILL"), ("small-b", "SIGTERM")):
        run = found["runs"][name]
        assert run["mAP"] == run["mAP_resumed"] and run["continued"] and run["struck"]["signal"] == how
        assert run["struck"]["epochs_after"] >= 1 and any("last.ckpt" in file for file in run["struck"]["checkpoints"])
    for name in ("stage0", "stage1", "stage2", "stage3", "stage3 discriminator"):
        row = found["steps"][name]["eager"]
        images = 16 if name == "stage1" else 8
        assert row["images_per_s"] == pytest.approx(images / row["milliseconds"] * 1e3) and row["operators"] > 10
        assert len(row["losses"]) == (6 if "disc" in name else 4) and np.isfinite(row["losses"]).all() and row["top"]
    assert any("conv" in t["name"] for t in found["steps"]["stage0"]["eager"]["top"])
    assert found["clusters"]["500"]["clusters"] > 5 and found["clusters"]["500"]["knn"]["seconds"] > 0
    assert found["evaluation"]["mAP"] > 0.1 and found["input"]["input"]["images_per_s"]["memory"] > 0
    assert sum(v for k, v in found["schedule"]["minutes"].items() if k != "all") == pytest.approx(found["schedule"]["minutes"]["all"])


FAULTY = """
import ctypes, json, os, sys, time
sys.path.insert(0, {folder!r})
import gpu, gpu_sections
def crash(b): b.keep(before=1); ctypes.string_at(0)
def hang(b): b.keep(before=2); os.fork() or time.sleep(900); time.sleep(900)
def full(b): raise gpu_sections.torch.cuda.OutOfMemoryError("CUDA out of memory, for example")
def unequal(b): return dict(agrees=False, say="they differ")
def fine(b): return dict(say="fine", saw=sorted(b.results))
for section in (crash, hang, full, unequal, fine):
    gpu.SHARES[section.__name__] = 1
    gpu_sections.SECTIONS[section.__name__] = section
if __name__ == "__main__": sys.exit(gpu.main())
"""


@pytest.mark.slow
def test_no_section_takes_another_with_it(tmp_path):
    script, out = tmp_path / "faulty.py", tmp_path / "some.json"
    script.write_text(FAULTY.format(folder=str(SCRIPT.parent)))
    names = ["crash", "hang", "full", "unequal", "fine"]
    began = time.time()
    code, said, error = call("--device", "cpu", "--small", "--budget", 20, "--out", out, "--sections", *names, script=script)
    found = load_json(out)
    assert code == 1 and time.time() - began < 60, said + error
    assert {name: found[name]["status"] for name in names} == dict(crash="crashed", hang="timed out", full="failed", unequal="disagrees", fine="ok")
    assert "SIGSEGV" in found["crash"]["said"] and any("in crash" in line for line in found["crash"]["where"])     # by faulthandler
    assert found["crash"]["before"] == 1 and found["hang"]["before"] == 2                   # what was measured is kept
    assert any("in hang" in line for line in found["hang"]["where"]) and 3 < found["hang"]["seconds"] < 8
    assert found["full"]["said"] == "OutOfMemoryError: CUDA out of memory, for example" and "Traceback" in "".join(found["full"]["where"])
    assert found["fine"]["saw"] == ["crash", "full", "hang", "machine", "settings", "unequal"]
    assert not found["summary"]["all_ok"] and any(line.startswith("unequal: disagrees: they differ") for line in found["summary"]["lines"])
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = run_code(code, "--out", tmp_path / "none.json", cwd=SCRIPT.parent)
    assert done.returncode == 2 and "finds no GPU here" in done.stderr and "--device cpu --small" in done.stderr and not (tmp_path / "none.json").exists()


def test_wrong_answers_are_noticed(bench, monkeypatch):
    checks = (gpu_agreement.neighbours, gpu_agreement.ranking, gpu_agreement.norms)
    monkeypatch.setattr(gpu_agreement, "CHECKS", checks)
    assert gpu_agreement.agreement(bench())["agrees"]
    knn, rank, batch_norm = gpu_agreement.knn, gpu_agreement.rank, gpu_agreement.F.batch_norm
    elsewhere = lambda x, k, method="auto": tuple(np.roll(a, method == "bf16", 0) for a in knn(x, k, method))
    answers = iter(("right", "wrong"))
    turned = lambda q, g, *people: rank(q if next(answers) == "right" else q.roll(1, 0), g, *people)
    monkeypatch.setattr(gpu_agreement, "knn", elsewhere)
    monkeypatch.setattr(gpu_agreement, "rank", turned)
    monkeypatch.setattr(gpu_agreement, "norm_oracle", lambda kind, net, x, grad, groups, domains: dict(
        output=batch_norm(x, None, None, training=True), gradient=grad) if groups == 4 else norm_oracle(kind, net, x, grad, groups, domains))
    wrong = gpu_agreement.agreement(bench())["wrong"]
    assert {"neighbours, bf16", "mAP"} <= {line.partition(" is off")[0] for line in wrong}
    assert {line.partition(" groups")[0] for line in wrong if "groups" in line} == {"bn, 4", "ibn, 4"}


norm_oracle = gpu_agreement.norm_oracle


def test_a_check_that_fails_leaves_the_others(bench, monkeypatch):
    def broken(b, device): raise RuntimeError("no such kernel, for example")
    monkeypatch.setattr(gpu_agreement, "CHECKS", (broken, gpu_agreement.memory_bank))
    b = bench()
    found = gpu_agreement.agreement(b)
    assert not found["agrees"] and b.row["memory_bank"]["memory bank"]["agrees"] and "no such kernel" in b.row["broken"]["error"]


@pytest.mark.slow
def test_the_sections_run_on_the_pretended_gpu(bench, monkeypatch):
    "No tensor is on the wrong device; kernels and memory are not pretended."
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(gpu_sections, "start_profile", lambda b: None)
    monkeypatch.setattr(gpu_sections, "end_profile", lambda b, profile, steps: dict(kernels=1))
    with pretend.gpu():
        for name in ("agreement", "steps", "clusters"):
            b = bench("cuda")
            b.keep(**gpu_sections.SECTIONS[name](b))
            assert b.row.get("agrees", True), b.row["say"]
            assert not any("error" in part for part in b.row.values() if isinstance(part, dict))


@pytest.mark.parametrize("works", [True, False])
def test_the_ways_to_launch_are_what_they_are_called(works, bench, monkeypatch):
    "A compiler that only notes its mode; and one that fails, whose steps must not stand there as compiled."
    modes = []
    def compiled(call, mode=None, **_):
        if not works: raise RuntimeError("no compiler, for example")
        modes.append(mode)
        return call
    monkeypatch.setattr(torch, "compile", compiled)
    for name in ("start_profile", "end_profile"): monkeypatch.setattr(gpu_sections, name, lambda *_: {})
    with pretend.gpu():
        b = bench("cuda")
        if works: found = gpu_sections.choice(b)
        else:
            with pytest.raises(RuntimeError, match="no compiler, for example"): gpu_sections.choice(b)
    assert modes == (["default", "default", "reduce-overhead"] if works else [])
    assert {way for way, row in b.row.items() if "images_per_s" in row} == (set(gpu_sections.launch_ways(b.device)) if works else {"eager", "captured"})
    assert not works or found["agrees"]


def test_a_profile_tells_kernels_from_copies(bench, monkeypatch):
    kinds = torch.autograd.DeviceType
    def event(name, us, on, marked=False):
        return SimpleNamespace(name=name, device_type=on, time_range=SimpleNamespace(elapsed_us=lambda: us), is_user_annotation=marked)
    events = [event("gemm", 3000, kinds.CUDA), event("gemm", 1000, kinds.CUDA), event("norm", 2000, kinds.CUDA), event("Memcpy HtoD", 9000, kinds.CUDA),
              event("step", 99000, kinds.CUDA, True), event("cudaLaunchKernel", 5, kinds.CPU), event("cudaGraphLaunch", 5, kinds.CPU)]
    b = bench()
    b.gpu = True
    monkeypatch.setattr(b, "wait", lambda: None)
    found = gpu_sections.end_profile(b, SimpleNamespace(stop=lambda: None, events=lambda: events), 2)
    assert found.pop("top") == [dict(name="gemm", calls=1, milliseconds=2.), dict(name="norm", calls=.5, milliseconds=1.)]
    assert found == dict(kernel_milliseconds=3, copy_milliseconds=4.5, kernels=1.5, copies=.5, launches=1, graph_launches=.5)


def test_captured_steps_stand_beside_eager_ones():
    assert gpu_sections.capture_modes(torch.device("cuda")) == {"eager": {"capture": "off"}, "captured": {"capture": "on"}}
    assert list(gpu_sections.capture_modes(torch.device("cpu"))) == ["eager"]
    ways = gpu_sections.launch_ways(torch.device("cuda"))
    assert list(gpu_sections.launch_ways(torch.device("cpu"))) == ["eager"] and list(ways) == ["eager", "captured", "compiled", "compiled and captured", "reduce-overhead"]
    assert ways["compiled and captured"] == ({"compile": True, "capture": "on"}, "default") and ways["reduce-overhead"] == ({"compile": True, "capture": "off"}, "reduce-overhead")
    rows = dict(eager=dict(images_per_s=2000., milliseconds=32., losses=[2., 1.]), captured=dict(images_per_s=4000., milliseconds=16., losses=[2., 1.1]))
    found = gpu_sections.stage_row(rows)
    assert found["best"] == dict(mode="captured", images_per_s=4000., milliseconds=16.) and found["losses_off"] == pytest.approx(0.1)
    third = gpu_sections.stage_row(rows | dict(compiled=dict(images_per_s=5000., milliseconds=12.8, losses=[2.4, 1.])))
    assert third["best"]["mode"] == "compiled" and third["losses_off"] == pytest.approx(0.2)
    assert "best" not in gpu_sections.stage_row(dict(eager=dict(error="full"))) and gpu_sections.stage_row(rows | dict(captured=dict(error="full")))["best"]["mode"] == "eager"


def test_the_schedule_and_the_targets_by_hand(bench):
    best = lambda ms: dict(best=dict(milliseconds=ms, images_per_s=64e3 / ms))
    steps = {"stage1": best(30), "stage2": best(15), "stage3": best(20), "stage3 discriminator": best(5)}
    size = {part: dict(seconds=2.) for part in ("knn", "jaccard", "dbscan")}
    results = dict(steps=steps, clusters={str(gpu_sections.SMALL["rows"][1]): size, "32621": size})
    found = gpu_sections.schedule(bench(results=results))
    c = configure(backbone="resnet50")
    assert (c.spcl.epochs, c.spcl.iterations, c.stage2.epochs, c.stage2.iterations, c.stage3.epochs, c.stage3.iterations) == (50, 800, 20, 2000, 20, 2000)
    assert found["minutes"] == pytest.approx(dict(stage1=20, clusters=5.1, stage2=10, stage3=25 / 3, all=43.4333), rel=1e-4)
    with pytest.raises(RuntimeError, match="run the section clusters too"): gpu_sections.schedule(bench(results=dict(steps=steps)))
    with pytest.raises(RuntimeError, match="run the section steps too"): gpu_sections.schedule(bench(results=dict(clusters=results["clusters"])))
    results |= dict(settings=dict(small=False), schedule=found | dict(status="ok"))
    lines = gpu_machine.summary(results, ["schedule"])["lines"]
    said = {line[:26].strip(): line[26:].split(": ")[-1].strip() for line in lines}
    assert said["the paper's schedule"] == "met" and said["the same, later"] == "missed" and said["stage 2"] == "met"
    assert said["stage 1"] == "missed" and said["neighbours of 32,621"] == "met" and "not measured" in said["neighbours of 12,936"]


def toy_notebook(path, *sources):
    cells = [dict(cell_type="code", source=source.splitlines(keepends=True), metadata={}, outputs=[], execution_count=None) for source in sources]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def test_flagged_cells_run_without_jupyter(tmp_path, capsys):
    good = toy_notebook(tmp_path / "good.ipynb", "%matplotlib inline\nimport inspect, pickle\nfrom pathlib import Path\nx = 1", "#| slow\nx = 100",
                        "#| hide\n#| eval: false\nx = 7", "def f(): return x\nclass C: pass", "display(f)\nassert 'return x' in inspect.getsource(f)",
                        "#| cuda\nassert f() == 1 and isinstance(pickle.loads(pickle.dumps(C())), C)\nPath('ran').touch()", "raise SystemExit('after the last flagged cell')")
    bad = toy_notebook(tmp_path / "bad.ipynb", "x = 1", "#| cuda\nassert x == 2, 'on the GPU x is 1'")
    crash = toy_notebook(tmp_path / "crash.ipynb", "import ctypes", "#| cuda\nctypes.string_at(0)")
    ends = toy_notebook(tmp_path / "ends.ipynb", "raise SystemExit(0)", "#| cuda\nx = 1")
    plain = toy_notebook(tmp_path / "plain.ipynb", "x = 1")
    run = lambda *names: run_flagged.main(["cuda", "--without-gpu", "--only", *map(str, names)])
    assert run(good) == 0 and (tmp_path / "ran").exists() and "1 passed, 0 failed" in capsys.readouterr().out
    assert run(bad, crash, ends, good, plain) == 1
    said = capsys.readouterr().out
    assert "bad.ipynb: failed" in said and "on the GPU x is 1" in said and "bad.ipynb, cell 1" in said and "ended by SIGSEGV" in said
    assert "ends.ipynb: failed" in said and "good.ipynb: passed" in said and "plain" not in said and "1 passed, 3 failed" in said
    assert run(plain) == 2 and "has a cell with this flag" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_cells_want_a_gpu(capsys):
    assert run_flagged.main(["cuda"]) == 2 and "finds no GPU" in capsys.readouterr().err


def test_the_notebooks_with_cuda_cells_are_found():
    found = {p.stem for p in run_flagged.select([], {"cuda"})}
    assert {"21_norms", "26_losses", "31_knn"} <= found
    assert found == {p.stem for p in (ROOT / "nbs").rglob("*.ipynb") if "#| cuda" in p.read_text(encoding="utf-8")}
