// Where threads and memory end up on a machine with two memory nodes. tools/test_numa.sh starts it as the only process
// of an emulated one; anywhere else it says that there is only one node. Prints "ok" or what failed.
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <linux/reboot.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/executor.h"
#include "cpu/numa.h"

using namespace pelton::cpu;

namespace {

constexpr int64_t kBytes = int64_t{48} << 20, kPage = 4096;

[[noreturn]] void end(int status) {
    std::fflush(stdout);
    if (getpid() == 1) reboot(LINUX_REBOOT_CMD_POWER_OFF);
    std::exit(status);
}

void check(bool ok, const char* what) {
    if (ok) return;
    std::printf("numa_placement: failed: %s\n", what);
    end(1);
}

// Share of the pages that are at a node.
double share_at(int node, const char* data, int64_t bytes) {
    std::vector<void*> pages;
    for (int64_t i = 0; i < bytes; i += kPage) pages.push_back(const_cast<char*>(data) + i);
    std::vector<int> at(pages.size(), -1);
    check(syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, at.data(), 0) == 0, "move_pages");
    int64_t count = 0;
    for (int where : at) count += where == node;
    return static_cast<double>(count) / static_cast<double>(pages.size());
}

void run_on(std::vector<int> cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu : cpus) CPU_SET(cpu, &set);
    check(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

// A file that node 0 wrote, as the thread that packs does, mapped as the packed weights are.
char* mapped_file(const char* path) {
    run_on({0});
    const int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    std::vector<char> block(1 << 20, 'w');
    for (int64_t i = 0; i < kBytes; i += 1 << 20) check(write(file, block.data(), 1 << 20) == 1 << 20, "write");
    void* data = mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, file, 0);
    check(data != MAP_FAILED, "mmap");
    close(file);
    run_on({0, 1});
    return static_cast<char*>(data);
}

void shares_of_a_file() {
    const char* weights = mapped_file("/disk/weights");
    Executor executor("generic", 2, 64);
    executor.add_constant(weights, kBytes);
    check(share_at(0, weights, kBytes / 2) > 0.99, "the first half is beside the first thread");
    check(share_at(1, weights + kBytes / 2, kBytes / 2) > 0.99, "the second half is beside the second thread");
}

void shares_of_memory() {
    Mapping weights(kBytes);
    run_on({1});
    std::memset(weights.data(), 1, kBytes);
    run_on({0, 1});
    Executor executor("generic", 3, 64);  // threads 0 at node 0, threads 1 and 2 at node 1
    executor.add_constant(weights.data(), kBytes);
    check(share_at(0, weights.data(), kBytes / 3 - (2 << 20)) > 0.99, "a third is beside the first thread");
    check(share_at(1, weights.data() + kBytes / 3 + (2 << 20), kBytes * 2 / 3 - (2 << 20)) > 0.99,
          "two thirds are beside the others");
}

void one_node_of_two() {
    const char* weights = mapped_file("/disk/others");
    run_on({1});
    Executor executor("generic", 2, 64);
    executor.add_constant(weights, kBytes);
    check(share_at(1, weights, kBytes) > 0.99, "all is at the only node that the process may use");
    run_on({0, 1});
}

void workers_stay() {
    ThreadPool pool(4);
    check(pool.placement().first_threads() == std::vector<int>({0, 2, 4}), "two threads for each node");
    bool right[4] = {true, true, true, true};
    for (int step = 0; step < 100; ++step) {
        pool.run([&](int thread) {
            unsigned cpu = 0, node = 0;
            getcpu(&cpu, &node);
            if (thread > 0) right[thread] = right[thread] && node == static_cast<unsigned>(thread / 2);
        });
    }
    for (bool ok : right) check(ok, "a worker is on its node");
}

void caches_take_turns() {
    const Placement placement(2);
    Mapping cache(kBytes);
    placement.interleave(cache.data(), kBytes);
    std::memset(cache.data(), 1, kBytes);
    const double first = share_at(0, cache.data(), kBytes);
    check(first > 0.45 && first < 0.55, "a cache comes from both nodes");
}

void a_policy_is_respected() {
    unsigned long nodes[17] = {3};
    check(syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, nodes, 1025) == 0, "set_mempolicy");
    check(Placement(2).first_threads().empty(), "whoever sets a policy places memory himself");
    check(syscall(SYS_set_mempolicy, MPOL_DEFAULT, nullptr, 0) == 0, "set_mempolicy");
    {
        const char* weights = mapped_file("/disk/after");
        Executor executor("generic", 2, 64);
        executor.add_constant(weights, kBytes);
        int mode = -1;
        check(syscall(SYS_get_mempolicy, &mode, nullptr, 0, nullptr, 0) == 0 && mode == MPOL_DEFAULT,
              "the caller's policy is as it was");
    }
}

}  // namespace

int main() {
    if (getpid() == 1) {
        for (char module[] = "/1.ko"; access(module, R_OK) == 0; ++module[1]) {
            check(syscall(SYS_finit_module, open(module, O_RDONLY | O_CLOEXEC), "", 0) == 0, module);
        }
        check(mount("sysfs", "/sys", "sysfs", 0, nullptr) == 0, "/sys");
        check(mount("devtmpfs", "/dev", "devtmpfs", 0, nullptr) == 0, "/dev");
        for (int i = 0; i < 1000 && access("/dev/vda", R_OK) != 0; ++i) usleep(10000);
        check(mount("/dev/vda", "/disk", "ext4", 0, nullptr) == 0, "/disk");
    }
    if (numa_nodes().size() != 2) {
        std::printf("numa_placement: failed: this machine has no two memory nodes\n");
        end(1);
    }
    shares_of_a_file();
    shares_of_memory();
    one_node_of_two();
    workers_stay();
    caches_take_turns();
    a_policy_is_respected();
    std::printf("numa_placement: ok\n");
    end(0);
}
