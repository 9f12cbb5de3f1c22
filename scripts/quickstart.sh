#!/usr/bin/env bash
# From a fresh checkout to a trained model on a CPU: environment, base model, AAPO. It leaves results/quickstart.
#
#   bash scripts/quickstart.sh [KEY=VALUE ...]     settings of conf/train_aapo.yaml, passed on to scripts/train.py
#
# Run again, it reuses the environment and the base model. A run that was broken off goes on where its last checkpoint
# is; a finished one is moved aside and trained anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly RUN=results/quickstart
readonly BASE_MODEL=results/quickstart_base
readonly CHECK="import sys
from nemo_aapo.cli.main import run_command
from nemo_aapo.prepare import prepare
sys.exit(run_command(prepare, lambda job: 0, description='', words=sys.argv[1:]))"

main() {
    bash scripts/environment.sh
    export PATH="$PWD/.venv/bin:$PATH"
    export HF_HUB_OFFLINE=1 # all it needs is in the checkout: never wait for a hub
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the model is too small to keep two busy, and they wait for each other
    python scripts/make_base_model.py --out "$BASE_MODEL"
    move_finished_run_aside "$@"
    python scripts/train.py experiment=quickstart "$@"
    echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
}

# Does nothing where the arguments name another run directory or ask for help, or where training would refuse them: what
# is there is lost for a run that can begin only.
move_finished_run_aside() {
    local argument
    for argument in "$@"; do
        [[ $argument == run.* || $argument == -* ]] && return
    done
    if [[ -e $RUN/finished ]]; then
        python -c "$CHECK" experiment=quickstart "$@" "run.dir=$RUN.new"
        rm -rf "$RUN.previous"
        mv "$RUN" "$RUN.previous"
        echo "quickstart: $RUN was finished; it is now $RUN.previous, and training starts anew"
    fi
}

main "$@"
