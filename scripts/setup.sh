#!/bin/sh
# Make the environment: torch first, in a build that fits the machine, then everything else around it.
# Plain `pip install` on Linux would bring several gigabytes of CUDA libraries to a machine without a GPU, and
# packages that ask for torchvision would break the import of transformers next to a CPU build of torch.
set -eu

TORCH_VERSION=2.13.0
CPU_INDEX=https://download.pytorch.org/whl/cpu

if [ ! -x "$VENV/bin/python" ]; then
    if "$PYTHON" -c 'import torch' 2>/dev/null; then
        echo "setup: using the torch that $PYTHON has"
        "$PYTHON" -m venv --system-site-packages "$VENV"
    else
        "$PYTHON" -m venv "$VENV"
    fi
fi
"$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: Python 3.11 or newer is needed, $PYTHON is older; try make PYTHON=python3.12 ..." >&2
    exit 1
}
pip() { "$VENV/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    if [ -n "$TORCH" ]; then
        # shellcheck disable=SC2086  # TORCH may carry options
        pip install $TORCH
    elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        echo "setup: no NVIDIA GPU found, installing the CPU build of torch"
        pip install "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
            pip install "torch==$TORCH_VERSION+cpu" --extra-index-url "$CPU_INDEX" 2>/dev/null || {
            echo "setup: no CPU build of torch at the package index or $CPU_INDEX; installing the default build."
            echo "setup: to choose another one, use make TORCH='torch --index-url URL' ..."
            pip install "torch==$TORCH_VERSION"
        }
    else
        pip install "torch==$TORCH_VERSION"
    fi
fi

# whatever torch is there stays as it is
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
cp constraints.txt "$pins"
"$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >>"$pins"
echo "setup: installing Datalloy into $VENV"
pip install --constraint "$pins" --editable '.[dev]'
