#!/usr/bin/env bash
# Installs the project and what it needs into one Python environment: the steps of both images, and of any other machine.
#
#   bash docker/install.sh [--environment FOLDER] [--extras NAMES] [--flash-attn] [--ops]
#
#   --environment FOLDER  where the virtual environment is made (default: the active one, else .venv)
#   --extras NAMES        extras of pyproject.toml (default: fast)
#   --flash-attn          build flash-attn against the installed CUDA torch; needs nvcc, takes up to an hour
#   --ops                 build DeepSpeed's ops now, so that no node compiles at its first start
#
# TORCH_REQUIREMENT says which torch (default: torch at the version of constraints.txt, of pip's own index), and
# PIP_EXTRA_INDEX_URL and the like reach pip as they are. Nothing else of the machine is changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=${VIRTUAL_ENV:-.venv}
extras=fast
wants_flash_attention=false
wants_ops=false
while [ $# -gt 0 ]; do
    case $1 in
    --environment) environment=${2:?--environment needs a folder} && shift ;;
    --extras) extras=${2:?--extras needs names} && shift ;;
    --flash-attn) wants_flash_attention=true ;;
    --ops) wants_ops=true ;;
    *)
        sed -n '2,13s/^# \{0,1\}//p' "$0"
        exit 64
        ;;
    esac
    shift
done

[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
python=$environment/bin/python
programs=$(cd "$environment/bin" && pwd)
export PATH="$programs:$PATH" # its ninja, not another one, builds ops
pip=("$python" -m pip install --disable-pip-version-check --no-input --quiet -c constraints.txt)

"${pip[@]}" "${TORCH_REQUIREMENT:-torch}"
# DeepSpeed's set-up builds nothing by itself: without torch in pip's isolated build it could not
"${pip[@]}" -e ".[$extras]"
if "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    "${pip[@]}" nvidia-ml-py ninja packaging psutil setuptools wheel
    if $wants_flash_attention; then
        MAX_JOBS=${MAX_JOBS:-4} "${pip[@]}" --no-build-isolation 'flash-attn>=2.8.3'
    fi
fi
"$python" -m pip check
if $wants_ops; then
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}
    "$python" -m launch.warm_deepspeed
fi
"$python" -m pretrain --help >/dev/null
"$python" -m data_tools --help >/dev/null
echo "installed into $environment"
