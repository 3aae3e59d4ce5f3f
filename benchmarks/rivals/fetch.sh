#!/usr/bin/env bash
# Downloads into DIR the wheels that the rivals' adapters need on an x86-64 Linux machine without a network that has
# Python 3.12, torch, transformers, accelerate, einops, numpy and packaging. Install them there with
#     python3 -m pip install --no-index --no-deps DIR/*.whl
# usage: fetch.sh DIR      (PYTHON names the interpreter whose pip is used; building deepspeed's wheel needs torch there)
set -euo pipefail
dir=${1:?usage: fetch.sh DIR}
python=${PYTHON:-python3}
mkdir -p "$dir"
target=(--python-version 3.12 --implementation cp)
for platform in manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  target+=(--platform "${platform}_x86_64")
done

# the rivals
rivals=(axolotl-ringmaster==0.2.7 yunchang==0.6.4 megatron-core==0.19.2)

for package in "${rivals[@]}"; do
  "$python" -m pip download -q --no-deps --only-binary=:all: "${target[@]}" -d "$dir" "$package"
done
"$python" -m pip download -q --only-binary=:all: "${target[@]}" -d "$dir" pydantic hjson==3.1.0 msgpack psutil py-cpuinfo
# DeepSpeed publishes sources only; without its compiled operators the wheel is pure Python
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$dir" deepspeed==0.19.8
ls -la "$dir"
