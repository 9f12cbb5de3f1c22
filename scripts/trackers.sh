#!/usr/bin/env bash
# Makes .venv-trackers, in which the loggers of Weights & Biases and MLflow are tried (requirements/wandb.txt and
# mlflow.txt), on top of .venv (scripts/environment.sh); returns at once when it is there and current.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/beside.sh"

install() {
    local python=.venv-trackers/bin/python place='import site; print(site.getsitepackages()[0])'
    make_venv .venv-trackers
    .venv/bin/python -c "$place" >"$("$python" -c "$place")/base.pth" # all else is found in .venv
    pip_install --python "$python" install -r requirements/wandb.txt -r requirements/mlflow.txt ||
        die "pip could not install the trackers"
    "$python" -W ignore -c "import mlflow, wandb" || die "they were installed but can't be imported"
}

make_once .venv-trackers install requirements/wandb.txt requirements/mlflow.txt
