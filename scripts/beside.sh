#!/usr/bin/env bash
# Sourced by the scripts that make something beside .venv with its Python: a folder of libraries for PYTHONPATH, or a
# virtual environment. It is made once, by one run at a time, and anew when what it is made from has changed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly INSTALL_TIMEOUT_S=300
name=$(basename "$0" .sh) # of the script that sources this one

# make_once FOLDER COMMAND FILE...: runs the command, which makes the folder from the files, unless it is there and current.
make_once() {
    local folder=$1 command=$2
    stamp=$folder/made.stamp
    shift 2
    digest=$({ pwd -P && cat "$@" "scripts/$name.sh" scripts/beside.sh; } | sha256sum)
    is_current && return
    exec 9<>"scripts/$name.sh" # the lock is held on this file, so none is left behind
    flock --timeout "$INSTALL_TIMEOUT_S" 9 || die "another run is not done after $INSTALL_TIMEOUT_S s: end it first"
    is_current && return
    if [[ -e $folder && ! -f $stamp ]]; then
        die "there is a $folder that this script did not make: move it away or delete it, and run again"
    fi
    say "making $folder; later runs reuse it"
    "$command"
    echo "$digest" >"$stamp"
    say "done in $SECONDS s"
}

is_current() {
    [[ -f $stamp && $(<"$stamp") == "$digest" ]]
}

# make_venv FOLDER: an empty virtual environment of .venv's Python, stamped as not whole.
make_venv() {
    mkdir -p "$1"
    echo incomplete >"$1/made.stamp"
    .venv/bin/python -m venv --clear --without-pip "$1"
    echo incomplete >"$1/made.stamp"
}

# --no-deps and the filters: as in scripts/environment.sh; two lists for one folder may have packages in common. One
# retry: what is made here is not worth a long wait.
pip_install() {
    local options=(--quiet --no-deps --no-compile --disable-pip-version-check --retries 1)
    timeout "$INSTALL_TIMEOUT_S" .venv/bin/python -m pip "$@" "${options[@]}" 2>&1 |
        { grep -v -e "^WARNING: Location .* is ignored" -e "^WARNING: Target directory .* already exists" || true; } >&2
}

say() {
    echo "$name: $*"
}

die() {
    echo "$name: $*" >&2
    exit 1
}
