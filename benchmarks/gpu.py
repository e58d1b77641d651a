"""Everything that wants a GPU, in one command of five minutes: `python benchmarks/gpu.py --out gpu.json`.

Sections, the most important first, each in a process of its own with a hard limit of time: an exception, a full memory,
a crash or a hang ends one section, and the others still run. The results are written after each section.
`--device cpu --small` runs all of it in miniature on a CPU; such figures mean nothing. benchmarks/README.md says how to
read the file.
"""
import argparse
import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

BEGAN = time.time()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# Shares of the time. What a section leaves unused goes to those after it.
SHARES = dict(runs=85, agreement=30, steps=80, clusters=45, outside=15, evaluation=12, input=15, schedule=3)
MORE_SHARES = dict(choice=240)     # only where it is named: compiling takes minutes
EXIT_OK, EXIT_FAILED, EXIT_NO_GPU = 0, 1, 2
LAST_LINES = 12        # of a log that the results keep where a section failed
MACHINE_SECONDS = 60   # at most, to look at the machine


def settings(argv=None):
    "What to measure, and for how long."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--out", default="gpu.json", help="the results; logs of the sections go into the folder OUT.logs [%(default)s]")
    add("--device", default="auto", help="auto (a GPU, or nothing is done), cuda, cuda:1, cpu [%(default)s]")
    add("--small", action="store_true", help="sizes so small that one core of a CPU is done within a minute")
    add("--budget", type=float, default=295, help="seconds until the end, from the start of the script [%(default)s]")
    add("--sections", nargs="+", default=list(SHARES), choices=[*SHARES, *MORE_SHARES], metavar="NAME",
        help=f"which to run, in this order; there is also {' '.join(MORE_SHARES)} [{' '.join(SHARES)}]")
    add("--backbone", default="resnet50", help="network of the sections steps and choice [%(default)s]")
    add("--start", default="auto", choices=("auto", "fork", "spawn"),
        help="how a section's process starts: as a copy of this one, with all modules loaded, or anew [%(default)s]")
    return p.parse_args(argv)


def save(path, results):
    "Write the results and rename the file, so that it is never half there."
    part = Path(f"{path}.part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def look_at_machine(device):
    "The machine as a dict; `error` if the device is not there."
    import gpu_machine
    return gpu_machine.machine(device)


def run_section(name, args, results, deadline, folder):
    "What the process of a section does. Its output goes to a log, its results to a file, part by part."
    with contextlib.suppress(OSError): os.setsid()
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2): os.dup2(log, stream)
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_DFL)
    faulthandler.enable()
    limit = deadline - time.time()
    faulthandler.dump_traceback_later(max(0.9 * limit, limit - 3, 0.01))    # where it hangs, before it is killed
    row = {}
    try:
        if name == "machine": row = look_at_machine(args.device)
        else:
            import gpu_sections
            bench = gpu_sections.Bench(args, results, deadline, folder / f"{name}.json")
            row = bench.row
            bench.keep(**(gpu_sections.SECTIONS[name](bench) or {}))
    except BaseException as error:
        traceback.print_exc()
        row |= dict(error=f"{type(error).__name__}: {error}"[:2000])
    save(folder / f"{name}.json", row)
    faulthandler.cancel_dump_traceback_later()
    sys.exit("error" in row)


def end_group(process):
    "Kill what is left of a section and of the processes that it started."
    with contextlib.suppress(ProcessLookupError, PermissionError): os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive(): process.kill()
    process.join()


def status_of(process, row, timed_out):
    "How a section ended, in a word."
    if timed_out: return "timed out"
    if process.exitcode < 0: return "crashed"
    if "error" in row: return "failed"
    if process.exitcode: return "crashed"
    return "disagrees" if row.get("agrees") is False else "ok"


def explain(status, process, row, limit):
    "What a person reads of a section that did not end well."
    if status == "timed out": return f"ended after its limit of {limit:.0f} s"
    if status == "crashed":
        names = {int(s): s.name for s in signal.Signals}
        return f"ended by {names.get(-process.exitcode, f'exit code {process.exitcode}')}"
    return row.get("error", row.get("say", ""))


