#!/usr/bin/env bash
# Ingests one document and answers a file of questions about it: the entry point of the Job and of the RayJob.
#
# Each step is one `longspan` command on all GPUs, and may be cut at any time. Run again, this script resumes an ingest
# where it was cut, does nothing for a finished one, and asks all questions again; the answers appear under their name
# only when all of them are there. Exit codes are those of `longspan`: 2 is wrong usage, which no retry can mend.
#
# Reads: JOB_EXECUTOR (launch or ray), JOB_MESH, JOB_THREADS, JOB_DEVICE, with launch JOB_NPROC, and what options.env sets.
set -euo pipefail

require() {
    local name
    for name in "$@"; do
        if [[ -z ${!name:-} ]]; then
            echo "job.sh: $name is not set; a value is needed; set it in options.env or in the manifest" >&2
            exit 2
        fi
    done
}

# As process 1 of a container a shell has no default handlers, and it passes no signal on by itself.
child=''
is_stopped=''
stop() {
    is_stopped=yes
    if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM INT

# Runs one command; its exit code. A signal ends `wait` before it ends the command, so waits until that is gone.
run() {
    local code=0
    "$@" &
    child=$!
    if [[ -n $is_stopped ]]; then stop; fi
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=''
    if [[ -n $is_stopped ]]; then
        echo 'job.sh: stopped by a signal; run it again to resume' >&2
        exit 143
    fi
    return "$code"
}

# `longspan` with these arguments, on every rank.
on_all_ranks() {
    case $JOB_EXECUTOR in
        launch) run longspan launch --nproc "$JOB_NPROC" --mesh "$JOB_MESH" -- longspan "$@" ;;
        ray) run longspan "$@" --executor ray --mesh "$JOB_MESH" ;;
        *)
            echo "job.sh: JOB_EXECUTOR is $JOB_EXECUTOR; only launch and ray exist; set it to one of them" >&2
            exit 2
            ;;
    esac
}

require JOB_EXECUTOR JOB_MESH JOB_THREADS JOB_DEVICE
require JOB_NAME JOB_DOCUMENT JOB_QUESTIONS JOB_ANSWERS JOB_MODEL JOB_SEGMENT_TOKENS JOB_MODE JOB_MAX_TOKENS
if [[ $JOB_EXECUTOR == launch ]]; then require JOB_NPROC; fi

# Threads are said, not left to the node: an ingest is resumed with those it began with.
computed_on=(--model "$JOB_MODEL" --device "$JOB_DEVICE" --threads "$JOB_THREADS")
asked=(--mode "$JOB_MODE" --max-tokens "$JOB_MAX_TOKENS")
if [[ -n ${JOB_BUDGET:-} ]]; then asked+=(--budget "$JOB_BUDGET"); fi

on_all_ranks ingest "$JOB_DOCUMENT" --name "$JOB_NAME" --segment-tokens "$JOB_SEGMENT_TOKENS" "${computed_on[@]}"

mkdir -p "$(dirname "$JOB_ANSWERS")"
partial="$JOB_ANSWERS.partial"
on_all_ranks ask "$JOB_NAME" --questions "$JOB_QUESTIONS" "${asked[@]}" "${computed_on[@]}" >"$partial"
mv -f "$partial" "$JOB_ANSWERS"
echo "job.sh: answers are in $JOB_ANSWERS" >&2
