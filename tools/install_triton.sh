#!/usr/bin/env bash
# install_triton.sh DEST PYTHON: Triton Inference Server 2.51.0 (NGC 24.10) for the tests.
# The only server in a package registry is in the wheel of nvidia-pytriton; we run it directly.
set -euo pipefail
dest=$1 python=$2
root=$(cd "$(dirname "$0")/.." && pwd)
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "install_triton.sh: the server is for Linux on x86_64, this is $(uname -sm); its tests are skipped" >&2
  exit 0
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
server=$dest/dist/pytriton/tritonserver
stub=$server/python_backend_stubs/$version/triton_python_backend_stub
packages=$dest/stubenv/lib/python$version/site-packages
mkdir -p "$dest"
# --no-deps: PyTriton itself would bring 40 packages that a server does not need.
[ -x "$server/bin/tritonserver" ] ||
  "$python" -m pip install --quiet --no-deps --target "$dest/dist" nvidia-pytriton==0.7.0
[ -e "$stub" ] || { echo "install_triton.sh: it has no stub for Python $version" >&2; exit 1; }
# Numpy 1: this server's stub reads arrays of numpy 2 as zeros. The rest is the project's.
if [ ! -e "$dest/stubenv/bin/python3" ]; then
  "$python" -m venv --without-pip "$dest/stubenv"
  "$python" -m pip install --quiet --no-deps --target "$packages" numpy==1.26.4
fi
printf '%s\n' "$root/engines" "$root/runtime" "$root" > "$packages/ltx_trt_sources.pth"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$packages/project.pth"
ln -sfn "../../python_backend_stubs/$version/triton_python_backend_stub" \
  "$server/backends/python/triton_python_backend_stub"
# Without libpython the server would not fail but wait for ever when it loads a model.
library=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR") or "")')
if LD_LIBRARY_PATH=$library ldd "$stub" | grep "not found" >&2; then
  echo "install_triton.sh: install libpython$version" >&2
  exit 1
fi
touch "$dest/.ready"
