#include "cpu/numa.h"

#if defined(__linux__)
#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>
#endif

namespace pelton::cpu {

#if defined(__linux__)
namespace {

constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20;
constexpr int kMaxNodes = 1024;  // of Linux
constexpr int kWordBits = 8 * sizeof(unsigned long);

// The numbers in a list such as "0-3,8".
std::vector<int> parse_list(const std::string& path) {
    std::vector<int> numbers;
    std::ifstream file(path);
    std::string line, range;
    std::getline(file, line);
    std::istringstream ranges(line);
    while (std::getline(ranges, range, ',')) {
        std::istringstream ends(range);
        int first = -1, last = -1;
        char dash;
        if (!(ends >> first)) continue;
        if (!(ends >> dash >> last)) last = first;
        for (int i = first; i <= last; ++i) numbers.push_back(i);
    }
    return numbers;
}

// Which nodes, as system calls take them.
struct NodeMask {
    unsigned long words[kMaxNodes / kWordBits] = {};
    void add(int node) {
        if (node < kMaxNodes) words[node / kWordBits] |= 1ul << node % kWordBits;
    }
};

// The kernel takes one bit less than it is told.
void set_policy(int mode, const NodeMask& nodes) { syscall(SYS_set_mempolicy, mode, nodes.words, kMaxNodes + 1); }

void set_policy_of(char* data, int64_t bytes, int mode, const NodeMask& nodes, unsigned flags) {
    syscall(SYS_mbind, data, bytes, mode, nodes.words, kMaxNodes + 1, flags);
}

// A thread's policy, for the time of a scope.
class PolicyKept {
public:
    PolicyKept() { known_ = syscall(SYS_get_mempolicy, &mode_, nodes_.words, kMaxNodes, nullptr, 0) == 0; }
    ~PolicyKept() {
        if (known_) set_policy(mode_, nodes_);
    }
    PolicyKept(const PolicyKept&) = delete;
    PolicyKept& operator=(const PolicyKept&) = delete;
    bool is_default() const { return known_ && mode_ == MPOL_DEFAULT; }

private:
    bool known_;
    int mode_ = 0;
    NodeMask nodes_;
};

char* page_at(char* address, int64_t page, bool up) {
    const auto value = reinterpret_cast<uintptr_t>(address) + (up ? page - 1 : 0);
    return reinterpret_cast<char*>(value / page * page);
}

}  // namespace

std::vector<NumaNode> numa_nodes() {
    const std::string system = "/sys/devices/system/node/";
    cpu_set_t allowed;
    const bool known = sched_getaffinity(0, sizeof allowed, &allowed) == 0;
    std::vector<NumaNode> nodes;
    for (int id : parse_list(system + "online")) {
        NumaNode node{id, {}};
        for (int cpu : parse_list(system + "node" + std::to_string(id) + "/cpulist")) {
            if (!known || (cpu < CPU_SETSIZE && CPU_ISSET(cpu, &allowed))) node.cpus.push_back(cpu);
        }
        nodes.push_back(std::move(node));
    }
    return nodes;
}

Placement::Placement(int threads) {
    std::vector<NumaNode> nodes = numa_nodes();
    if (nodes.size() < 2 || !PolicyKept().is_default()) return;
    size_t cpus = 0;
    for (NumaNode& node : nodes) {
        cpus += node.cpus.size();
        if (!node.cpus.empty()) nodes_.push_back(std::move(node));  // others have memory only
    }
    size_t before = 0;
    for (const NumaNode& node : nodes_) {
        first_threads_.push_back(static_cast<int>(before * threads / cpus));
        before += node.cpus.size();
    }
    if (!nodes_.empty()) first_threads_.push_back(threads);
}

void Placement::pin(int thread) const {
    for (size_t i = 0; i < nodes_.size(); ++i) {
        if (thread < first_threads_[i] || thread >= first_threads_[i + 1]) continue;
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        for (int cpu : nodes_[i].cpus) CPU_SET(cpu, &cpus);
        sched_setaffinity(0, sizeof cpus, &cpus);
    }
}

void Placement::share_out(const void* data, int64_t bytes) const {
    if (nodes_.empty()) return;
    char* const first = static_cast<char*>(const_cast<void*>(data));  // only its place changes
    char *const begin = page_at(first, kPage, true), *const end = page_at(first + bytes, kPage, false);
    const int threads = first_threads_.back();
    PolicyKept kept;
    char* from = begin;
    for (size_t i = 0; i < nodes_.size(); ++i) {
        char* to = end;
        if (i + 1 < nodes_.size()) {
            to = page_at(first + bytes / threads * first_threads_[i + 1] + kHugePage / 2, kHugePage, false);
            to = std::clamp(to, from, std::max(from, end));
        }
        if (to <= from) continue;
        NodeMask node;
        node.add(nodes_[i].id);
        set_policy(MPOL_PREFERRED, node);  // of pages read from a file, the policy of the reader decides
        for (const volatile char* page = from; page < to; page += kPage) static_cast<void>(*page);
        set_policy_of(from, to - from, MPOL_PREFERRED, node, MPOL_MF_MOVE);
        from = to;
    }
}

void Placement::interleave(void* data, int64_t bytes) const {
    if (nodes_.empty() || bytes == 0) return;
    NodeMask all;
    for (const NumaNode& node : nodes_) all.add(node.id);
    set_policy_of(static_cast<char*>(data), bytes, MPOL_INTERLEAVE, all, 0);
}

#else

std::vector<NumaNode> numa_nodes() { return {{0, {}}}; }
Placement::Placement(int) {}
void Placement::pin(int) const {}
void Placement::share_out(const void*, int64_t) const {}
void Placement::interleave(void*, int64_t) const {}

#endif

}  // namespace pelton::cpu
