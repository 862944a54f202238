// What sampling does with whole rows of logits. Tiers differ in speed only: every comparison, weight and sum is the
// same number in all of them, and in the NumPy sampler that defines them (pelton/engine/sampling.py).
#pragma once

#include <stdint.h>

namespace pelton::cpu {

// Rows are looked at in blocks of as many logits; what is known of a block saves reading it again.
constexpr int64_t kSampleBlock = 64;
// Room that arrays written by `collect` and `keep` need behind their last element.
constexpr int64_t kSamplePadding = 16;

// Masses are weights in units of 2^-42: whole numbers, whose sums are exact in any order.
constexpr int kMassBits = 42;
constexpr uint64_t kMassOne = uint64_t{1} << kMassBits;
// Added to a number of at most 1, leaves that number in such units in the lower bits of the double.
constexpr double kMassShifter = 1.5 * (uint64_t{1} << (52 - kMassBits));

// Tokens that are left, in the order of their ids. Arrays may be null where nobody looks at them.
struct SampleList {
    float* keys;  // what they are ranked by, largest first: the logit
    float* weights;
    int32_t* ids;
    int64_t size;
};

// Of the tokens with key >= pivot, the mass and the least key; of the others, the largest key.
struct SampleSplit {
    uint64_t mass;
    float least_upper, largest_lower;
};

// No pointer may be null unless it says so.
struct SampleKernels {
    // The largest of each block; returns whether there is a NaN, which need not be among them.
    bool (*maxima)(const float* x, int64_t n, float* maxima);
    // out = x where the token's bit is set, else -inf; out may be x.
    void (*masked)(float* out, const float* x, int64_t n, const uint32_t* bits);
    // The mass of each block, with weights as `weigh` has them.
    void (*block_masses)(const float* x, int64_t n, float peak, float scale, uint64_t* masses);
    // weights = 2^y with y = max(-60, (x - peak) * scale), the scaled logit; returns their mass.
    uint64_t (*weigh)(float* weights, const float* x, int64_t n, float peak, float scale);
    // The logits that are at least `least`, and their ids; returns how many. `maxima` as above.
    int64_t (*collect)(const float* x, int64_t n, const float* maxima, float least, float* keys, int32_t* ids);
    // A null `weights` means 1 for all.
    SampleSplit (*split)(const float* keys, const float* weights, int64_t n, float pivot);
    // The elements with key >= pivot, or the others, in their order; returns how many. `to` may be `from`. Ids are
    // left out, weights where `to` has none.
    int64_t (*part)(const SampleList& from, float pivot, bool upper, const SampleList& to);
    // The elements whose `test` is above `key`, or equal with an id of at most `id`. Returns how many. `to` may be
    // `from`.
    int64_t (*keep)(const SampleList& from, const float* test, float key, int32_t id, const SampleList& to);
    // The first index at which the mass up to there, itself included, exceeds `target`; n if none.
    int64_t (*draw)(const float* weights, int64_t n, uint64_t target);
    // The sum of weight times scaled logit, each product rounded, in units of 2^-42.
    int64_t (*scaled_mass)(const SampleList& list, float peak, float scale);
    // out = -|scaled logit - mean|.
    void (*nearness)(float* out, const float* keys, int64_t n, float peak, float scale, float mean);
    int64_t (*count_above)(const float* x, int64_t n, float value);
};

}  // namespace pelton::cpu
