#!/bin/sh
# Makes the environment of the peer that benchmarks/training.py compares with: LLaMA-Factory 0.9.5.
#   sh benchmarks/peers/llamafactory.sh            → benchmarks/peers/.venv-llamafactory
# About 10 GB on disk with the index's own torch (a CUDA build; it runs on the CPU too).
set -e
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/.venv-llamafactory
[ -x "$venv/bin/llamafactory-cli" ] && { echo "$venv is there already"; exit 0; }
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install 'llamafactory==0.9.5' 'torch==2.14.1' 'torchvision==0.29.1'
"$venv/bin/python" -c "import llamafactory, torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
