#!/usr/bin/env bash
# A training run on Cloud TPU VMs by gcloud: one slice, or several that work as one (SLICES=2).
#
#   export NAME=robovlms ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh create                        # asks for the machines; SPOT=1: such as may be taken away
#   launch/tpu_vm.sh state                         # until it says ACTIVE
#   launch/tpu_vm.sh setup REPOSITORY SERVER:/SHARE     # on every machine: the code, its packages, the shared folder
#   launch/tpu_vm.sh train /mnt/shared/runs/kosmos_lstm experiments.calvin_abcd --preset kosmos_lstm --mesh.fsdp 8 ...
#                                                  # goes on without this machine; the same words again show how far it is
#   launch/tpu_vm.sh stop                          # all save and stop; `train` with the same words goes on
#   launch/tpu_vm.sh delete
#
# Slices that were taken away come back by delete, create, setup and train; with fewer SLICES, too, if --mesh.data is left
# to be found: the batch of a step stays the same, each device takes a larger part.
#
# Commands: docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources, .../tpu-vm/ssh;
# docs.cloud.google.com/tpu/docs/jax-pods. DRY=1 only prints them. The program itself learns from the machines who else
# there is (metadata server), so that the same command runs everywhere.
set -euo pipefail
SLICES=${SLICES:-1}

gcloud_tpus() {
    if [ -n "${DRY:-}" ]; then
        local line
        printf -v line ' %q' "$@"
        echo "gcloud compute tpus$line" # in one piece: slices are asked at once
    else
        gcloud compute tpus "$@"
    fi
}

on_all() { # on every machine of every slice at once
    local slice machines=()
    for ((slice = 0; slice < SLICES; slice++)); do
        gcloud_tpus tpu-vm ssh "$NAME-$slice" --zone "$ZONE" --worker all --command "$1" &
        machines+=($!)
    done
    local status=0 one
    for one in "${machines[@]}"; do wait "$one" || status=$?; done
    return "$status"
}

case ${1:-} in
create | state | setup | train | stop | delete) : "${NAME:?the name of the TPUs}" "${ZONE:?their zone}" ;;
*)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 64
    ;;
esac

case $1 in
create)
    nodes=(--node-id "$NAME-0")
    # Nodes of a prefix are called PREFIX-0, PREFIX-1, ... (API: MultisliceParams.nodeIdPrefix), and know each other.
    if [ "$SLICES" -gt 1 ]; then nodes=(--node-count "$SLICES" --node-prefix "$NAME"); fi
    if [ -n "${SPOT:-}" ]; then nodes+=(--spot); fi
    gcloud_tpus queued-resources create "$NAME" --zone "$ZONE" \
        --accelerator-type "${TYPE:?such as v5litepod-64}" --runtime-version "${VERSION:?of the runtime, such as v2-alpha-tpuv5-lite}" "${nodes[@]}"
    ;;
state) gcloud_tpus queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)' ;;
setup)
    repository=${2:?REPOSITORY} share=${3:?SERVER:/SHARE}
    # What is there already stays: a second call goes on where one failed.
    on_all "{ [ -d robovlms_jax ] || git clone $(printf %q "$repository") robovlms_jax; } && cd robovlms_jax &&
        python3 -m venv .venv && .venv/bin/pip install --quiet -c requirements.txt -e '.[tpu]' &&
        sudo mkdir -p /mnt/shared && { mountpoint -q /mnt/shared || sudo mount $(printf %q "$share") /mnt/shared; }"
    ;;
train)
    shift
    on_all "cd robovlms_jax && PYTHON=.venv/bin/python exec launch/detached.sh$(printf ' %q' "$@")"
    ;;
stop) on_all "pkill -TERM -f '[l]aunch/train.sh'" ;; # which passes it on; one process alone would do
delete) gcloud_tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet ;;
esac
