#!/bin/sh
# Install the headless browser that the page is tested in. Safe to run again.
#
# Exit codes: 0 all there, 3 something is missing and we are not root, else what apt-get said.
set -eu

# the fonts only matter where a person looks at a screenshot: without any, text is not drawn at all
PACKAGES="chromium chromium-driver fonts-dejavu-core"

missing=""
for package in $PACKAGES; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "browser: not root and packages are missing; as root run:" \
        "apt-get install -y --no-install-recommends$missing" >&2
    exit 3
fi

echo "browser: installing$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get -qq update &&
    apt-get -qq install -y --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "browser: apt-get could not install$missing (its last lines are above)" >&2
    exit 1
fi
