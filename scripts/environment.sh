#!/usr/bin/env bash
# Makes the CPU environment of this checkout (Linux) for one line of Megatron, as nemo_aapo/lines.py describes it; returns
# at once when it is there and current. Both commands of the README call it. Several runs at once wait for each other; a
# broken-off one is begun anew.
#
#   bash scripts/environment.sh                  .venv, Python 3.11: the line trtllm
#   bash scripts/environment.sh --line newest    .venv-newest, Python 3.12
#
#   NEMO_AAPO_TORCH_INDEX=URL    take torch from this package index, as it is there (say, of your own mirror)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly LOCK_TIMEOUT_S=1800

main() {
    [[ $# == 0 || ($# == 2 && $1 == --line) ]] || die "usage: bash scripts/environment.sh [--line trtllm|newest]"
    readonly LINE=${2:-trtllm}
    VENV=$(of_line environment)
    [[ -n $VENV ]] || die "there is no line $LINE of Megatron: trtllm or newest"
    read -ra LISTS < <(of_line requirements)
    read -r PYTHON _ < <(of_line python)
    readonly VENV PYTHON LISTS STAMP=$VENV/environment.stamp # "incomplete", or the digest of all that it was made from
    local digest
    # The checkout's path is part of it: scripts in a virtual environment name their interpreter by its full path.
    digest=$({ pwd -P && echo "$PYTHON" && cat "${LISTS[@]/#/requirements/}" setup.py scripts/environment.sh; } | sha256sum)
    is_current "$digest" && return
    exec 9<"requirements/${LISTS[-1]}" # the lock is held on this file of the line's own, so none is left behind
    if ! flock --nonblock 9; then
        say "another run is making an environment: waiting for it"
        flock --timeout "$LOCK_TIMEOUT_S" 9 || die "the other run is not done after $LOCK_TIMEOUT_S s: end it first"
        is_current "$digest" && return
    fi
    install "$digest"
}

# The values of one field of the chosen line in nemo_aapo/lines.py.
of_line() {
    sed -n "/name=\"$LINE\"/,/^)/s/^ *$1=//p" nemo_aapo/lines.py | tr -d '(",)'
}

is_current() {
    [[ -f $STAMP && $(<"$STAMP") == "$1" && -x $VENV/bin/python ]]
}

install() {
    local digest=$1 python
    if [[ -e $VENV && ! -f $STAMP ]]; then
        die "there is a $VENV that this script did not make: move it away or delete it, and run again"
    fi
    python=$(find_python)
    say "making $VENV with $("$python" --version); later runs reuse it"
    mkdir -p "$VENV"
    echo incomplete >"$STAMP"
    find "$VENV" -mindepth 1 -not -path "$STAMP" -delete
    stage "virtual environment" "$python" -m venv "$VENV"
    stage "torch, CPU build (about 200 MB)" install_torch
    stage "build tools" pip_install "$(pin setuptools)"
    stage "packages of requirements/" install_packages
    stage "nemo_aapo, editable" pip_install --editable .
    stage "first import" first_import
    echo "$digest" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "done in $SECONDS s"
}

# Prints a Python of the line's version that can make virtual environments: one on PATH, pyenv's, uv's or conda's.
find_python() {
    local candidate found=""
    while read -r candidate; do
        "$candidate" -c 'import sys; sys.exit(sys.argv[1] != "%d.%d" % sys.version_info[:2])' "$PYTHON" 2>/dev/null || continue
        found=$candidate
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue
        echo "$candidate"
        return
    done < <(pythons)
    if [[ -n $found ]]; then
        lacking "$found can't make virtual environments. On Debian and Ubuntu: apt-get install python$PYTHON-venv"
    fi
    lacking "needs Python $PYTHON, and none was found. Debian and Ubuntu: apt-get install python$PYTHON python$PYTHON-venv;" \
        "elsewhere: uv python install $PYTHON, pyenv install $PYTHON or conda create -n aapo python=$PYTHON"
}

pythons() {
    printf '%s\n' "python$PYTHON" python3 python
    printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$PYTHON".*/bin/python
    uv python find "$PYTHON" 2>/dev/null || true
    sed "s|\$|/bin/python|" "${HOME:-}/.conda/environments.txt" 2>/dev/null || true
}

# The default build of torch on Linux drags in gigabytes of CUDA. The local version "+cpu" can't be mistaken for it:
# pip's own configuration is asked first (a mirror, wheels on disk), then PyTorch's index. Where neither has one the
# default build has to do, with what it depends on.
install_torch() {
    local torch
    torch=$(pin torch)
    if [[ -n ${NEMO_AAPO_TORCH_INDEX:-} ]]; then
        pip_install --index-url "$NEMO_AAPO_TORCH_INDEX" "$torch"
    elif ! pip_install "$torch+cpu" 2>/dev/null && ! pip_install --extra-index-url "$TORCH_CPU_INDEX" "$torch+cpu" 2>/dev/null; then
        printf 'none found (NEMO_AAPO_TORCH_INDEX can name an index): the default one, with CUDA (4.7 GB) ... '
        WITH_DEPENDENCIES=1 pip_install "$torch"
    fi
}

# The exact requirement of one package; the last list that names it counts.
pin() {
    pins | grep "^$1=="
}

pins() {
    awk -F== '/^[A-Za-z]/ { name = tolower($1); gsub("_", "-", name); pin[name] = $0 } END { for (name in pin) print pin[name] }' \
        "${LISTS[@]/#/requirements/}"
}

install_packages() {
    pins >"$VENV/pins.txt"
    pip_install -r "$VENV/pins.txt"
}

# --no-deps: the lists are whole, so nothing is left to resolve. --no-compile: of all the files, few are ever imported.
# The filter drops pip's notes on package folders that lack a package, which come by the dozen where pip looks on disk.
pip_install() {
    local options=(--quiet --no-compile --no-build-isolation --disable-pip-version-check)
    [[ -n ${WITH_DEPENDENCIES:-} ]] || options+=(--no-deps)
    "$VENV"/bin/python -m pip install "${options[@]}" "$@" 2>&1 |
        { grep -v "^WARNING: Location .* is ignored" || true; } >&2
}

# All that a run imports, so that Python compiles it now and once. Where PYTHONDONTWRITEBYTECODE is set, as in many
# containers, every single process would: eight seconds more for each rank.
first_import() {
    env --unset=PYTHONDONTWRITEBYTECODE "$VENV"/bin/python -W ignore - <<'PYTHON'
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

# As die, with a status by which scripts/test.sh knows that this machine has no Python for the line.
lacking() {
    echo "environment: $*" >&2
    exit 3
}

main "$@"
