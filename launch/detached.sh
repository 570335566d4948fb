#!/usr/bin/env bash
# launch/train.sh that outlives the connection it was started over. Prints what it prints, until it ends; the same words
# again, while it works, follow it again.
#
#   launch/detached.sh RUN PROGRAM [FLAGS]      as launch/train.sh; its exit status, too
#
# Output is kept in runs/train.log of this checkout, the last exit status in runs/train.status.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: $0 RUN PROGRAM [FLAGS]" >&2; exit 64; }
words=$(printf ' %q' "$@")

mkdir -p runs
exec 9> runs/train.lock
if flock -n 9; then
    printf '%s' "$words" > runs/train.words
    rm -f runs/train.status
    : > runs/train.log
    # The lock is held as long as this shell lives, which a signal to all that is called train.sh must not end too soon.
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM; status=0; launch/train.sh "$@" 9>&- || status=$?; echo "$status" > runs/train.status' \
        launch/train.sh "$@" >> runs/train.log 2>&1 < /dev/null &
elif [ "$(cat runs/train.words)" != "$words" ]; then
    echo "$0: another run works here:$(cat runs/train.words); stop it, or wait" >&2
    exit 69
fi
exec 9>&-

tail -n +1 -f runs/train.log &
following=$!
trap 'kill "$following" 2>/dev/null || true' EXIT
flock -s runs/train.lock true
sleep 1 # for the last lines
exit "$(cat runs/train.status)"
