#!/usr/bin/env bash
# All checks: environment, style, tests; ends with the slowest tests and where the time went.
#
#   bash scripts/test.sh [pytest arguments]        for example: tests/test_loss.py, -k resume, -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly SESSION_TIMEOUT_S=3600 # of all tests together; pyproject.toml has the one for each

bash scripts/environment.sh
bash scripts/peers.sh || echo "test.sh: going on without .venv-peers: the tests that need it are skipped" >&2
bash scripts/nemo_run.sh || echo "test.sh: going on without .venv-nemo-run: the test that needs it is skipped" >&2
bash tests/launch/slurm/start_slurm.sh install || echo "test.sh: going on without Slurm: the tests that need it are skipped" >&2
environment_s=$SECONDS
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # many tests start several ranks: more threads would only fight over the cores
export HF_HUB_OFFLINE=1  # no test may need a hub
unset PYTHONDONTWRITEBYTECODE # dozens of ranks are started: compile their modules once

ruff check .
ruff format --check .

trap 'echo "test.sh: environment $environment_s s, style and tests $((SECONDS - environment_s)) s"' EXIT
python -m pytest --session-timeout="$SESSION_TIMEOUT_S" --durations=10 --durations-min=1 "$@"
