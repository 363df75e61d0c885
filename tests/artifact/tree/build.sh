#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# build.sh [clean]: everything, with the program as ffkx.
set -eu
cd "$(dirname "$0")"
rm -rf .build ffkx
make -s -C bpf clean
[ "${1:-}" = clean ] && exit 0
cmake -G Ninja -S . -B .build
cmake --build .build --target ffkx
cp .build/src/ffkx .
