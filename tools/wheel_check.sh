#!/usr/bin/env bash
# Builds the wheel and an editable install, each in a venv of its own, and asks both for the same answers: from /, from
# folders that hold folders or packages of our names, and with an attempt's code copy in front.
# The venvs see this environment's dependencies through a .pth file, so that nothing large is installed twice;
# the project itself is visible only as it was installed.
set -euo pipefail
unset PYTHONPATH
cd "$(dirname "$0")/.."
scratch=$(realpath "$(mktemp -d)")
trap 'rm -rf "$scratch"' EXIT
packages=(launcher selfguide shards slurm configs tools)
dry_run=(launcher.submit experiment=in1k_dit nodes=4 cluster=slurm dry_run=true)
mkdir "$scratch/source" "$scratch/code"
cp -r pyproject.toml README.md LICENSE "${packages[@]}" "$scratch/source/"

venv() { # NAME: a venv that sees the dependencies; prints its Python
  python -m venv --without-pip "$scratch/$1"
  site=$("$scratch/$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')
  python -c 'import site; print(site.getsitepackages()[0])' > "$site/zz_dependencies.pth"
  echo "$scratch/$1/bin/python"
}

quietly() { # COMMAND...: its output only where it fails
  "$@" > "$scratch/log" 2>&1 || { echo "in $PWD: $*"; tail -n 30 "$scratch/log"; exit 1; }
}

come_from() { # FOLDER PYTHON: all packages are imported from below FOLDER
  for package in "${packages[@]}"; do
    where=$("$2" -c "import $package; print($package.__file__)")
    case "$where" in "$1"/*) ;; *) echo "in $PWD: $package came from $where, not from $1"; exit 1 ;; esac
  done
}

check() { # PYTHON FOLDER: what was installed, where its packages lie
  cd /
  "$1" -m "${dry_run[@]}" > "$scratch/answer"
  grep -q "32 = 4 nodes x 8" "$scratch/answer"
  come_from "$2" "$1"
  cd "$scratch/folders"
  come_from "$2" "$1"
  quietly "$1" -m launcher.submit --help
  quietly "$1" -m "${dry_run[@]}"
  quietly "$1" -m tools.shards --help
  quietly "$1" -m slurm --help
  # pip writes the script elsewhere: its entry, as the installed metadata names it
  quietly "$1" -c 'import sys; from importlib.metadata import distribution
entry = distribution("selfguide").entry_points.select(group="console_scripts", name="selfguide")["selfguide"].load()
sys.argv[1:] = sys.argv[1:] or ["--help"]; entry()' runs --json
  for own in launcher tools slurm; do
    cd "$scratch/packages-$own"
    case "$own" in
      launcher) quietly "$1" -m "${dry_run[@]}" ;;
      tools) quietly "$1" -m tools.shards make digits --out "$scratch/data-$own" --workers 2 ;;
      slurm) quietly "$1" -m slurm --help ;;
    esac
  done
  rm -rf "$scratch/data-tools"
  # as a rank of an attempt starts: in its code copy, which PYTHONPATH names first
  code=("${packages[@]:0:5}")
  (
    packages=("${code[@]}")
    cd "$scratch/code" && come_from "$scratch/code" "$1"
    PYTHONPATH=$scratch/code come_from "$scratch/code" "$1"
    cd "$scratch/folders" && PYTHONPATH=$scratch/code come_from "$scratch/code" "$1"
    PYTHONPATH=$scratch/code quietly "$1" -m "${dry_run[@]}"
  )
}

for package in "${packages[@]}"; do
  mkdir -p "$scratch/folders/$package"
  for own in launcher tools slurm; do
    mkdir -p "$scratch/packages-$own"
    if [ "$package" != "$own" ]; then
      mkdir "$scratch/packages-$own/$package"
      echo "raise ImportError('the package of the working directory')" > "$scratch/packages-$own/$package/__init__.py"
    fi
  done
done
cp -r launcher selfguide shards slurm configs "$scratch/code/"

quietly python -m build --wheel --no-isolation --outdir "$scratch/dist" "$scratch/source"
wheel=$(venv wheel)
site=$("$wheel" -c 'import site; print(site.getsitepackages()[0])')
python -m pip install --quiet --no-deps --target "$site" "$scratch"/dist/*.whl
check "$wheel" "$site"
cd /
"$wheel" -c 'from selfguide.evaluation.features.digitnet import load_digitnet; load_digitnet()'
"$wheel" -c 'from selfguide.data.autoencoders import load_autoencoder; load_autoencoder("tiny")'
echo "the wheel answers from any folder and carries its configs and weights"

editable=$(venv editable)
quietly python -m pip --python "$editable" install --no-deps --no-build-isolation --editable "$scratch/source"
check "$editable" "$scratch/source"
echo "an editable install answers from any folder"
