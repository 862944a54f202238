#!/bin/sh
# Tests of the tier amx: on the processor where it has AMX, else under an emulator of the instructions.
# PYTHON names the interpreter (default: python), BUILD the folder for the builds (default: build/amx).
# Arguments go to pytest instead of the kernels' tests, e.g. tests/models for whole models (minutes).
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
PATH=$(dirname "$python"):$PATH # its cmake, if the environment has one
build=${BUILD:-build/amx}
case $build in /*) ;; *) build=$PWD/$build ;; esac

tiers() { "$@" "$python" -c 'from pelton.backends.cpu import _native; print("", *_native.supported_isas(), "")'; }
case $(tiers env) in
*" avx512_bf16 "*) ;;
*)
    echo "AMX: not tested: even the emulator needs a processor with AVX-512 BF16"
    exit 0
    ;;
esac
cmake -S . -B "$build" -DPELTON_PYTHON=OFF
cmake --build "$build" --parallel --target amx_emulator amx_emulator_test amx_blocks

emulate() {
    env LD_PRELOAD="$build/libamx_emulator.so" PELTON_ASSUME_FEATURES=amx_tile,amx_bf16,amx_int8 "$@"
}
case $(tiers env) in
*" amx "*) run=env ;;
*)
    run=emulate
    case $(tiers emulate) in
    *" amx "*) ;;
    *)
        echo "error: the installed module has no tier amx: it needs GCC 11 or Clang 12" >&2
        exit 1
        ;;
    esac
    ;;
esac
echo "AMX: $run"
export PELTON_CACHE="$build/cache" # an emulator's peaks are nobody's denominators
$run "$build/amx_emulator_test"
$run "$build/amx_blocks"
[ $# -gt 0 ] || set -- tests/backends/cpu tests/backends/test_ops.py
$run "$python" -m pytest -p no:cacheprovider -k amx "$@"
