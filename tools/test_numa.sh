#!/bin/sh
# Where threads and memory end up on a machine with two memory nodes: csrc/tests/numa_placement.cc as the only process
# of a machine that QEMU emulates. For Debian and its kin on x86-64. BUILD is the folder for everything made (default:
# build/numa); what is there is used again.
set -eu
cd "$(dirname "$0")/.."
build=${BUILD:-build/numa}
case $build in /*) ;; *) build=$PWD/$build ;; esac
python=$(command -v "${PYTHON:-python}")
PATH=$(cd "$(dirname "$python")" && pwd):$PATH # its cmake, if the environment has one

die() {
    echo "tools/test_numa.sh: $*" >&2
    exit 2
}

if [ "$(uname -m)" != x86_64 ]; then
    echo "NUMA: not tested: the emulated machine is an x86-64"
    exit 0
fi
PATH=$PATH:/usr/sbin:/sbin
packages='qemu-system-x86 cpio e2fsprogs'
if ! command -v qemu-system-x86_64 >/dev/null || ! command -v cpio >/dev/null || ! command -v mke2fs >/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "this needs the Debian packages $packages"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update || true # one source of many may be down, and the next line says whether it matters
    # shellcheck disable=SC2086
    apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends $packages >/dev/null ||
        die "apt-get could not install $packages"
fi

# A kernel to start, only unpacked: this machine goes on with its own.
if [ ! -e "$build/kernel/.done" ]; then
    rm -rf "$build/kernel"
    mkdir -p "$build/kernel"
    latest() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p'; }
    [ -n "$(latest)" ] || apt-get -qq update || true
    name=$(latest | head -n 1)
    [ -n "$name" ] || die "the package sources of this machine have no linux-image-cloud-amd64"
    (cd "$build/kernel" && apt-get -qq -o APT::Sandbox::User=root download "$name" && dpkg-deb -x ./*.deb . && rm ./*.deb)
    touch "$build/kernel/.done"
fi

cmake -S . -B "$build/cmake" -DPELTON_PYTHON=OFF -DCMAKE_BUILD_TYPE=Debug -DCMAKE_EXE_LINKER_FLAGS=-static
cmake --build "$build/cmake" --parallel "$(nproc)" --target numa_placement

rm -rf "$build/files"
mkdir -p "$build/files/dev" "$build/files/sys" "$build/files/disk"
number=0 # in the order in which they need each other
for module in virtio/virtio_ring virtio/virtio virtio/virtio_pci_legacy_dev virtio/virtio_pci_modern_dev \
    virtio/virtio_pci block/virtio_blk; do
    number=$((number + 1))
    cp "$build"/kernel/lib/modules/*/kernel/drivers/$module.ko "$build/files/$number.ko"
done
# A file system that writes to a disk: only of such a one does Linux move pages.
truncate -s 256M "$build/disk"
mke2fs -q -F -t ext4 "$build/disk"
cp "$build/cmake/numa_placement" "$build/files/init"
(cd "$build/files" && find . | cpio -o -H newc --quiet) >"$build/files.cpio"
# The clock of an emulated processor is no reason to panic, and nothing here needs a network.
timeout 300 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2,sockets=2 -m 1G \
    -object memory-backend-ram,id=m0,size=512M -numa node,nodeid=0,cpus=0,memdev=m0 \
    -object memory-backend-ram,id=m1,size=512M -numa node,nodeid=1,cpus=1,memdev=m1 \
    -drive "file=$build/disk,if=virtio,format=raw" \
    -kernel "$build"/kernel/boot/vmlinuz-* -initrd "$build/files.cpio" \
    -append 'console=ttyS0 quiet panic=-1' -nographic -no-reboot -net none </dev/null |
    tr -d '\r' >"$build/console.txt"
grep -a -o -E 'numa_placement: .*' "$build/console.txt" || { cat "$build/console.txt"; die "the emulated machine said nothing"; }
grep -a -q 'numa_placement: ok' "$build/console.txt"
