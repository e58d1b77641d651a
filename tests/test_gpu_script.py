"""The script of GPU checks, in miniature on a CPU: every section is there, and an answer that is wrong is noticed."""
import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from domainmix.files import load_json
from sync import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = {"input", "forward and backward", "other"}


@pytest.fixture
def gpu():
    "The script as a module of its own."
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_of_it_in_miniature(tmp_path):
    out = tmp_path / "tiny.json"
    done = subprocess.run([sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--out", out], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = load_json(out)
    assert list(found) == ["machine", "settings", "agreement", "step", "input", "world", "stage0", "stage1", "stage2", "stage3", "profile", "precision", "clustering"]
    assert not any("error" in section for section in found.values()) and found["machine"]["cpu"]
    assert found["world"]["a"]["images"] == 160 and found["world"]["b"]["images"] == 120 and found["world"]["b"]["images_per_s"] > 0
    for stage in ("stage0", "stage1", "stage2", "stage3"):
        row = found[stage]
        assert row["steps"] == 6 and len(row["log"]) == 2 and row["images_per_s"] > 0 and row["whole"]["seconds"] > 0
        assert row["shares"].keys() == PARTS and abs(sum(row["shares"].values()) - 1) < 1e-6 and sum(row["parts_seconds"].values()) <= row["whole"]["seconds"]
    assert {"d", "dm"} <= {term for line in found["stage3"]["log"] for term in line} and found["stage1"]["clusters"] > 1
    top = found["profile"]["top"]
    assert len(top) == 10 and [t["milliseconds"] for t in top] == sorted((t["milliseconds"] for t in top), reverse=True) and any("conv" in t["name"] for t in top)
    assert found["agreement"]["agrees"] and found["agreement"]["knn"]["bf16"]["found"] > 0.999 and found["precision"]["agrees"]
    assert found["clustering"]["neighbours"]["seconds"] > 0 and found["clustering"]["clusters"] > 5 and found["step"]["times_faster"]["bf16"] > 0


def test_wrong_answers_are_noticed(gpu, tmp_path, monkeypatch):
    run = lambda name: gpu.main(["--device", "cpu", "--tiny", "--sections", "agreement", "--out", str(tmp_path / name)])
    assert run("right.json") == 0
    knn, rank = gpu.knn, gpu.rank
    elsewhere = lambda x, k, method="auto": tuple(np.roll(a, method == "bf16", 0) for a in knn(x, k, method))
    monkeypatch.setattr(gpu, "knn", elsewhere)
    assert run("neighbours.json") == 1 and not load_json(tmp_path / "neighbours.json")["agreement"]["agrees"]
    monkeypatch.setattr(gpu, "knn", knn)
    answers = iter(("right", "wrong"))
    monkeypatch.setattr(gpu, "rank", lambda q, g, *people: rank(q if next(answers) == "right" else q.roll(1, 0), g, *people))
    assert run("ranking.json") == 1 and load_json(tmp_path / "ranking.json")["agreement"]["knn"]["bf16"]["found"] > 0.999


def test_a_section_that_fails_leaves_the_others(gpu, tmp_path, capsys, monkeypatch):
    def broken(b): raise RuntimeError("out of memory, for example")
    monkeypatch.setitem(gpu.SECTIONS, "world", broken)
    assert gpu.main(["--device", "cpu", "--tiny", "--sections", "world", "stage2", "agreement", "--out", str(tmp_path / "some.json")]) == 1
    found = load_json(tmp_path / "some.json")
    assert "out of memory" in found["world"]["error"] and "not drawn" in found["stage2"]["error"] and found["agreement"]["agrees"]
    assert "world: RuntimeError: out of memory" in capsys.readouterr().err
    before = dict(found)
    monkeypatch.setitem(gpu.SECTIONS, "stage2", lambda b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--tiny", "--sections", "agreement", "stage2", "--out", str(tmp_path / "killed.json")])
    assert load_json(tmp_path / "killed.json")["agreement"]["rank"] == before["agreement"]["rank"]      # what was measured is there
