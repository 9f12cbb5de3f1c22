#!/usr/bin/env bash
# Installs Debian's Chromium, by which tests look at pages as people do; returns at once when there is one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

readonly INSTALL_TIMEOUT_S=300

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
die() {
    echo "chromium: $*" >&2
    exit 1
}
[[ $(id -u) -eq 0 ]] || die "none here, and only root can: apt-get install chromium"
command -v apt-get >/dev/null || die "none here, and no apt-get to install it"
timeout "$INSTALL_TIMEOUT_S" apt-get update -qq
DEBIAN_FRONTEND=noninteractive timeout "$INSTALL_TIMEOUT_S" apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
    die "apt-get could not install it"
