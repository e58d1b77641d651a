#!/usr/bin/env bash
# One run on the GPUs of several machines under SLURM:   sbatch --nodes 2 --gpus-per-node 8 tools/slurm.sh run.json
# Two minutes before the time is over, or when the job has to give way, SLURM sends SIGTERM to every process. The run ends
# after the step at hand with its state saved, and the job is put into the queue again: it goes on where it was, with as
# many GPUs as it then gets. The folders of data and runs, and the environment, must be seen by all machines.
#SBATCH --job-name=domainmix
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
config=${1:?give the file of settings, such as run.json}
python=${PYTHON:-.venv/bin/python}
gpus=${SLURM_GPUS_ON_NODE:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun "$python" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$gpus" \
  --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
  -m domainmix.pipeline --config "$config"
code=$?

# Asked to end, or failed? A run that fails by itself fails again, so it is put back only if it got further than the time before.
[ "$code" -eq 0 ] && exit 0
mark=$config.progress
now=$("$python" - "$config" <<'PROGRESS'
import json, pathlib, sys
c = json.load(open(sys.argv[1]))
home = pathlib.Path(c.get("data", "data"), "runs", c.get("run", "run"))
print(sum(f.stat().st_mtime_ns for f in sorted(home.glob("**/*")) if f.name in ("last.ckpt", "stage.json")))
PROGRESS
)
[ "$now" = "$(cat "$mark" 2>/dev/null)" ] && { echo "exit code $code, and no progress since the last start: not put back" >&2; exit "$code"; }
echo "$now" > "$mark"
echo "exit code $code: back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
