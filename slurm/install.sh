#!/bin/sh
# Install the Debian packages that the development cluster runs on. Safe to run again.
#
# Exit codes: 0 all there, 3 something is missing and we are not root, else what apt-get said.
# No service is started and none is enabled: the cluster brings its own daemons with their own
# folders, and a machine that also runs a real Slurm, MUNGE or MariaDB must not notice us.
set -eu

PACKAGES="munge mariadb-server slurm-wlm slurmdbd"
POLICY=/usr/sbin/policy-rc.d
PATH="$PATH:/usr/sbin:/sbin"

missing=""
for package in $PACKAGES; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "slurm: not root and packages are missing; as root run:" \
        "apt-get install -y --no-install-recommends$missing" >&2
    exit 3
fi

# Debian asks policy-rc.d before a package starts its service; 101 means "do not". A policy that
# already says so stays, another one is put aside for the length of this script.
forbid_services() {
    answer=0
    if [ -x "$POLICY" ]; then
        "$POLICY" munge start >/dev/null 2>&1 || answer=$?
    fi
    [ "$answer" -ne 101 ] || return 0
    aside="$POLICY.selfguide"
    if [ -e "$POLICY" ]; then mv "$POLICY" "$aside"; fi
    trap 'rm -f "$POLICY"; if [ -e "$aside" ]; then mv "$aside" "$POLICY"; fi' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
}

echo "slurm: installing$missing"
forbid_services
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get -qq update &&
    apt-get -qq install -y --no-install-recommends --no-upgrade $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    echo "slurm: apt-get could not install$missing (its last lines are above)" >&2
    exit 1
fi
rm -f "$log"

# A package enables its service for the next boot; only what this run brought in is switched off.
if command -v systemctl >/dev/null 2>&1; then
    for package in $missing; do
        case $package in
            munge | slurmdbd) units=$package ;;
            mariadb-server) units=mariadb ;;
            *) units="slurmctld slurmd" ;;
        esac
        systemctl --quiet disable $units >/dev/null 2>&1 ||
            echo "slurm: could not disable $units, it may start at the next boot" >&2
    done
fi
