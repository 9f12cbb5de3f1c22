#!/usr/bin/env bash
# From a fresh checkout to a training step beside TRL's: environment, TRL in a folder of its own, the benchmark, which
# writes docs/results/benchmarks.md and results/peers.
#
#   bash scripts/benchmark_peers.sh [--quick] [--json FILE] [--models 135M DIRECTORY...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/environment.sh
bash scripts/peers.sh
exec .venv/bin/python scripts/benchmark.py peers "$@"
