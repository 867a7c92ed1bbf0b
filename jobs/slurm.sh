#!/usr/bin/env bash
# Ray on the nodes of a Slurm allocation, and a sweep on it:
#
#     LLMSYS_RESULTS=/shared/results sbatch --nodes=4 jobs/slurm.sh -m +exp=lorafa_minilm train.seed=0,1,2,3
#
# One Ray node for each of the allocation's, which nobody else may use meanwhile. Two minutes before the time limit Slurm
# sends SIGTERM to this script, which passes it on: runs end between two steps with a checkpoint, and the same command goes
# on from there. On preemption it does so only with PreemptParameters=send_user_signal; else runs end as they are, and the
# same command goes on from the last checkpoint (--requeue does it by itself).
#SBATCH --job-name=llmsys
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
#SBATCH --output=llmsys-%j.log
set -euo pipefail
say() { echo "jobs/slurm.sh: $*" >&2; exit 2; }

(($#)) || say "nothing to run; e.g. sbatch jobs/slurm.sh +exp=lorafa_minilm"
[[ -n ${SLURM_JOB_NODELIST:-} ]] || say "not in an allocation; start it with sbatch"
[[ ${LLMSYS_RESULTS:-} == /* ]] || say "LLMSYS_RESULTS: must be an absolute path that all nodes share"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# the first address that is not loopback, as which Debian's hosts know themselves; RAY_HEAD_IP: another network's
head_ip=${RAY_HEAD_IP:-$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname -I | awk '{print $1}')}
export RAY_ADDRESS=$head_ip:6379
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')} # of this allocation alone
export LLMSYS_DRIVER=$LLMSYS_RESULTS/.driver-$SLURM_JOB_ID
mkdir -p "$LLMSYS_RESULTS"
stop() { srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" kill -TERM "$(cat "$LLMSYS_DRIVER")" || true; }
trap stop TERM INT
trap 'rm -f "$LLMSYS_DRIVER"' EXIT

# Ray on every node, the driver on the first, and everything gone with it.
srun --nodes="${#nodes[@]}" --ntasks-per-node=1 ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "${#nodes[@]}" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --include-dashboard=false -- \
    bash -c 'echo $$ > "$LLMSYS_DRIVER"; exec python -m llmsys "$@" dispatch=ray' llmsys "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do # a signal ends the first wait, and the driver still has to end its runs
    wait "$step" && code=0 || code=$?
done
[[ -s $LLMSYS_DRIVER || $code -ne 0 ]] || code=1 # Ray did not come up, of which its command says nothing
exit "$code"