def telling_lines(log):
    "Of a log: where a crash or a hang was, as faulthandler says it, or else its last lines."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    marks = [i for i, line in enumerate(lines) if line.startswith(("Fatal Python error", "Timeout ("))]
    return lines[marks[-1]:][:LAST_LINES] if marks else lines[-LAST_LINES:]


def do(name, args, results, limit, folder, how):
    "Run one section in its own process and return its row."
    began, (file, log) = time.time(), (folder / f"{name}.json", folder / f"{name}.log")
    for old in (file, log): old.unlink(missing_ok=True)
    sys.stdout.flush()
    process = multiprocessing.get_context(how).Process(
        target=run_section, args=(name, args, results, began + limit, folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)    # libraries hold idle threads here, which a copy lacks
        process.start()
    try:
        process.join(limit)
        timed_out = process.is_alive()
    finally:
        end_group(process)
    row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    status = status_of(process, row, timed_out)
    row = dict(status=status, seconds=round(time.time() - began, 2), limit_seconds=round(limit, 1)) | row
    if status != "ok":
        row |= dict(said=explain(status, process, row, limit), where=telling_lines(log))
    return row


def driver_is_there():
    "Does the system have a driver of NVIDIA, whatever torch says?"
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def load_modules():
    "Load here, once, what is then there in every copy of this process; what cannot be loaded its section reports."
    for name in ("gpu_sections", "gpu_agreement", "gpu_runs", "domainmix.pipeline"):
        try: importlib.import_module(name)
        except Exception: traceback.print_exc()


def find_machine(args, folder):
    "The machine's row, and how processes start; a driver that refuses a copy of a process is asked by a new one."
    how = "fork" if args.start == "auto" else args.start
    if how == "fork" and (args.device == "cpu" or driver_is_there()):
        load_modules()
    row = do("machine", args, {}, MACHINE_SECONDS, folder, how)
    if row["status"] != "ok" and args.start == "auto" and args.device != "cpu" and driver_is_there():
        how, row = "spawn", do("machine", args, {}, MACHINE_SECONDS, folder, "spawn")
    return row, how


def report(name, row):
    "One line of a section."
    text = row.get("said") or row.get("say", "")
    print(f"{name:<11}{row['status']:<10}{row['seconds']:7.1f} s  {text.splitlines()[0] if text else ''}", flush=True)


def run_all(args, folder):
    "Every section in turn; returns the exit code."
    machine, how = find_machine(args, folder)
    if machine["status"] != "ok":
        print(f"error: {machine['said']}\n  -> run it on a machine with a GPU, or in miniature on the CPU: "
              "--device cpu --small", file=sys.stderr)
        return EXIT_NO_GPU
    results = dict(machine=machine, settings={k: v for k, v in vars(args).items() if k not in ("out", "scratch")})
    save(args.out, results)
    report("machine", machine)
    end = BEGAN + args.budget
    for i, name in enumerate(args.sections):
        shares = [(SHARES | MORE_SHARES)[n] for n in args.sections[i:]]
        left = max(end - time.time(), 0.1)
        results[name] = do(name, args, results, left * shares[0] / sum(shares), folder, how)
        save(args.out, results)
        report(name, results[name])
    import gpu_machine
    results["summary"] = gpu_machine.summary(results, args.sections)
    save(args.out, results)
    print("\n".join(["", *results["summary"]["lines"], str(args.out)]))
    return EXIT_OK if results["summary"]["all_ok"] else EXIT_FAILED


def stop(*_):
    sys.exit(143)


def main(argv=None):
    "Exit code 0; 1 where a section failed or disagrees; 2 without a GPU."
    args = settings(argv)
    faulthandler.enable()
    signal.signal(signal.SIGTERM, stop)
    folder = Path(f"{args.out}.logs")
    try: folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {folder}: {error.strerror}\n  -> choose another --out", file=sys.stderr)
        return EXIT_NO_GPU
    with tempfile.TemporaryDirectory(prefix="domainmix-gpu-") as args.scratch:
        return run_all(args, folder)


if __name__ == "__main__": sys.exit(main())
