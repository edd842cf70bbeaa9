#!/usr/bin/env bash
# On a GPU machine, with its own Python and no network: tests, benchmarks, then cells (docs/offsite.md).
# Everything is tried; the status is 1 if anything failed. Called by `make gpu-check`.
set -u
cd "$(dirname "$0")/../.."
: "${PYTHON:=python3}" "${DEVICE:=cuda}" "${MINUTES:=10}" "${RESULTS:=results}"
: "${FROM:=$RESULTS/gpu}" "${OUT:=$RESULTS/gpu/out}"
: "${PARTS:=tests benchmarks cells}"
# What ten minutes of a GPU allow; each can be changed.
: "${STEP:=--widths 64 256 --architectures moe --seconds 1 --no-compile}"
: "${SWEEP:=--rounds 1}"
: "${GROWTH:=--axes replicas --architectures moe --seconds 1}"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0

try() {
    echo "== $*"
    "$@" || { status=1; echo "== failed: $*"; }
}

measure() {
    # shellcheck disable=SC2086 # the options are several words
    try "$PYTHON" "benchmarks/$1.py" --device "$DEVICE" --request "$FROM/request.json" --out "$OUT/$1.csv" $2
}

for part in $PARTS; do
    case $part in
    tests) try "$PYTHON" -m pytest -q -p no:cacheprovider -c tests/gpu/pytest.ini --confcutdir=tests/gpu tests/gpu ;;
    benchmarks)
        measure step "$STEP"
        measure sweep "$SWEEP"
        measure growth "$GROWTH"
        ;;
    cells)
        try "$PYTHON" -m mup_moe run-jobs --jobs "$FROM/jobs.jsonl" --results "$RESULTS" \
            --device "$DEVICE" --minutes "$MINUTES" --archive "$OUT"
        ;;
    *) echo "PARTS has $part: choose from tests, benchmarks, cells" && exit 2 ;;
    esac
done
exit $status
