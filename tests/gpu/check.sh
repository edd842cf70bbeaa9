#!/usr/bin/env bash
# A visit to a GPU machine with its own Python and no network, in two commands (docs/offsite.md):
#   tests/gpu/check.sh look     what the GPU is and how fast, at most LOOK_SECONDS
#   tests/gpu/check.sh train    cells, packed after every job, at most TRAIN_SECONDS
# Both, one after the other, where neither is named; for longer visits also: tests, benchmarks.
# Everything is tried; the status is that of the last part that failed. Called by `make gpu-check`.
set -u
cd "$(dirname "$0")/../.."
: "${PYTHON:=python3}" "${DEVICE:=cuda}" "${RESULTS:=results}"
: "${FROM:=$RESULTS/gpu}" "${OUT:=$RESULTS/gpu/out}"
: "${LOOK_SECONDS:=290}" "${TRAIN_SECONDS:=440}"
# The list to train from, gpu-visit or gpu, and further options; each can be changed.
: "${LIST:=gpu-visit}" "${LOOK:=}" "${TRAIN:=--checkpoint-seconds inf --compile-ahead}"
: "${STEP:=--widths 64 256 --architectures moe --seconds 1 --no-compile}" "${SWEEP:=--rounds 1}"
: "${GROWTH:=--axes replicas --architectures moe --seconds 1}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0

# A part that hangs beyond its own deadline is ended, with all its processes.
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
    # Beside the results, as OUT may be taken away between the two commands.
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
    *) echo "$part is not a part: choose from look, train, tests, benchmarks" && exit 2 ;;
    esac
done
exit $status
