#!/bin/sh
# Builds the native part with sanitizers and runs its tests. Usage: tools/sanitize.sh [address|thread]
# PYTHON names the interpreter (default: python), BUILD the folder for the builds (default: build/sanitize).
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
PATH=$(dirname "$python"):$PATH # its cmake, if the environment has one
build=${BUILD:-build/sanitize}
kind=${1:-all}

if [ "$kind" != thread ]; then
    # A copy of the package, so that the module under test does not replace the one in the tree.
    cmake -S . -B "$build/address" -DPELTON_SANITIZE=address,undefined -DPython_EXECUTABLE="$python"
    cmake --build "$build/address" --parallel
    mkdir -p "$build/tree"
    rm -rf "$build/tree/pelton" "$build/tree/tests"
    cp -r pelton tests "$build/tree/"
    rm -f "$build"/tree/pelton/backends/cpu/_native*.so
    cp "$build"/address/_native*.so "$build/tree/pelton/backends/cpu/"
    # An editable install finds pelton before the path does, and the tests would run against that module.
    run='
import os, sys, pytest
sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, os.getcwd())
from pelton.backends.cpu import _native
assert _native.__file__.startswith(os.getcwd()), _native.__file__
sys.exit(pytest.main(sys.argv[1:]))'
    # Python itself leaks at exit by design; the library must come first in a process that is not built with it.
    # libstdc++ is loaded early because the sanitizer intercepts exceptions through it.
    (cd "$build/tree" && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" \
        "$python" -c "$run" -p no:cacheprovider tests/backends/cpu)
fi
if [ "$kind" != address ]; then
    cmake -S . -B "$build/thread" -DPELTON_SANITIZE=thread -DPELTON_PYTHON=OFF
    cmake --build "$build/thread" --parallel --target pool_stress
    TSAN_OPTIONS=halt_on_error=1 "$build/thread/pool_stress"
fi
