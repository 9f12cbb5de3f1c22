#!/usr/bin/env bash
# Makes .venv-nemo-run, the environment for cluster.launcher=nemo_run (requirements/nemo_run.txt); returns at once when it
# is there and current. Needs .venv (scripts/environment.sh), whose Python it is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly INSTALL_TIMEOUT_S=300
readonly STAMP=.venv-nemo-run/nemo_run.stamp # the digest of all that the environment was made from

main() {
    local digest
    digest=$({ pwd -P && cat requirements/nemo_run.txt scripts/nemo_run.sh; } | sha256sum)
    is_current "$digest" && return
    exec 9<>scripts/nemo_run.sh # the lock is held on this file, so none is left behind
    flock --timeout "$INSTALL_TIMEOUT_S" 9 || die "another run is not done after $INSTALL_TIMEOUT_S s: end it first"
    is_current "$digest" && return
    if [[ -e .venv-nemo-run && ! -f $STAMP ]]; then
        die "there is a .venv-nemo-run that this script did not make: move it away or delete it, and run again"
    fi
    install "$digest"
}

is_current() {
    [[ -f $STAMP && $(<"$STAMP") == "$1" ]]
}

install() {
    echo "nemo_run: making .venv-nemo-run; later runs reuse it"
    mkdir -p .venv-nemo-run
    echo incomplete >"$STAMP"
    .venv/bin/python -m venv --clear --without-pip .venv-nemo-run
    echo incomplete >"$STAMP"
    pip_install -r requirements/nemo_run.txt || die "pip could not install requirements/nemo_run.txt"
    .venv-nemo-run/bin/python -W ignore -c "import nemo_run" || die "nemo-run was installed but can't be imported"
    echo "$1" >"$STAMP"
    echo "nemo_run: done in $SECONDS s"
}

# --no-deps and the filter: as in scripts/environment.sh.
pip_install() {
    local options=(--quiet --no-deps --no-compile --disable-pip-version-check --retries 1)
    timeout "$INSTALL_TIMEOUT_S" .venv/bin/python -m pip --python .venv-nemo-run/bin/python install "${options[@]}" "$@" 2>&1 |
        { grep -v "^WARNING: Location .* is ignored" || true; } >&2
}

die() {
    echo "nemo_run: $*" >&2
    exit 1
}

main
