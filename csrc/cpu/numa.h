// Machines whose memory is in several places: threads and what they read are kept together.
#pragma once

#include <cstdint>
#include <vector>

namespace pelton::cpu {

// A memory node of which this process may use CPUs.
struct NumaNode {
    int id;
    std::vector<int> cpus;  // those that it may use, ascending
};

// Which threads of a pool run beside which node, and memory placed to match. Thread t of n takes the t-th n-th of what
// it reads (see Executor::reset_share), so nodes have contiguous threads, in proportion to their CPUs, and contiguous
// parts of each constant. Does nothing on a machine with one node, and nothing where the process was started
// with a memory policy (numactl --interleave, --membind): that is somebody's decision.
//
// All of it is best effort: where the kernel refuses, memory stays where it is.
class Placement {
public:
    explicit Placement(int threads);

    // Keeps the calling thread, number `thread` of the pool, on the CPUs of its node.
    void pin(int thread) const;
    // Reads all of `data`, so that what is not in memory yet comes in at its node, and moves what was elsewhere.
    // Pages that other processes map as well stay. Blocks of 2 MB are not divided.
    void share_out(const void* data, int64_t bytes) const;
    // Pages of `data`, not touched so far, come from all nodes in turn: for what any thread may read.
    void interleave(void* data, int64_t bytes) const;
    // The first thread of each node's, and at the end the number of threads; empty where nothing is placed.
    const std::vector<int>& first_threads() const { return first_threads_; }

private:
    std::vector<NumaNode> nodes_;
    std::vector<int> first_threads_;
};

// All of them; one node where the system does not tell.
std::vector<NumaNode> numa_nodes();

}  // namespace pelton::cpu
