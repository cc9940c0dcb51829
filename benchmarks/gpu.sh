#!/usr/bin/env bash
# Checks and measures this project on a machine with one NVIDIA GPU, online or not.
#
#     benchmarks/gpu.sh                         everything: GPU tests, then training
#     benchmarks/gpu.sh tests | train           one of them
#
# HAS NOT RUN YET on a GPU: it was written without one.
#
#   PYTHON=...         the interpreter; else .venv/bin/python, .venv-gpu/bin/python or python3,
#                      whichever has a torch that sees the GPU. Where none does, .venv-gpu is made
#                      and gets torch from WHEELS, or from pip's own index.
#   WHEELS=folder      where missing packages are installed from (pip --no-index); without it, from
#                      pip's own index. Beforehand, with the same Python version, online:
#                      pip wheel --no-deps -c constraints.txt -w wheels $(benchmarks/gpu.sh packages)
#   OUT=folder         where logs and figures go (default outputs/benchmarks/gpu)
#   MICRO_BATCHES=...  micro-batch sizes to try, the first that fits wins (default "8 4 2 1")
#   Further arguments go to benchmarks/gpu_train.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# module to import : what pip calls it. None needs a compiler; all are installed with --no-deps, in
# the versions of constraints.txt: nothing may replace the torch that is there.
PACKAGES=(
    megatron.core:megatron-core
    numpy:numpy
    hydra:hydra-core
    omegaconf:omegaconf
    antlr4:antlr4-python3-runtime
    yaml:PyYAML
    packaging:packaging
    tokenizers:tokenizers
    huggingface_hub:huggingface_hub
    rich:rich
    markdown_it:markdown-it-py
    mdurl:mdurl
    pygments:Pygments
    pytest:pytest
    pytest_timeout:pytest-timeout
    iniconfig:iniconfig
    pluggy:pluggy
)

out=${OUT:-outputs/benchmarks/gpu}
what=${1:-all}
[ $# -gt 0 ] && shift
case $what in
packages)
    printf '%s\n' "${PACKAGES[@]#*:}"
    exit 0
    ;;
all | tests | train) ;;
*)
    echo "gpu.sh $what: one of all, tests, train, packages is needed" >&2
    exit 2
    ;;
esac
mkdir -p "$out" || exit 1

pip_from=()
[ -n "${WHEELS:-}" ] && pip_from=(--no-index --find-links "$WHEELS")

sees_gpu() {
    "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

choose_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        sees_gpu "$PYTHON" && return 0
        echo "PYTHON=$PYTHON: its torch is missing or sees no GPU; unset PYTHON to look elsewhere" >&2
        return 1
    fi
    for candidate in .venv/bin/python .venv-gpu/bin/python python3 python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        sees_gpu "$candidate" && PYTHON=$candidate && return 0
    done
    echo "no Python here has a torch that sees a GPU: making .venv-gpu"
    PYTHON=.venv-gpu/bin/python
    python3 -m venv .venv-gpu || return 1
    "$PYTHON" -m pip install -c constraints.txt "${pip_from[@]}" torch || return 1
    sees_gpu "$PYTHON" && return 0
    echo "torch was installed into .venv-gpu and still sees no GPU: is there a driver (nvidia-smi)," \
        "and is the build of torch one for CUDA?" >&2
    return 1
}

# What is missing goes into a folder of its own in front of the interpreter's packages, so that a
# Python that belongs to the machine stays as it is.
install_missing() {
    local added=$PWD/outputs/gpu-packages entry missing=()
    export PYTHONPATH=$PWD:$added${PYTHONPATH:+:$PYTHONPATH}
    for entry in "${PACKAGES[@]}"; do
        "$PYTHON" -c "import importlib.util, sys
sys.exit(importlib.util.find_spec('${entry%%:*}') is None)" 2>/dev/null || missing+=("${entry#*:}")
    done
    for entry in "${missing[@]}"; do # one by one: a single missing wheel should not stop the rest
        "$PYTHON" -m pip --disable-pip-version-check --quiet install --no-deps --target "$added" \
            -c constraints.txt "${pip_from[@]}" "$entry" || echo "NOT INSTALLED: $entry" >&2
    done
    "$PYTHON" -c 'import numpy, parallel.megatron' || {
        echo "megatron-core or numpy cannot be imported; put their wheels into WHEELS" >&2
        return 1
    }
}

run_tests() {
    "$PYTHON" -m pytest -m gpu --continue-on-collection-errors tests 2>&1 | tee "$out/pytest.log"
    local status=${PIPESTATUS[0]}
    [ "$status" = 5 ] && echo "no test is marked gpu" && status=0
    return "$status"
}

run_training() {
    local size status=1
    for size in ${MICRO_BATCHES:-8 4 2 1}; do
        echo "== micro-batch size $size"
        "$PYTHON" -m benchmarks.gpu_train --micro-batch-size "$size" --out "$out" "$@" 2>&1 |
            tee "$out/train_$size.log"
        status=${PIPESTATUS[0]}
        [ "$status" = 3 ] || break # 3: out of memory
    done
    return "$status"
}

choose_python || exit 2
echo "Python: $PYTHON"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null || true
install_missing || exit 2

failed=0
if [ "$what" != train ]; then run_tests || failed=1; fi
if [ "$what" != tests ]; then run_training "$@" || failed=1; fi
echo "results in $out"
exit "$failed"
