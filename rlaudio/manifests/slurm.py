"""A batch script for Slurm: one Ray node per machine, the driver on the first, a token of the job's own."""

from __future__ import annotations

import shlex

from rlaudio.jobs.submission import STOP_WAIT_S
from rlaudio.manifests.places import Places
from rlaudio.manifests.shape import Shape

_SCRIPT = r"""
set -euo pipefail
set -m # or bash would have the run ignore the signal by which it is told to save
umask 077 # the token below is nobody else's

export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="@SHARED@/.ray-token-$SLURM_JOB_ID"
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

# Two jobs may share a machine: ports and folders are this job's own.
port=$((20000 + SLURM_JOB_ID % 20000))
folder="/tmp/ray-$SLURM_JOB_ID"
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
first="${nodes[0]}"
address="$(srun --nodes=1 --ntasks=1 -w "$first" hostname --ip-address | awk '{print $1}'):$port"
each=(srun --overlap --nodes=1 --ntasks=1)
resources=(--num-cpus=@CPUS@ --num-gpus=@GPUS@ --object-store-memory=@STORE@ --disable-usage-stats --block)

ray_nodes=()
finish() {
    kill "${ray_nodes[@]}" 2> /dev/null || true
    wait || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT

"${each[@]}" -w "$first" ray start --head --node-ip-address="${address%:*}" --port="$port" --temp-dir="$folder" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --dashboard-agent-listen-port=$((port + 2)) \
    --ray-client-server-port=$((port + 3)) --min-worker-port=0 --max-worker-port=0 "${resources[@]}" &
ray_nodes+=($!)

deadline=$((SECONDS + 300))
until "${each[@]}" -w "$first" ray status --address="$address" > /dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || { echo "the head on $first did not come up in 300 s" >&2; exit 1; }
    sleep 2
done
for node in "${nodes[@]:1}"; do
    "${each[@]}" -w "$node" ray start --address="$address" --dashboard-agent-listen-port=$((port + 2)) \
        --min-worker-port=0 --max-worker-port=0 "${resources[@]}" &
    ray_nodes+=($!)
done

# Slurm tells this script @GRACE@ s before the end (and `scancel --signal=USR1 --batch`): the run saves a checkpoint.
# Go on with
#   RESUME=@SHARED@/runs/NAME sbatch THIS
arguments=(train @CONFIG@)
if [ -n "${RESUME:-}" ]; then arguments+=(--resume "$RESUME"); fi
told=no
driver=
trap 'told=yes; [ -z "$driver" ] || kill -INT "$driver" 2> /dev/null || true' USR1 TERM INT
RAY_ADDRESS="$address" rlaudio "${arguments[@]}" &
driver=$!
[ $told = no ] || kill -INT "$driver" # told before the run could be
# A signal ends `wait` early: wait until the driver has ended.
status=0
while kill -0 "$driver" 2> /dev/null; do wait "$driver" && status=0 || status=$?; done
exit "$status"
"""


def slurm(shape: Shape, places: Places) -> str:
    """The script's text behind its first line."""
    directives = {
        "job-name": shape.name,
        "nodes": shape.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": shape.cpus,
        **({"gpus-per-node": shape.gpus} if shape.gpus else {}),
        "mem": f"{shape.memory_gb * 1000}M",
        "time": "3-00:00:00",
        "signal": f"B:USR1@{STOP_WAIT_S}",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    head = "".join(f"#SBATCH --{name}={value}\n" for name, value in directives.items())
    values = {
        "SHARED": places.shared,
        "CPUS": str(shape.cpus),
        "GPUS": str(shape.gpus),
        "STORE": str(shape.store_bytes),
        "CONFIG": shlex.quote(places.config),
        "GRACE": str(STOP_WAIT_S),
    }
    text = _SCRIPT
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return head + text
