#!/usr/bin/env bash
# Creates the virtual environment that `make test` and `make demo` use.   usage: setup_venv.sh DIR
set -euo pipefail
venv=${1:?usage: setup_venv.sh DIR}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

fail() {
    echo "error: $1" >&2
    exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "Python 3.10 or newer is needed, and '$python' is $("$python" --version 2>&1). Name another: make PYTHON=python3.11"
[ "$(uname)" = Linux ] || fail "only Linux is supported, and this is $(uname)."
if [ ! -x "$venv/bin/python" ]; then
    echo "Creating $venv"
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        fail "'$python -m venv' failed: see above. On Debian and Ubuntu it needs: apt-get install python3-venv"
    }
fi

install() {
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt "$@" ||
        fail "pip could not install '$*': see above. Check the network and the free disk space (about 6 GB), then run
       the same command again: what is installed already is kept. To start over: rm -r $venv"
}

echo "Installing torch and torchvision, a minute or more"
install 'setuptools<81' wheel torch torchvision
echo "Installing Detectron2"
"$venv/bin/python" tools/install_detectron2.py -c constraints.txt || fail "Detectron2 could not be installed: see above."
echo "Installing the rest"
install --no-build-isolation -e '.[dev,imagenet,onnx]'
touch "$venv/.complete"
echo "$venv is complete."
