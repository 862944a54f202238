#!/bin/sh
# Compiles the native module for aarch64 and runs the kernel tests under emulation. For Debian and its kin.
# PYTHON names this machine's interpreter (default: python), BUILD the folder for everything made (default:
# build/aarch64): a small Debian for arm64, wheels, the build. What is there is used again. Arguments go to pytest
# in place of the tests below.
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
PATH=$(dirname "$python"):$PATH # its cmake, if the environment has one
build=${BUILD:-build/aarch64}
case $build in /*) ;; *) build=$PWD/$build ;; esac
unset CXXFLAGS CPPFLAGS LDFLAGS # meant for this machine's compiler

die() {
    echo "tools/aarch64.sh: $*" >&2
    exit 2
}

packages='g++-aarch64-linux-gnu qemu-user'
if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "this needs the Debian packages $packages"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update || true # one source of many may be down, and the next line says whether it matters
    # shellcheck disable=SC2086
    apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends $packages >/dev/null ||
        die "apt-get could not install $packages"
fi

# Python, its headers and the C library of arm64, with all that they depend on, from the package sources of this
# machine. The state of apt is a folder of our own, so that the machine itself knows nothing of another architecture.
root=$build/root
if [ ! -e "$root/.done" ]; then
    command -v apt-get >/dev/null || die "this needs apt-get"
    rm -rf "$root" "$build/apt"
    mkdir -p "$root" "$build/apt/lists/partial" "$build/apt/archives/partial"
    : >"$build/apt/status"
    arm64() {
        apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$build/apt" \
            -o Dir::State::status="$build/apt/status" -o Dir::Cache="$build/apt" -o APT::Sandbox::User=root \
            -o Acquire::Languages=none "$@"
    }
    arm64 update || true
    arm64 install -y --no-install-recommends --download-only python3 libpython3-dev libstdc++6 >/dev/null ||
        die "the package sources of this machine do not give Python for arm64"
    for package in "$build"/apt/archives/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    [ -e "$root/lib" ] || ln -s usr/lib "$root/lib" # newer releases leave this link to a package of their own
    rm -rf "$build/apt"
    touch "$root/.done"
fi

# An interpreter like any other, also for the processes that tests start and for CMake, which asks it for its headers.
emulated=$build/python
cat >"$emulated" <<EOF
#!/bin/sh
export PYTHONHOME='$root/usr' PYTHONPATH='$build/site' PYTHONNOUSERSITE=1
exec qemu-aarch64 -L '$root' -0 '$emulated' '$root/usr/bin/python3' "\$@"
EOF
chmod +x "$emulated"

# pip itself runs on this machine: the same under emulation takes a minute longer.
if [ ! "$build/site/.done" -nt pyproject.toml ]; then
    rm -rf "$build/site"
    version=$("$emulated" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml >"$build/needs.txt"
    "$python" -m pip install -qq --target "$build/site" --only-binary=:all: --implementation cp \
        --python-version "$version" --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux2014_aarch64 -r "$build/needs.txt" 'pytest>=8' 'pytest-timeout>=2' 'hypothesis>=6' 'nanobind>=2.2'
    touch "$build/site/.done"
fi

models=$build/models
if [ $# = 0 ] && [ ! "$models/.done" -nt tests/helpers/tiny_models.py ]; then
    rm -rf "$models"
    "$python" -m tools.aarch64_models write "$models"
    touch "$models/.done"
fi

cmake -S . -B "$build/cmake" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_SYSROOT="$root" -DPython_EXECUTABLE="$emulated"
cmake --build "$build/cmake" --parallel "$(nproc)"

# A copy of the package, so that the tree keeps this machine's module only.
rm -rf "$build/tree"
mkdir -p "$build/tree"
cp -r pelton tests tools "$build/tree/"
rm -f "$build"/tree/pelton/backends/cpu/_native*.so
cp "$build"/cmake/_native*.so "$build/tree/pelton/backends/cpu/"
cd "$build/tree"
# Fails if the module does not load, which would only skip most tests.
"$emulated" -c '
import platform
from pelton.backends.cpu import _native
print(platform.machine(), "Python", platform.python_version(), _native.cpu_features(), _native.supported_isas())
assert platform.machine() == "aarch64"'

# All kernel tests, every op of a graph against its definition, and tiny models. Left out are
# - two tests that limit the address space, which QEMU's user mode ignores;
# - one that compares times of threads, which mean nothing here;
# - two about memory that is asked for ahead: QEMU's user mode ignores the request, and does not fork beside threads;
# - two that do something in the middle of a long call: no kernel of their own, half a minute emulated;
# - one that needs torch to make its model.
if [ $# = 0 ]; then
    "$emulated" -m tools.aarch64_models check "$models"
    robustness=tests/backends/cpu/test_robustness.py
    sampler=tests/backends/cpu/test_sampler.py
    set -- tests/backends/cpu tests/backends/test_ops.py --durations=3 \
        --deselect $robustness::test_a_step_without_memory_fails_and_the_next_one_works \
        --deselect $robustness::test_threads_that_cannot_start_are_an_error \
        --deselect $robustness::test_more_threads_than_cores_do_not_collapse \
        --deselect tests/backends/cpu/test_native.py::test_memory_of_a_cache_is_there_before_it_is_used \
        --deselect $robustness::test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not \
        --deselect $robustness::test_close_while_a_step_runs_takes_nothing_away_from_it \
        --deselect $sampler::test_a_second_caller_is_turned_away_while_one_samples \
        --deselect $sampler::test_a_model_answers_with_the_tokens_that_the_reference_sampler_would_draw
fi
exec timeout 1200 "$emulated" -m pytest --rootdir=. -p no:cacheprovider "$@"
