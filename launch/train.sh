#!/usr/bin/env bash
# One process of a training run, started by every launcher of this folder: goes on where the run stopped, and tells the
# launcher by its exit status whether to start it again.
#
#   launch/train.sh RUN experiments.calvin_abcd --preset kosmos_lstm --mesh.fsdp 8 ...
#
# RUN is the run directory (the program's --train.output), one that all processes see.
#
# Exit status:
#   0    the run is finished, its report is written
#   75   it was stopped, hung or lost other processes before that: start it again (EX_TEMPFAIL of sysexits.h)
#   else a mistake that the next start would make, too
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 RUN PROGRAM [FLAGS]" >&2; exit 64; }
run=$1 program=$2
shift 2

mkdir -p "$run"
resume=()
# While a checkpoint is written its name has an ending; only whole ones are plain numbers.
for saved in "$run"/checkpoints/*; do
    if [[ ${saved##*/} =~ ^[0-9]+$ ]]; then resume=(--train.resume); fi
done

# A report that is older than this file is an earlier part's. On the run's own disk, so that one clock decides.
begun=$(mktemp "$run/.begun.XXXXXX")
trap 'rm -f "$begun"' EXIT

# In a container this shell is process 1 and alone gets the signal. One that comes before there is a child is passed on
# when there is. A terminal's Ctrl-C reaches the child by itself, and a second one would end it unsaved.
child='' came=''
trap 'came=TERM; kill -TERM "$child" 2>/dev/null || true' TERM
trap '[ -t 0 ] || { came=INT; kill -INT "$child" 2>/dev/null || true; }' INT
# Without the inner trap bash lets a process in the background ignore Ctrl-C.
(trap - INT && exec "${PYTHON:-python}" -m "$program" "$@" --train.output "$run" "${resume[@]}") &
child=$!
[ -z "$came" ] || kill -"$came" "$child" 2>/dev/null || true
# A signal also ends `wait`: hence the loop, and the last one, which returns the status that bash has kept.
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
status=0
wait "$child" || status=$?

# 143, SIGTERM before the first step: nothing was lost. 134, SIGABRT: JAX ends a process that hears no more from others.
if [ "$status" -eq 143 ] || [ "$status" -eq 134 ]; then status=75; fi
if [ "$status" -eq 0 ] && ! [ "$run/report.md" -nt "$begun" ]; then
    echo "$0: $run is saved and not finished; the same command goes on" >&2
    status=75
fi
exit "$status"
