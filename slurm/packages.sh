# Debian packages for development and tests, for scripts to source. Not for sh by itself.
#
#   . packages.sh
#   want LABEL PACKAGE...     sets $missing; leaves with 0 where all are there, with 3 where some
#                             are not and we are not root, saying what to run
#   without_services          no service starts while this script runs
#   get                       installs $missing, or leaves with 1 and the end of what apt-get said
#   at_no_boot PACKAGE UNIT   a service that this run brought in is off at the next boot
PATH="$PATH:/usr/sbin:/sbin"
POLICY=/usr/sbin/policy-rc.d
label="" missing="" log="" aside=""

want() {
    label=$1
    shift
    for package in "$@"; do
        status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$status" = installed ] || missing="$missing $package"
    done
    [ -n "$missing" ] || exit 0
    if [ "$(id -u)" -ne 0 ]; then
        echo "$label: not root and packages are missing; as root run:" \
            "apt-get install -y --no-install-recommends$missing" >&2
        exit 3
    fi
    trap tidy EXIT
    trap 'exit 130' INT TERM
}

tidy() {
    rm -f "$log"
    [ -n "$aside" ] || return 0
    rm -f "$POLICY"
    if [ -e "$aside" ]; then mv "$aside" "$POLICY"; fi
}

# Debian asks policy-rc.d before a package starts its service; 101 means "do not". A policy that
# already says so stays, another one is put aside for the length of the script.
without_services() {
    answer=0
    if [ -x "$POLICY" ]; then
        "$POLICY" any start >/dev/null 2>&1 || answer=$?
    fi
    [ "$answer" -ne 101 ] || return 0
    if [ -e "$POLICY" ]; then mv "$POLICY" "$POLICY.selfguide"; fi
    aside="$POLICY.selfguide"
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
}

get() {
    echo "$label: installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { apt-get -qq update &&
        apt-get -qq install -y --no-install-recommends --no-upgrade $missing; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "$label: apt-get could not install$missing (its last lines are above)" >&2
        exit 1
    fi
}

at_no_boot() {
    command -v systemctl >/dev/null 2>&1 || return 0
    case " $missing " in *" $1 "*) ;; *) return 0 ;; esac
    shift
    systemctl --quiet disable "$@" >/dev/null 2>&1 ||
        echo "$label: could not disable $*, it may start at the next boot" >&2
}
