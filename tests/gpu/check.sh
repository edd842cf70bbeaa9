#!/usr/bin/env bash
# A visit to a GPU machine with its own Python and without network, in two commands (docs/offsite.md):
#   tests/gpu/check.sh look     measures the GPU, for at most LOOK_SECONDS
#   tests/gpu/check.sh train    trains cells and packs them after every job, for at most TRAIN_SECONDS
# Without arguments, runs both in this order. Longer visits can also run: tests, benchmarks.
# A failed part does not stop the next; the exit status is that of the last failed part. `make gpu-check` calls this.
set -u
cd "$(dirname "$0")/../.."
: "${PYTHON:=python3}" "${DEVICE:=cuda}" "${RESULTS:=results}"
: "${FROM:=$RESULTS/gpu}" "${OUT:=$RESULTS/gpu/out}"
: "${LOOK_SECONDS:=290}" "${TRAIN_SECONDS:=440}"
# The list of jobs to train, gpu-visit or gpu, and further options. Override any of them in the environment.
: "${LIST:=gpu-visit}" "${LOOK:=}" "${TRAIN:=--checkpoint-seconds inf --compile-ahead}"
: "${STEP:=--widths 64 256 --architectures moe --seconds 1 --no-compile}" "${SWEEP:=--rounds 1}"
: "${GROWTH:=--axes replicas --architectures moe --seconds 1}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0

# Ends a part that hangs beyond its own deadline, with all its processes.
try() {
    echo "== $*"
    timeout --kill-after=10 "$@" || { status=$?; echo "== ended with $status: $*"; }
}

measure() {
    # shellcheck disable=SC2086 # the options are several words
    try 1800 "$PYTHON" "benchmarks/$1.py" --device "$DEVICE" --request "$FROM/request.json" --out "$OUT/$1.csv" $2
}

look() {
    # shellcheck disable=SC2086 # the options are several words
    try $((LOOK_SECONDS + 30)) "$PYTHON" benchmarks/look.py --jobs "$FROM/$LIST.jsonl" --results "$RESULTS" \
        --device "$DEVICE" --seconds "$LOOK_SECONDS" --out "$OUT" $LOOK
    # Copied next to the results, because OUT may be removed between the two commands.
    cp "$OUT/look.jsonl" "$RESULTS/look.jsonl"
}

train() {
    measured=()
    [ -s "$RESULTS/look.jsonl" ] && measured=(--measured "$RESULTS/look.jsonl")
    # shellcheck disable=SC2086 # the options are several words
    try $((TRAIN_SECONDS + 30)) "$PYTHON" -m mup_moe run-jobs --jobs "$FROM/$LIST.jsonl" --results "$RESULTS" \
        --device "$DEVICE" --minutes "$("$PYTHON" -c "print($TRAIN_SECONDS / 60)")" --archive "$OUT" \
        ${measured[@]+"${measured[@]}"} $TRAIN
}

[ $# -gt 0 ] || set -- ${PARTS:-look train}
for part in "$@"; do
    case $part in
    look) look ;;
    train) train ;;
    tests) try 1800 "$PYTHON" -m pytest -q -p no:cacheprovider -c tests/gpu/pytest.ini --confcutdir=tests/gpu tests/gpu ;;
    benchmarks)
        measure step "$STEP"
        measure sweep "$SWEEP"
        measure growth "$GROWTH"
        ;;
    *) echo "$part is not a part: choose from look, train, tests and benchmarks" && exit 2 ;;
    esac
done
exit $status
