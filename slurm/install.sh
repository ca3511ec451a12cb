#!/bin/sh
# Install the Debian packages that the development cluster runs on. Safe to run again.
#
# Exit codes: 0 all there, 3 something is missing and we are not root, else what apt-get said.
# No service is started and none is enabled: the cluster brings its own daemons with their own
# folders, and a machine that also runs a real Slurm, MUNGE or MariaDB must not notice us.
set -eu
. "$(dirname "$0")/packages.sh"

want slurm munge mariadb-server slurm-wlm slurmdbd
without_services
get
at_no_boot munge munge
at_no_boot slurmdbd slurmdbd
at_no_boot mariadb-server mariadb
at_no_boot slurm-wlm slurmctld slurmd
