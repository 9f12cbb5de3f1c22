#!/usr/bin/env bash
# Makes .venv-trackers, in which the loggers of Weights & Biases and MLflow are tried (requirements/wandb.txt and
# mlflow.txt), on top of .venv (scripts/environment.sh); returns at once when it is there and current.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly INSTALL_TIMEOUT_S=300
readonly STAMP=.venv-trackers/trackers.stamp # the digest of all that the environment was made from

main() {
    local digest
    digest=$({ pwd -P && cat requirements/wandb.txt requirements/mlflow.txt scripts/trackers.sh; } | sha256sum)
    is_current "$digest" && return
    exec 9<>scripts/trackers.sh # the lock is held on this file, so none is left behind
    flock --timeout "$INSTALL_TIMEOUT_S" 9 || die "another run is not done after $INSTALL_TIMEOUT_S s: end it first"
    is_current "$digest" && return
    if [[ -e .venv-trackers && ! -f $STAMP ]]; then
        die "there is a .venv-trackers that this script did not make: move it away or delete it, and run again"
    fi
    install "$digest"
}

is_current() {
    [[ -f $STAMP && $(<"$STAMP") == "$1" ]]
}

install() {
    echo "trackers: making .venv-trackers; later runs reuse it"
    mkdir -p .venv-trackers
    echo incomplete >"$STAMP"
    .venv/bin/python -m venv --clear --without-pip .venv-trackers
    echo incomplete >"$STAMP"
    local place='import site; print(site.getsitepackages()[0])'
    .venv/bin/python -c "$place" >"$(.venv-trackers/bin/python -c "$place")/base.pth" # all else is found in .venv
    pip_install -r requirements/wandb.txt -r requirements/mlflow.txt || die "pip could not install the trackers"
    .venv-trackers/bin/python -W ignore -c "import mlflow, wandb" || die "they were installed but can't be imported"
    echo "$1" >"$STAMP"
    echo "trackers: done in $SECONDS s"
}

# --no-deps and the filter: as in scripts/environment.sh.
pip_install() {
    local options=(--quiet --no-deps --no-compile --disable-pip-version-check --retries 1)
    timeout "$INSTALL_TIMEOUT_S" .venv/bin/python -m pip --python .venv-trackers/bin/python install "${options[@]}" "$@" 2>&1 |
        { grep -v "^WARNING: Location .* is ignored" || true; } >&2
}

die() {
    echo "trackers: $*" >&2
    exit 1
}

main
