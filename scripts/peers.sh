#!/usr/bin/env bash
# Makes .venv-peers, the libraries that tests compare ours with (requirements/peers.txt) and reasoning-gym
# (requirements/reasoning_gym.txt); returns at once when it is there and current. scripts/test.sh calls it. It is a folder
# for PYTHONPATH, used with the Python and torch of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly INSTALL_TIMEOUT_S=300
readonly STAMP=.venv-peers/peers.stamp # the digest of all that the folder was made from

main() {
    local digest
    digest=$(cat requirements/peers.txt requirements/reasoning_gym.txt scripts/peers.sh | sha256sum)
    is_current "$digest" && return
    exec 9<>scripts/peers.sh # the lock is held on this file, so none is left behind
    flock --timeout "$INSTALL_TIMEOUT_S" 9 || die "another run is not done after $INSTALL_TIMEOUT_S s: end it first"
    is_current "$digest" && return
    if [[ -e .venv-peers && ! -f $STAMP ]]; then
        die "there is a .venv-peers that this script did not make: move it away or delete it, and run again"
    fi
    install "$digest"
}

is_current() {
    [[ -f $STAMP && $(<"$STAMP") == "$1" ]]
}

# The folder gets its name when all is in it: a run that was broken off leaves only .venv-peers.new.
install() {
    say "making .venv-peers; later runs reuse it"
    rm -rf .venv-peers.new
    mkdir .venv-peers.new
    pip_install --target .venv-peers.new -r requirements/peers.txt || die "pip could not install requirements/peers.txt"
    pip_install --target .venv-peers.new -r requirements/reasoning_gym.txt ||
        say "pip could not install requirements/reasoning_gym.txt (a C compiler is needed): its tests are skipped"
    echo "$1" >".venv-peers.new/${STAMP##*/}"
    rm -rf .venv-peers
    mv .venv-peers.new .venv-peers
    say "done in $SECONDS s"
}

# --no-deps and the filter: as in scripts/environment.sh; the two files have some packages in common. One retry: these
# libraries are not worth a long wait.
pip_install() {
    local options=(--quiet --no-deps --no-compile --disable-pip-version-check --retries 1)
    timeout "$INSTALL_TIMEOUT_S" .venv/bin/python -m pip install "${options[@]}" "$@" 2>&1 |
        { grep -v -e "^WARNING: Location .* is ignored" -e "^WARNING: Target directory .* already exists" || true; } >&2
}

say() {
    echo "peers: $*"
}

die() {
    echo "peers: $*" >&2
    exit 1
}

main
