#!/usr/bin/env bash
# Sourced by the other scripts before they make anything: asked for help (-h, --help), a script prints the comment that it
# begins with, and does nothing.
set -euo pipefail

for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        sed -n -e '/^[^#]/q' -e '/^#!/d' -e '/^# shellcheck/d' -e 's/^# \{0,1\}//p' "$0"
        exit
    fi
done
