#include "cpu/mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace pelton::cpu {

Mapping::Mapping(int64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(p, bytes, MADV_HUGEPAGE);  // fewer TLB misses; a refusal does no harm
#endif
    data_ = static_cast<char*>(p);
}

Mapping::~Mapping() {
    if (data_) munmap(data_, bytes_);
}

bool Mapping::populate(int64_t begin, int64_t end) const {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of Linux 5.14, which older headers do not know
    const int64_t page = sysconf(_SC_PAGESIZE);
    begin = std::max<int64_t>(begin, 0) / page * page;
    end = std::min(end, bytes_);
    return begin >= end || madvise(data_ + begin, end - begin, kPopulateWrite) == 0;
#else
    return false;
#endif
}

}  // namespace pelton::cpu
