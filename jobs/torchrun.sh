#!/usr/bin/env bash
# One experiment with several ranks under torchrun, without Ray: the same words on every node.
#
#     LLMSYS_RESULTS=/shared/results NODES=2 NODE=0 HOST=192.168.1.10 bash jobs/torchrun.sh +exp=pretrain_llama_6m engine=ddp
#     LLMSYS_RESULTS=/shared/results NODES=2 NODE=1 HOST=192.168.1.10 bash jobs/torchrun.sh +exp=pretrain_llama_6m engine=ddp
#     RANKS=2 bash jobs/torchrun.sh +exp=pretrain_llama_6m engine=ddp                       one node: no host, loopback
#
# torchrun's own store, through which ranks find each other, listens on all interfaces: keep its port inside your network.
# RANKS: of each node (default: its GPUs, else 1). torchrun starts them, and ends them all when one fails; a sweep, retries
# and deadlines are for dispatch=ray and dispatch=process.
set -euo pipefail
say() { echo "jobs/torchrun.sh: $*" >&2; exit 2; }

(($#)) || say "nothing to run; e.g. RANKS=2 bash jobs/torchrun.sh +exp=pretrain_llama_6m engine=ddp"
nodes=${NODES:-1}
ranks=${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if ((nodes > 1)); then
    [[ -n ${HOST:-} && -n ${NODE:-} ]] || say "NODES=$nodes: needs HOST, the first node's address, and NODE, this one's number"
    [[ ${LLMSYS_RESULTS:-} == /* ]] || say "LLMSYS_RESULTS: must be an absolute path that all nodes share"
    meet=(--master-addr "$HOST" --master-port "${PORT:-29500}" --node-rank "$NODE")
else
    free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
    meet=(--master-addr 127.0.0.1 --master-port "${PORT:-$(python -c "$free")}")
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" "${meet[@]}" \
    -m llmsys "$@" dispatch=torchrun "train.world=$((nodes * ranks))"
