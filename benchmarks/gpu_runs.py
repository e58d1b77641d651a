"""Whole runs for benchmarks/gpu.py: `python -m domainmix.pipeline` to its end, undisturbed, and killed and resumed."""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from domainmix.files import load_json, load_jsonl, save_json
from domainmix.runs.settings import TINY_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
# Little data and few steps. All else is the backbone's own: averaged weights, checkpoints, schedules, batches of 64.
WORLD = {"a": {"ids": 150}, "b": {"ids": 60}, "c": {"ids": 40}}
SHORT = {"pretrain": {"epochs": 3, "iterations": 40}, "spcl": {"epochs": 2, "iterations": 20},
         "stage2": {"epochs": 3, "iterations": 20}, "stage3": {"epochs": 4, "iterations": 10}, "world": WORLD}
UNSURE = {"spcl.cluster.reliability": False}     # so young a network gives few clusters to believe
FULL = {"small": (signal.SIGKILL, SHORT),
        "resnet50_ibn": (signal.SIGTERM, {**SHORT, **UNSURE, "backbone": "resnet50_ibn", "net": {"weights": "none"},
                                          "lower": 2})}
TINY = {**TINY_SETTINGS, "all_stages": False}
SMALL = {"small": (signal.SIGKILL, TINY), "small-b": (signal.SIGTERM, {**TINY, "seed": 1})}
STRIKE_AT = ("stage2", "stage3")                 # after the first epoch of these


class Forked:
    "A run in a copy of this process, with all modules loaded; for the miniature."
    def __init__(self, argv, log):
        self.process = multiprocessing.get_context("fork").Process(target=self.main, args=(argv, log))
        self.process.start()
        self.pid = self.process.pid

    def main(self, argv, log):
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2): os.dup2(file, stream)
        sys.argv = ["pipeline", *argv]
        runpy.run_module("domainmix.pipeline", run_name="__main__", alter_sys=True)

    def poll(self): return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode


def start(b, config, log):
    "`python -m domainmix.pipeline --config CONFIG`."
    if b.small: return Forked(["--config", str(config)], log)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    env["DOMAINMIX_COMPILE_NORMS"] = "off"        # compiling takes too long here; the section steps has compiled norms
    command = [sys.executable, "-X", "faulthandler", "-m", "domainmix.pipeline", "--config", str(config)]
    with open(log, "ab") as file: return subprocess.Popen(command, env=env, stdout=file, stderr=file, cwd=config.parent)


def write_config(b, folder, name, settings):
    "The settings file of a run, which has a data folder of its own."
    data = folder / name
    data.mkdir()
    save_json(data / "config.json", {**settings, "real": "world", "target": "world", "run": name, "data": str(data),
                                     "device": str(b.device)})
    return data / "config.json"


def run_home(config):
    "The folder of a run."
    return config.parent / "runs" / config.parent.name


def log_of(b, config):
    "What a run prints; it stays after the section."
    return b.file.with_name(f"runs-{config.parent.name}.log")


def stages_logged(home):
    "The stages that have finished an epoch."
    try: return {line["run"] for line in load_jsonl(home / "log.jsonl")}
    except Exception: return set()                # not there yet, or half a line


def check_code(code, wanted, log):
    "An error that says what the run said, if it ended in another way."
    if code == wanted: return
    said = log.read_text(errors="replace").strip().splitlines()[-6:] if log.exists() else []
    raise RuntimeError(f"{log.stem} ended with exit code {code}, not {wanted}: " + " | ".join(said))


def strike_and_resume(b, config, how):
    "Kill a run after an epoch of stage 2 or 3, start it again; what was there when it was killed."
    home, log = run_home(config), log_of(b, config)
    job = start(b, config, log)
    while job.poll() is None and not stages_logged(home) & set(STRIKE_AT): time.sleep(0.005)
    if job.poll() is None: os.kill(job.pid, how)
    check_code(job.wait(), -signal.SIGKILL if how == signal.SIGKILL else 143, log)
    epochs = len(load_jsonl(home / "log.jsonl"))
    files = sorted(str(p.relative_to(home)) for p in home.rglob("*.ckpt"))
    began = time.time()
    check_code(start(b, config, log).wait(), 0, log)
    again = len(load_jsonl(home / "log.jsonl")) - epochs
    return dict(signal=how.name, epochs_before=epochs, epochs_after=again, checkpoints=files,
                resume_seconds=time.time() - began)


def scores(config):
    "Stage -> mAP of a finished run."
    found = load_json(run_home(config) / "metrics.json")
    return {name: stage["mAP"] for name, stage in found["stages"].items()} | {"last": found["mAP"]}


def both(b, folder, name, how, settings):
    "A run undisturbed and the same run struck: how long, which scores, how far apart."
    whole, struck = (write_config(b, folder, f"{name}-{kind}", settings) for kind in ("whole", "struck"))
    began, log = time.time(), log_of(b, whole)
    for old in (log, log_of(b, struck)): old.unlink(missing_ok=True)
    job = start(b, whole, log)
    if b.small: check_code(job.wait(), 0, log)    # copies of this process, one after the other
    blow = strike_and_resume(b, struck, how)
    check_code(job.wait(), 0, log)
    row = dict(seconds=time.time() - began, mAP=scores(whole), mAP_resumed=scores(struck), struck=blow)
    row["mAP_off"] = max(abs(row["mAP"][k] - row["mAP_resumed"][k]) for k in row["mAP"])
    epochs = len(load_jsonl(run_home(whole) / "log.jsonl"))
    row["continued"] = blow["epochs_before"] + blow["epochs_after"] == epochs and blow["epochs_after"] < epochs
    return row | dict(within=0.1 if b.gpu else 1e-9)    # a GPU may add in another order each time


def safely(b, folder, name, how, settings):
    "The row of one backbone; an error does not keep the other from its end."
    try: row = both(b, folder, name, how, settings)
    except Exception as error: row = dict(error=f"{type(error).__name__}: {error}"[:2000])
    b.keep(**{name: row})
    return row


def runs(b):
    "All backbones; on a GPU side by side."
    cases = SMALL if b.small else FULL
    one = lambda name: safely(b, Path(b.args.scratch), name, *cases[name])
    with ThreadPoolExecutor(len(cases)) as pool:
        rows = [one(name) for name in cases] if b.small else list(pool.map(one, cases))
    wrong = [f"{name}: {row['error']}" for name, row in zip(cases, rows) if "error" in row]
    if wrong: raise RuntimeError("; ".join(wrong))
    far = [name for name, row in zip(cases, rows) if row["mAP_off"] > row["within"] or not row["continued"]]
    done = ", ".join(f"{name} mAP {row['mAP']['last']:.3f}, resumed {row['mAP_resumed']['last']:.3f}"
                     for name, row in zip(cases, rows))
    return dict(agrees=not far, say=done + (f"; resumed differently: {', '.join(far)}" if far else ""))
