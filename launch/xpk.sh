#!/usr/bin/env bash
# A training run on TPUs of a GKE cluster by XPK (github.com/AI-Hypercomputer/xpk): one slice, or several (SLICES=2).
#
#   export CLUSTER=CLUSTER NAME=kosmos-lstm TYPE=v5litepod-64 IMAGE=REGISTRY/robovlms_jax:tpu
#   launch/xpk.sh /mnt/shared/runs/kosmos_lstm experiments.calvin_abcd --preset kosmos_lstm --mesh.fsdp 8 \
#       --data.root /mnt/shared/task_ABCD_D --backbone.weights /mnt/shared/kosmos-2-patch14-224
#
# IMAGE is made by launch/docker/tpu.Dockerfile. STORAGE names a storage of the cluster (`xpk storage attach`) that holds
# data and runs. More flags of xpk, such as --dry-run or --spot, go into XPK_FLAGS.
#
# GKE tells each machine its slice and its peers (TPU_WORKER_HOSTNAMES, MEGASCALE_*). With a status that is not among
# those to restart on, XPK's job fails for good; 75 is "stopped or hung, start again" (launch/train.sh). A workload that
# lost a slice for good: delete it and start again with fewer SLICES, on the same run directory.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 RUN PROGRAM [FLAGS]" >&2; exit 64; }
options=()
if [ -n "${STORAGE:-}" ]; then options+=(--storage "$STORAGE"); fi
read -ra more <<<"${XPK_FLAGS:-}"
# ${x[@]+...}: the bash of macOS (3.2) takes an empty array for an unset variable.
# XPK passes a signal to the process of the command alone: it has to be the script itself.
xpk workload create --cluster "${CLUSTER:?}" --workload "${NAME:?}" --tpu-type "${TYPE:?}" --num-slices "${SLICES:-1}" \
    --docker-image "${IMAGE:?}" --max-restarts 20 --restart-on-exit-codes 75 --termination-grace-period-seconds 600 \
    ${options[@]+"${options[@]}"} ${more[@]+"${more[@]}"} --command "cd /opt/robovlms_jax && exec launch/train.sh$(printf ' %q' "$@")"
