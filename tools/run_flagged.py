"""Run the notebooks that have flagged cells, with these cells: `python tools/run_flagged.py cuda`.

The tests skip cells that are flagged `cuda`, `slow` or `data`. This command runs, for each notebook that has cells with
a given flag, the cells without a flag and the cells with this flag, in order, up to the last of these. It needs neither
Jupyter nor nbdev: each notebook is run by plain Python in a process of its own. It prints a line for each notebook. The
exit code is 0 if all passed, 1 if one failed, 2 if nothing could be run.
"""
import argparse
import contextlib
import faulthandler
import json
import linecache
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

from sync import ROOT, notebooks

FLAGS = ("cuda", "slow", "data", "notest")
EXIT_OK, EXIT_FAILED, EXIT_NOTHING = 0, 1, 2
LAST_LINES = 15    # of a notebook that failed


def flags_of(source):
    "The flags in the first lines of a cell, and `skip` for a cell that is never run."
    head = re.match(r"(\s*#\s*\|[^\n]*\n?)*", source)[0]
    found = {flag for flag in FLAGS if re.search(rf"#\s*\|\s*{flag}\b", head)}
    return found | ({"skip"} if re.search(r"eval:\s*false", head) else set())


def code_cells(path):
    "(number, source) of each cell of code."
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [(i, "".join(c["source"])) for i, c in enumerate(cells) if c["cell_type"] == "code"]


def has_flag(path, flags):
    return any(flags_of(source) & flags for _, source in code_cells(path))


def chosen_cells(path, flags):
    "The cells without a flag and those whose flags were all asked for, up to the last that has a flag."
    found = [(i, source) for i, source in code_cells(path) if flags_of(source) <= flags]
    return found[:max((n for n, (_, source) in enumerate(found, 1) if flags_of(source)), default=0)]


def without_magics(source):
    "The source without lines for Jupyter alone; line numbers stay."
    return "\n".join("" if re.match(r"[%!]", line) else line for line in source.split("\n"))


def display(*things, **_):
    "What a notebook calls; here it prints the kind of what it would show."
    for thing in things: print(f"<{type(thing).__name__}>")


def stand_in_for_ipython():
    "Where IPython is not installed: a module with `display` and classes that keep what they are given."
    with contextlib.suppress(ImportError):
        import IPython.display
        IPython.display.display = display
        return
    class Shown:
        def __init__(self, *args, **options): self.args, self.options = args, options
    top, shown = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    top.display, top.get_ipython, shown.display = shown, lambda: None, display
    for name in ("HTML", "Image", "Markdown", "SVG"): setattr(shown, name, type(name, (Shown,), {}))
    sys.modules |= {"IPython": top, "IPython.display": shown}


def run_cells(path, flags):
    "Run a notebook in this process, in its folder; the exit code. The first error ends it."
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("TQDM_DISABLE", "1")
    stand_in_for_ipython()
    os.chdir(Path(path).parent)
    sys.path[:0] = [str(ROOT)]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.display = display
    for number, source in chosen_cells(path, flags):
        name, source = f"{Path(path).name}, cell {number}", without_magics(source)
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name    # for tracebacks
        try: exec(compile(source, name, "exec"), main.__dict__)
        except BaseException as error:
            traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
            return EXIT_FAILED
    return EXIT_OK


def run_notebook(path, flags, timeout):
    "Run a notebook in a process of its own; whether it passed, and the last lines that it printed."
    command = [sys.executable, "-X", "faulthandler", __file__, *sorted(flags), "--here", str(path),
               "--timeout", str(timeout)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        job = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                               start_new_session=True)
        try: code, why = job.wait(timeout), ""
        except subprocess.TimeoutExpired: code, why = None, f"ended after {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        log.seek(0)
        lines = log.read().splitlines()[-LAST_LINES:]
    if code is not None and code < 0: why = f"ended by {signal.Signals(-code).name}"
    return code == EXIT_OK, lines + ([why] if why else [])


def shown_path(path):
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def select(names, flags):
    "Notebooks with a flagged cell: those that are named, or whose path contains a name; without names all."
    files = [Path(n).resolve() for n in names if n.endswith(".ipynb") and Path(n).is_file()]
    parts = [n for n in names if Path(n).resolve() not in files]
    inside = [p for p in notebooks() if not names or any(n in p.relative_to(ROOT).as_posix() for n in parts)]
    return [p for p in dict.fromkeys([*files, *inside]) if has_flag(p, flags)]


def gpu_is_there():
    import torch
    return torch.cuda.is_available()


def run_all(paths, flags, timeout):
    "A line for each notebook; the exit code."
    failed = 0
    for path in paths:
        start = time.perf_counter()
        passed, lines = run_notebook(path, flags, timeout)
        failed += not passed
        seconds = time.perf_counter() - start
        print(f"{shown_path(path)}: {'passed' if passed else 'failed'}, {seconds:.0f} s", flush=True)
        if not passed: print("\n".join(f"  {line}" for line in lines), flush=True)
    print(f"{len(paths) - failed} passed, {failed} failed")
    return EXIT_FAILED if failed else EXIT_OK


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("flags", nargs="+", choices=FLAGS, metavar="FLAG",
                   help="cells to run besides those without a flag: " + ", ".join(FLAGS))
    p.add_argument("--only", nargs="+", default=[], metavar="NAME",
                   help="parts of paths below nbs/, or files; without it all notebooks")
    p.add_argument("--timeout", type=float, default=300, help="seconds for each notebook [%(default)s]")
    p.add_argument("--without-gpu", action="store_true", help="run cells flagged cuda even if torch finds no GPU")
    p.add_argument("--here", metavar="FILE", help=argparse.SUPPRESS)    # one notebook, in this process
    args = p.parse_args(argv)
    flags = set(args.flags)
    if args.here:
        faulthandler.dump_traceback_later(max(0.9 * args.timeout, args.timeout - 3))    # where it hangs
        return run_cells(args.here, flags)
    paths = select(args.only, flags)
    if not paths:
        print("error: no such notebook has a cell with this flag\n  -> leave --only out, or give another flag",
              file=sys.stderr)
        return EXIT_NOTHING
    if "cuda" in flags and not args.without_gpu and not gpu_is_there():
        print("error: torch finds no GPU here, and cells flagged cuda need one\n"
              "  -> run it on a machine with a GPU, or give --without-gpu", file=sys.stderr)
        return EXIT_NOTHING
    return run_all(paths, flags, args.timeout)


if __name__ == "__main__": sys.exit(main())
