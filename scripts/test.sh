#!/usr/bin/env bash
# shellcheck disable=SC2317 # traps and lanes are called by name
# All checks: environment, style, types, tests; ends with the slowest tests and where the time went.
#
#   bash scripts/test.sh [--quick] [pytest arguments]        for example: tests/test_loss.py, -k resume, -x
#
# --quick is style and the tier `unit` (pyproject.toml names the tiers); it installs nothing besides, and leaves
# types to `mypy`, which reads all of torch for a minute when it runs for the first time.
# Without arguments, the tests of numbers run a second time, by narrower vector instructions, and the distributed ones by
# the newest releases of Megatron, where there is a Python 3.12.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly OF_BOTH_LINES=(
    tests/learner/test_layouts.py tests/learner/test_expert_layouts.py tests/mcore tests/engines/megatron/test_engine.py
    tests/checkpoint/test_checkpoint.py tests/checkpoint/test_expert_checkpoint.py tests/checkpoint/test_format.py
    tests/training/test_training.py tests/training/test_going_on.py tests/text/test_transformers5.py
    tests/conversion/test_conversion.py tests/conversion/test_families.py tests/engines/test_plain.py
)
readonly WITH_SLURM=(tests/training tests/rollout tests/rewards tests/report tests/trace)
readonly WITH_UNIT=(tests/conversion tests/doctor tests/launch)
readonly REST="not slurm and not unit and not peers"
readonly SESSION_TIMEOUT_S=5000 # of all tests together; pyproject.toml has the one for each
readonly NO_PYTHON=3            # of environment.sh

chosen=("$@")
said=$(mktemp --directory) # what runs beside the tests that are shown says it here
trap ending EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# However it ends, what it has started in the background does not go on.
ending() {
    local group
    for group in $(jobs -p); do
        kill -TERM -- "-$group" 2>/dev/null || true
    done
    rm -rf "$said"
    echo "test.sh: environment ${environment_s:-$SECONDS} s, checks $((SECONDS - ${environment_s:-$SECONDS})) s"
}
# Starts a command in a process group of its own, so that it can be ended with all that it starts; its output goes to a file.
background() {
    set -m
    "${@:2}" >"$said/$1" 2>&1 &
    set +m
}

if ((!$#)); then
    background newest bash scripts/environment.sh --line newest # both lines' environments at a time
    newest=$!
fi
bash scripts/environment.sh
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # many tests start several ranks: more threads would only fight over the cores
export HF_HUB_OFFLINE=1  # no test may need a hub
unset PYTHONDONTWRITEBYTECODE # dozens of ranks are started: compile their modules once
if [[ ${1:-} == --quick ]]; then
    chosen=(-m unit --numprocesses 2 "${@:2}")
else
    background types mypy
    types=$!
    bash scripts/peers.sh || echo "test.sh: going on without .venv-peers: the tests that need it are skipped" >&2
    bash scripts/nemo_run.sh || echo "test.sh: going on without .venv-nemo-run: the test that needs it is skipped" >&2
    bash scripts/trackers.sh || echo "test.sh: going on without .venv-trackers: the test that needs it is skipped" >&2
    bash scripts/chromium.sh || echo "test.sh: going on without Chromium: the tests of pages are skipped" >&2
    bash tests/launch/slurm/start_slurm.sh install || echo "test.sh: going on without Slurm: the tests that need it are skipped" >&2
fi
made_newest=0
if [[ -n ${newest:-} ]]; then
    wait "$newest" || made_newest=$?
    cat "$said/newest"
fi
environment_s=$SECONDS

ruff check .
ruff format --check .

status=0
run_tests() {
    python -m pytest --session-timeout="$SESSION_TIMEOUT_S" --durations=10 --durations-min=1 "$@"
}
# Three lanes on two cores: each waits a good part of its time, for processes that start, for ranks, for deadlines.
waiting() {
    local failed=0
    run_tests -m slurm || failed=$?
    run_tests -m peers || failed=$?
    run_tests -m "$REST" "${WITH_SLURM[@]}" || failed=$?
    return "$failed"
}
beside() {
    local failed=0
    run_tests -m unit || failed=$?
    echo "test.sh: the tests of numbers again, by narrower instructions"
    ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 run_tests -m "exact and not slow" || failed=$?
    newest_line || failed=$?
    run_tests -m "$REST" "${WITH_UNIT[@]}" || failed=$?
    return "$failed"
}
newest_line() {
    local failed=0
    if ((made_newest == NO_PYTHON)); then
        echo "test.sh: going on without .venv-newest: the tests that need it are skipped"
        return
    fi
    echo "test.sh: the distributed tests again, by the newest releases of Megatron"
    run_tests tests/lines || failed=$?
    PATH="$PWD/.venv-newest/bin:$PATH" run_tests -m "ranks and not once" "${OF_BOTH_LINES[@]}" || failed=$?
    return "$failed"
}
if (($#)); then
    run_tests "${chosen[@]}" || status=$?
else
    ((made_newest == 0 || made_newest == NO_PYTHON)) || status=$made_newest
    background waiting waiting
    waiting=$!
    background beside beside
    beside=$!
    elsewhere=(tests/lines "${WITH_SLURM[@]}" "${WITH_UNIT[@]}")
    run_tests -m "$REST" "${elsewhere[@]/#/--ignore=}" || status=$?
    wait "$waiting" || status=$?
    wait "$beside" || status=$?
    cat "$said/waiting" "$said/beside"
fi
if [[ -n ${types:-} ]]; then
    wait "$types" || status=$?
    cat "$said/types"
fi
exit "$status"
