// Memory by the page.
#pragma once

#include <cstdint>

namespace pelton::cpu {

// Zeroed, page-aligned memory whose pages cost nothing until they are touched.
class Mapping {
public:
    explicit Mapping(int64_t bytes);  // throws std::bad_alloc
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    char* data() const { return data_; }
    int64_t size() const { return bytes_; }
    // Has the pages of [begin, end) ready for writing and leaves what they hold, at any time; false where the system
    // cannot.
    bool populate(int64_t begin, int64_t end) const;

private:
    char* data_ = nullptr;
    int64_t bytes_;
};

}  // namespace pelton::cpu
