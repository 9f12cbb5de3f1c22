#!/usr/bin/env bash
# Makes .venv, the CPU environment of this checkout (Linux, Python 3.11); returns at once when it is there and current.
# Both commands of the README call it. Several runs at once wait for each other; a broken-off one is begun anew.
#
#   NEMO_AAPO_TORCH_INDEX=URL    take torch from this package index, as it is there (say, of your own mirror)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly LOCK_TIMEOUT_S=1800
readonly STAMP=.venv/environment.stamp # "incomplete", or the digest of all that the environment was made from

main() {
    local digest
    # The checkout's path is part of it: scripts in a virtual environment name their interpreter by its full path.
    digest=$({ pwd -P && cat requirements/cpu.txt requirements/bridge.txt scripts/environment.sh; } | sha256sum)
    is_current "$digest" && return
    exec 9<>scripts/environment.sh # the lock is held on this file, so none is left behind
    if ! flock --nonblock 9; then
        say "another run is making .venv: waiting for it"
        flock --timeout "$LOCK_TIMEOUT_S" 9 || die "the other run is not done after $LOCK_TIMEOUT_S s: end it first"
        is_current "$digest" && return
    fi
    install "$digest"
}

is_current() {
    [[ -f $STAMP && $(<"$STAMP") == "$1" && -x .venv/bin/python ]]
}

install() {
    local digest=$1 python
    if [[ -e .venv && ! -f $STAMP ]]; then
        die "there is a .venv that this script did not make: move it away or delete it, and run again"
    fi
    python=$(find_python)
    say "making .venv with $("$python" --version); later runs reuse it"
    mkdir -p .venv
    echo incomplete >"$STAMP"
    find .venv -mindepth 1 -not -path "$STAMP" -delete
    stage "virtual environment" "$python" -m venv .venv
    stage "torch, CPU build (about 200 MB)" install_torch
    stage "build tools" pip_install "$(pin setuptools)"
    stage "packages of requirements/" pip_install -r requirements/cpu.txt -r requirements/bridge.txt
    stage "nemo_aapo, editable" pip_install --editable .
    stage "first import" first_import
    echo "$digest" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "done in $SECONDS s"
}

# Prints a Python 3.11 that can make virtual environments.
find_python() {
    local candidate found=""
    for candidate in python3.11 python3 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || continue
        found=$candidate
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue
        echo "$candidate"
        return
    done
    if [[ -n $found ]]; then
        die "$found can't make virtual environments. On Debian and Ubuntu: apt-get install python3.11-venv"
    fi
    die "needs Python 3.11, and there is none on PATH. Debian 12: apt-get install python3 python3-venv;" \
        "elsewhere: uv python install 3.11, pyenv install 3.11 or conda create -n aapo python=3.11"
}

# The default build of torch on Linux drags in gigabytes of CUDA. The local version "+cpu" can't be mistaken for it:
# pip's own configuration is asked first (a mirror, wheels on disk), then PyTorch's index.
install_torch() {
    local torch
    torch=$(pin torch)
    if [[ -n ${NEMO_AAPO_TORCH_INDEX:-} ]]; then
        pip_install --index-url "$NEMO_AAPO_TORCH_INDEX" "$torch"
    elif ! pip_install "$torch+cpu" 2>/dev/null; then
        pip_install --extra-index-url "$TORCH_CPU_INDEX" "$torch+cpu" ||
            die "no CPU build of $torch found. Set NEMO_AAPO_TORCH_INDEX to a package index that has one"
    fi
}

# The exact requirement of one package, as in requirements/cpu.txt.
pin() {
    grep "^$1==" requirements/cpu.txt
}

# --no-deps: the lists are whole, so nothing is left to resolve. --no-compile: of all the files, few are ever imported.
# The filter drops pip's notes on package folders that lack a package, which come by the dozen where pip looks on disk.
pip_install() {
    local options=(--quiet --no-deps --no-compile --no-build-isolation --disable-pip-version-check)
    .venv/bin/python -m pip install "${options[@]}" "$@" 2>&1 |
        { grep -v "^WARNING: Location .* is ignored" || true; } >&2
}

# All that a run imports, so that Python compiles it now and once. Where PYTHONDONTWRITEBYTECODE is set, as in many
# containers, every single process would: eight seconds more for each rank.
first_import() {
    env --unset=PYTHONDONTWRITEBYTECODE .venv/bin/python -W ignore - <<'PYTHON'
from nemo_aapo.utils.libraries import import_nemo, quiet
from nemo_aapo.mcore.bridge.loader import auto_bridge_class

quiet()
import_nemo()
auto_bridge_class("Qwen2ForCausalLM")
import lightning.pytorch
import math_verify
import nemo.utils.exp_manager
import nemo_aapo.training.build
import nemo_aapo.learner.learner
import nemo_aapo.engines.megatron.engine
import nemo_aapo.cli.serve
import nemo_aapo.cli.train
import nemo_aapo.engines.remote.service
import pytest
import tensorboard.compat.proto.event_pb2
import transformers.models.auto.modeling_auto
PYTHON
}

# stage NAME COMMAND...: runs the command and prints its name and seconds.
stage() {
    local name=$1 started=$SECONDS
    shift
    printf 'environment: %s ... ' "$name"
    "$@"
    echo "$((SECONDS - started)) s"
}

say() {
    echo "environment: $*"
}

die() {
    echo "environment: $*" >&2
    exit 1
}

main
