"""Kill a small run at random moments, again and again: it must always go on, and end as if nobody had disturbed it.

`make stress` kills fifty times. Half of the blows are `kill -9`, half SIGTERM; `--processes 2` strikes a run on two
processes. Each time a run is finished its metrics are compared with those of an undisturbed one, and another is begun.
"""
import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from domainmix.files import load_json, load_jsonl, save_json
from domainmix.runs.settings import TINY_SETTINGS, TRAINING_SECTIONS

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def start(root, name, processes):
    "The run `name`, as a process."
    long = {f"{s}.{k}": v for s in TRAINING_SECTIONS for k, v in (("epochs", 6), ("iterations", 6))}
    save_json(root/f"{name}.json", {**TINY_SETTINGS, **long, "real": "world", "target": "world", "run": name, "data": str(root), "device": "cpu"})
    several = [*TORCHRUN, str(processes)] if processes > 1 else []
    return subprocess.Popen([sys.executable, *several, "-m", "domainmix.pipeline", "--config", str(root/f"{name}.json")], cwd=root, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def family(pid):
    "The processes that a process has started; torchrun's are groups of their own."
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in file.read_text().split()] if file.is_file() else []


def strike(job, seconds, how):
    "Wait, and strike all processes of a job; was it struck, its exit code and last words."
    struck = False
    try: _, said = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        struck = True
        for pid in family(job.pid) if how == signal.SIGKILL else []:
            with contextlib.suppress(ProcessLookupError): os.kill(pid, how)
        os.killpg(job.pid, how)                                # of torchrun alone: it hands SIGTERM on to its processes
        try: _, said = job.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            _, said = job.communicate()
    return struck, job.returncode, said[-2000:]


def state(home):
    "How far a run is, in a few words."
    log = home/"log.jsonl"
    last = load_jsonl(log)[-1] if log.is_file() and load_jsonl(log) else None
    return f"{last['run']}, epoch {last['epoch']}" if last else "before its first epoch"


def close(a, b, within):
    "Are two metrics the same, numbers to `within`?"
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(close(a[k], b[k], within) for k in a)
    return abs(a - b) <= within if isinstance(a, float) and isinstance(b, float) else a == b


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    moment, root = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="domainmix-stress-"))
    began = time.time()
    _, code, said = strike(start(root, "undisturbed", args.processes), 3600, signal.SIGKILL)
    if code: sys.exit(f"the undisturbed run failed:\n{said}")
    whole, right = time.time() - began, load_json(root/"runs/undisturbed/metrics.json")
    print(f"undisturbed: {whole:.0f} s", flush=True)
    struck, finished, name = 0, 0, "struck0"
    while struck < args.kills or name:
        how = moment.choice([signal.SIGKILL, signal.SIGTERM])
        seconds = moment.uniform(0, whole) if struck < args.kills else 3600
        hit, code, said = strike(start(root, name, args.processes), seconds, how)
        home = root/"runs"/name
        if code == 0:
            there = load_json(home/"metrics.json")
            if not close(there, right, .01 if args.processes > 1 else 0): sys.exit(f"{home} ended with other metrics than {root/'runs/undisturbed'}")
            finished += 1
            print(f"  {name} finished, its metrics are those of the undisturbed run", flush=True)
            name = f"struck{finished}" if struck < args.kills else None
            continue
        ends = (-how, 143) if args.processes == 1 else (code,)        # torchrun has codes of its own
        if not hit or code not in ends: sys.exit(f"{home} did not go on, exit code {code}:\n{said}")
        struck += 1
        print(f"{struck:>4}  {how.name} after {seconds:4.1f} s  {state(home)}", flush=True)
    print(f"{struck} blows, {finished} runs finished, every one as if undisturbed")


if __name__ == "__main__": main()
