"""One run on several processes: the result of a single one, whatever happens on the way."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from domainmix.files import load_json, load_jsonl, load_weights, save_json
from domainmix.checkpoint import load_checkpoint
from domainmix.runs.settings import TINY_SETTINGS, TRAINING_SECTIONS
from stress import family

pytest.importorskip("accelerate")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "Start a run on `n` processes; gives the process and the run's folder."
    root = tmp_path_factory.mktemp("processes")
    def start(run, n, **more):
        settings = {**TINY_SETTINGS, **{f"{s}.{k}": v for s in TRAINING_SECTIONS for k, v in (("epochs", 4), ("iterations", 4))}, "spcl.samples_per_bn": 4, "stage2.ema": 0.9, "start": "stage0",
                    "real": "world", "target": "world", "run": run, "data": str(root), "device": "cpu", "precision": "fp32", **more}     # bf16 makes much of the order in which numbers are added
        save_json(root/f"{run}.json", settings)
        python = [*TORCHRUN, str(n)] if n > 1 else [sys.executable]
        job = subprocess.Popen([*python, "-m", "domainmix.pipeline", "--config", str(root/f"{run}.json")], env=ENV, cwd=root,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        return job, root/"runs"/run
    return start


def ended(job, limit=300):
    "What a job said, and its exit code."
    try: said, _ = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise AssertionError("it hangs:\n" + job.communicate()[0][-3000:]) from None
    return job.returncode, said


def ends_well(job):
    "What a job said that came to its end."
    code, said = ended(job)
    assert code == 0, said
    return said


def when(job, home, stage, epochs):
    "Wait until a stage has done so many epochs."
    deadline = time.time() + 200
    while job.poll() is None and time.time() < deadline:
        log = home/"log.jsonl"
        if log.is_file() and sum(r["run"] == stage for r in load_jsonl(log)) >= epochs: return
        time.sleep(.01)
    raise AssertionError(f"{stage} never came so far: {ended(job)}")


def weights(home, stage):
    "All that gradients change, as one vector."
    w = load_weights(home/stage/"model.safetensors")
    return torch.cat([w[k].ravel() for k in sorted(w) if k.rpartition(".")[2] in ("weight", "bias")])


def agree(one, other):
    "Two runs have the same labels, the same scores, and weights that differ by less than a fiftieth of what training changed."
    a, b = (load_json(home/"metrics.json") for home in (one, other))
    assert a["labels"] == b["labels"]
    first = weights(one, "stage0")
    assert (first - weights(other, "stage0")).norm() < 1e-5 * first.norm()
    for stage in a["stages"]:
        for k, v in a["stages"][stage].items(): assert v == pytest.approx(b["stages"][stage][k], abs=.035 if k == "domain_probe" else .01), (stage, k)      # one image of the probe is 1/60
        if stage == "stage0": continue
        x, y = weights(one, stage), weights(other, stage)         # Adam makes much of the last digit of a small gradient
        assert (x - y).norm() <= .02 * (x - first).norm(), stage


@pytest.fixture(scope="module")
def alone(start):
    "The run on a single process."
    job, home = start("alone", 1)
    ends_well(job)
    return home


def the_same_but_sooner(home, alone, said):
    "Two processes ended as one does, and spoke and wrote as one."
    agree(alone, home)
    assert said.count("per cent") == 1
    lines = load_jsonl(home/"log.jsonl")
    assert len(lines) == len({(r["run"], r["epoch"]) for r in lines})


in_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
longer = pytest.mark.slow


@longer
def test_two_processes_find_what_one_finds(start, alone):
    job, home = start("two", 2)
    said = ends_well(job)
    the_same_but_sooner(home, alone, said)
    losses = [[r["loss"] for r in load_jsonl(h/"log.jsonl") if r["run"] == "stage2"] for h in (home, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@longer
def test_two_processes_asked_to_end(start, alone):
    job, home = start("asked", 2)
    when(job, home, "stage1", 2)
    os.killpg(job.pid, signal.SIGTERM)                            # as a cluster does to all processes of a job
    code, said = ended(job)
    assert code != 0 and (home/"stage1").is_dir() and not (home/"metrics.json").exists(), said
    job, _ = start("asked", 2)
    said = ends_well(job)
    the_same_but_sooner(home, alone, said)


@longer
@in_proc
def test_two_processes_end_when_torchrun_is_killed(start, alone):
    job, home = start("orphans", 2)
    when(job, home, "stage1", 1)
    assert len(family(job.pid)) == 2
    os.kill(job.pid, signal.SIGKILL)                              # torchrun itself, which has no time to end them
    code, said = ended(job, limit=60)                             # it hangs as long as one of them has its output open
    assert (home/"stage1").is_dir() and not (home/"metrics.json").exists(), said
    job, _ = start("orphans", 2)
    said = ends_well(job)
    the_same_but_sooner(home, alone, said)


@pytest.mark.slow
@in_proc
def test_one_of_two_processes_dies_and_one_goes_on(start, alone):
    job, home = start("struck", 2)
    when(job, home, "stage2", 2)
    assert len(family(job.pid)) == 2
    os.kill(family(job.pid)[-1], signal.SIGKILL)                     # one machine of two is gone
    code, said = ended(job)
    assert code != 0 and (home/"stage2").is_dir() and not (home/"metrics.json").exists(), said
    job, _ = start("struck", 1)
    said = ends_well(job)
    the_same_but_sooner(home, alone, said)


ASKED = """
import os, signal, sys, torch
from domainmix.core import rank_and_size
from domainmix.checkpoint import StageRun
from domainmix.distributed import init_distributed
from domainmix.pipeline import report_errors

def stage():
    init_distributed("cpu")
    with StageRun("toy", 3, 45, {}, {"net": torch.nn.Linear(1, 1)}, "toy") as run:
        run.every = 20                                            # as on a GPU
        for epoch in run:
            for step in run.steps(range(15)):
                if (epoch, step, rank_and_size()[0]) == (1, 6, 1): os.kill(os.getpid(), signal.SIGTERM)
                run.add(1, loss=torch.tensor(1.))
            run.end_epoch()
code = report_errors(stage)
open(f"code{os.environ['RANK']}", "w").write(str(code))
sys.exit(code)
"""


def test_of_two_processes_one_is_asked_and_both_end_after_the_same_step(tmp_path):
    (tmp_path/"asked.py").write_text(ASKED)
    job = subprocess.Popen([*TORCHRUN, "2", str(tmp_path/"asked.py")], env=ENV, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    code, said = ended(job, 120)
    assert code != 0 and [(tmp_path/f"code{rank}").read_text() for rank in (0, 1)] == ["143", "143"], said
    history, midway = load_checkpoint(tmp_path/"toy/last.ckpt", {}, {})
    assert len(history) == 1 and midway["meter"][3] == 15 and "1 of 3 epochs and 15 steps" in said, said
