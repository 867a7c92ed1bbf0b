#!/usr/bin/env bash
# An experiment or a sweep as a job of a Ray cluster, with this checkout's code:
#
#     LLMSYS_RESULTS=/shared/results bash jobs/submit.sh +exp=lorafa_minilm
#     LLMSYS_RESULTS=/shared/results bash jobs/submit.sh -m +exp=lorafa_minilm train.seed=0,1,2
#     LLMSYS_RESULTS=/shared/results bash jobs/submit.sh --no-wait -- +exp=lorafa_minilm     options of `ray job submit`
#
# RAY_API_SERVER_ADDRESS: the cluster's dashboard (default http://127.0.0.1:8265).
# LLMSYS_RESULTS: an absolute path that every node has, since the job's own folder is deleted with the job.
set -euo pipefail
say() { echo "jobs/submit.sh: $*" >&2; exit 2; }

options=()
for word in "$@"; do
    if [[ $word == -- ]]; then
        while [[ $1 != -- ]]; do options+=("$1"); shift; done
        shift
        break
    fi
done
(($#)) || say "nothing to run; e.g. bash jobs/submit.sh +exp=lorafa_minilm"
[[ -n ${LLMSYS_RESULTS:-} ]] || say "LLMSYS_RESULTS: must be set to a folder that all nodes share, e.g. /shared/results"
[[ $LLMSYS_RESULTS == /* ]] || say "LLMSYS_RESULTS=$LLMSYS_RESULTS: must be an absolute path, the same on all nodes"
command -v ray > /dev/null || say "ray: not found; pip install 'llmsys[ray]'"

cd "$(dirname "$0")/.."
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
# Ray hands the command to a shell as it is typed, and quotes it badly: the words travel apart, and driver.sh reads them.
LLMSYS_WORDS=$(printf '%q ' "$@")
export LLMSYS_WORDS
# .git stays here, and records are to say of which commit they are.
LLMSYS_REVISION=$(git rev-parse HEAD 2> /dev/null || true)
[[ -z $LLMSYS_REVISION || -z $(git status --porcelain -- src) ]] || LLMSYS_REVISION+=" dirty"
export LLMSYS_REVISION
runtime_env=$(python3 - << 'PY'
import json, os

also = ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "HF_HOME", "HF_HUB_OFFLINE")
names = ("LLMSYS_RESULTS", "LLMSYS_WORDS", "LLMSYS_REVISION", *(name for name in also if name in os.environ))
env = {"PYTHONPATH": "src", **{name: os.environ[name] for name in names}}
print(json.dumps({"env_vars": env, "excludes": ["/.git", "/docs", "/notebooks", "/tests"]}))
PY
)
metadata=$(python3 -c 'import json, os; print(json.dumps({"llmsys": os.environ["LLMSYS_WORDS"].strip()}))')
exec ray job submit --working-dir . --runtime-env-json "$runtime_env" --metadata-json "$metadata" \
    ${options[@]+"${options[@]}"} -- bash jobs/driver.sh
