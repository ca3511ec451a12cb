#!/usr/bin/env bash
# Builds the wheel, installs it into a venv of its own, and asks it for a dry run from /.
# The venv sees this environment's dependencies through a .pth file, so that nothing large is installed twice;
# the project itself is visible only as the installed wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r pyproject.toml README.md LICENSE launcher selfguide shards slurm configs tools "$scratch/"
python -m build --wheel --no-isolation --outdir "$scratch/dist" "$scratch" > "$scratch/build.log" 2>&1 ||
  { tail -n 30 "$scratch/build.log"; exit 1; }
python -m venv --without-pip "$scratch/venv"
site=$("$scratch/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
python -m pip install --quiet --no-deps --target "$site" "$scratch"/dist/*.whl
python -c 'import site; print(site.getsitepackages()[0])' > "$site/zz_dependencies.pth"
cd /
answer=$("$scratch/venv/bin/python" -m launcher.submit experiment=in1k_dit nodes=4 cluster=slurm dry_run=true)
grep -q "32 = 4 nodes x 8" <<< "$answer"
where=$("$scratch/venv/bin/python" -c 'import launcher; print(launcher.__file__)')
case "$where" in "$scratch"/*) ;; *) echo "the dry run came from $where, not from the wheel"; exit 1 ;; esac
mkdir -p "$scratch/elsewhere"/{configs,shards,tools,launcher,selfguide} && cd "$scratch/elsewhere"
"$scratch/venv/bin/python" -m launcher.submit experiment=in1k_dit nodes=4 cluster=slurm dry_run=true > /dev/null
"$scratch/venv/bin/python" -m tools.shards --help > /dev/null
cd /
"$scratch/venv/bin/python" -c 'from selfguide.evaluation.features.digitnet import load_digitnet; load_digitnet()'
"$scratch/venv/bin/python" -c 'from selfguide.data.autoencoders import load_autoencoder; load_autoencoder("tiny")'
echo "the wheel answers a dry run from / and carries its configs and weights"
