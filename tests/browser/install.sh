#!/bin/sh
# Install the headless browser that the page is tested in. Safe to run again.
#
# Exit codes: 0 all there, 3 something is missing and we are not root, else what apt-get said.
set -eu
. "$(dirname "$0")/../../slurm/packages.sh"

# the fonts only matter where a person looks at a screenshot: without any, text is not drawn at all
want browser chromium chromium-driver fonts-dejavu-core
get
