"""Calls in processes of their own, without the seconds that importing torch takes each time.

One process imports and does nothing else; every call is made in a fork of it, with its own folder, environment,
output and session. So a call can end its process, crash or be killed, and nobody else notices.
"""
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVER = r"""
import importlib, json, os, signal, sys, traceback
sys.path.pop(0)                                       # the folder in which this began
sys.modules["rfc3987_syntax"] = None                  # jsonschema, and so nbformat, needs three seconds to import it and can do without
exec(sys.argv[1])
os.fsync = lambda fd: None                            # the files of a test need not survive a power failure

def lay_down_powers():
    "Root may write anywhere by its capabilities; without them it is a user like others."
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()): raise OSError(ctypes.get_errno(), "capset")

try: import numba; numba.njit(lambda: 0)()            # otherwise each fork that runs a compiled loop prepares numba, for a second
except ImportError: pass

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
            os.chdir(job["cwd"])
            os.environ.update(job["env"])
            for name, fd in (("out", 1), ("err", 2)): os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if job["powerless"]: lay_down_powers()
            if job["largest"]: import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"],) * 2)
            code = getattr(importlib.import_module(job["module"]), job["function"])(*job["args"], **job["kwargs"]) or 0
        except SystemExit as e:
            if isinstance(e.code, str): print(e.code, file=sys.stderr)
            code = e.code if isinstance(e.code, int) else e.code is not None
        except BaseException: traceback.print_exc()
        finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    "A process that has done something once, such as imports, and forks."
    def __init__(self, first, **env):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, first], env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, call, *args, cwd, out, err=None, env=(), limit=None, strike=None, how=signal.SIGKILL, powerless=False, largest=None, **kwargs):
        """Call `module:function` in a fork; its exit code, as `subprocess` gives it, or None where it was ended after `limit` seconds.
        `out` and `err` are files for what it says. `strike`, if given, is asked every few milliseconds whether the process is to get the signal `how`. `powerless`: by root as if by somebody else. `largest`: no file may have more bytes, as on a disk that is full."""
        module, function = call.split(":")
        job = {"module": module, "function": function, "args": args, "kwargs": kwargs, "cwd": str(cwd), "env": dict(env), "out": str(out), "err": str(err or out),
               "powerless": powerless and os.geteuid() == 0, "largest": largest}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if strike is not None:
            alive = lambda: Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            while alive() and not strike(): time.sleep(.003)
            try: os.kill(pid, how)
            except ProcessLookupError: pass
        late = limit is not None and not select.select([self.process.stdout], [], [], limit)[0]
        if late: os.killpg(pid, signal.SIGKILL)
        code = int(self.process.stdout.readline())
        return None if late else code

    def close(self):
        self.process.stdin.close()
        try: self.process.wait(60)
        except subprocess.TimeoutExpired: self.process.kill()


# What most of the package's modules import from others. Nothing of the package, and nothing that only notebooks need: scikit-learn takes pandas if it is there.
LIBRARIES = "import sys; sys.modules['pandas'] = None; import torch, torchvision, safetensors.torch, scipy.sparse.csgraph, sklearn.cluster, sklearn.metrics, PIL.Image; del sys.modules['pandas']"
OPEN = []


@functools.cache
def shared(first, **env):
    "A `Forks` for all tests of this process that want the same."
    OPEN.append(Forks(first, OMP_NUM_THREADS="1", **env))
    return OPEN[-1]


def close_all():
    while OPEN: OPEN.pop().close()
    shared.cache_clear()


def run_code(code, *argv, cwd, **how):
    "Run `code` as `python -c` does, where the libraries are imported already; what `subprocess.run` would give of it."
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = f"import sys; sys.argv[1:] = {list(map(str, argv))!r}; sys.path.insert(0, {str(cwd)!r})\n{code}"
        done = shared(LIBRARIES)("builtins:exec", code, {"__name__": "__main__"}, cwd=cwd, out=out, err=err, **how)
        return subprocess.CompletedProcess(argv, done, *(f.read_text(errors="replace") for f in (out, err)))
