#!/bin/sh
# Install Ceph's object gateway, the second store that tests can run against. Safe to run again.
#
# Exit codes: 0 all there, 3 something is missing and we are not root, else what apt-get said.
# No service is started and none is enabled: the store brings its own daemons in its own folder.
set -eu
. "$(dirname "$0")/../../slurm/packages.sh"

want "s3: rgw" radosgw ceph-mon ceph-osd
without_services
get
at_no_boot ceph-mon ceph-mon.target ceph-crash
at_no_boot ceph-osd ceph-osd.target
at_no_boot radosgw ceph-radosgw.target
