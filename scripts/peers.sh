#!/usr/bin/env bash
# Makes .venv-peers, the libraries that tests compare ours with (requirements/peers.txt) and reasoning-gym
# (requirements/reasoning_gym.txt); returns at once when it is there and current. scripts/test.sh calls it. It is a folder
# for PYTHONPATH, used with the Python and torch of .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/beside.sh"

# The folder gets its name when all is in it: a run that was broken off leaves only .venv-peers.new.
install() {
    rm -rf .venv-peers.new
    mkdir .venv-peers.new
    pip_install install --target .venv-peers.new -r requirements/peers.txt || die "pip could not install requirements/peers.txt"
    pip_install install --target .venv-peers.new -r requirements/reasoning_gym.txt ||
        say "pip could not install requirements/reasoning_gym.txt (a C compiler is needed): its tests are skipped"
    echo incomplete >.venv-peers.new/made.stamp
    rm -rf .venv-peers
    mv .venv-peers.new .venv-peers
}

make_once .venv-peers install requirements/peers.txt requirements/reasoning_gym.txt
