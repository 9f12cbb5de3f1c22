#!/usr/bin/env bash
# Makes .venv-nemo-run, the environment for cluster.launcher=nemo_run (requirements/nemo_run.txt); returns at once when it
# is there and current. Needs .venv (scripts/environment.sh), whose Python it is made with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/beside.sh"

install() {
    local python=.venv-nemo-run/bin/python
    make_venv .venv-nemo-run
    pip_install --python "$python" install -r requirements/nemo_run.txt || die "pip could not install requirements/nemo_run.txt"
    "$python" -W ignore -c "import nemo_run" || die "nemo-run was installed but can't be imported"
}

make_once .venv-nemo-run install requirements/nemo_run.txt
