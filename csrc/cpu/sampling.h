// From rows of logits to tokens. What the steps are and in which order: pelton/engine/sampling.py, which this
// meets bit for bit.
#pragma once

#include <stdint.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/executor.h"
#include "cpu/ops/sample/contract.h"

namespace pelton::cpu {

// The first number of Philox4x64-10 with this key, from a counter that has been raised once.
uint64_t philox(uint64_t key, uint64_t counter);

// What a request asks for. Values are those of SamplingParams; token ids are not negative.
struct SampleParams {
    double temperature = 1.0, top_p = 1.0, min_p = 0.0, typical_p = 1.0;
    double presence_penalty = 0.0, frequency_penalty = 0.0;
    float repetition_penalty = 1.0f;
    int64_t top_k = 0, min_tokens = 0;
    int64_t logprobs = -1;  // of how many likely tokens; -1: none, not even of the sampled one
    uint64_t seed = 0;
    std::vector<int32_t> prompt;  // where a repetition penalty looks at it
    std::vector<int32_t> stop_ids, allowed_ids;
    std::vector<int32_t> bias_ids;
    std::vector<float> biases;
    std::vector<std::vector<int32_t>> bad_words;

    void require_sane() const;  // throws std::invalid_argument
};

// A request's parameters made ready once, and the part of its output that they need, which grows with it.
class SampleRequest {
public:
    explicit SampleRequest(SampleParams params);

    const SampleParams& params() const { return params_; }
    bool is_greedy() const;
    bool needs_output() const { return has_penalty_ || !params_.bad_words.empty(); }
    const std::vector<int32_t>& output() const { return output_; }
    void append(int32_t token);  // a token >= 0 of the output
    void forget();               // the output
    // Throws std::invalid_argument if a parameter names a token that rows of `vocab` logits do not have. The
    // first call for a `vocab` makes what depends on it.
    void fit(int64_t vocab);

private:
    friend class Sampler;
    struct Seen {
        int32_t token;
        int64_t count;  // in the output
    };

    void see(int32_t token, int64_t count);

    const SampleParams params_;
    const bool has_penalty_;
    int64_t vocab_ = 0;
    std::vector<uint32_t> allowed_;               // a bit per token, if there are allowed_ids
    std::vector<int32_t> output_;                 // if needs_output()
    std::vector<Seen> seen_;                      // the tokens that penalties change, each once
    std::unordered_map<int32_t, size_t> places_;  // in seen_
    size_t prompt_seen_ = 0;                      // of these, the first come from the prompt
};

// One row to sample from. A request may have several rows, whose histories end with different drafts.
struct SampleRow {
    SampleRequest* request;
    const float* logits;       // raw: logprobs come from them
    const float* changed;      // what logits processors made of them, or null
    const uint32_t* mask;      // allowed tokens, or null
    const int32_t* draft;      // tokens after the output
    int64_t draft_size, step;  // step: tokens of output and draft
};

struct TopLogprob {
    int32_t token;
    double logprob;
};

// Why no token was chosen.
enum class SampleStatus { kDone, kBrokenLogits, kNothingAllowed, kBrokenChanges };

struct SampleResult {
    int32_t token;
    SampleStatus status;
    float peak;  // of the logits that are broken
    double logprob;
    int64_t rank;  // 1 for the most likely
};

// Samples rows on an executor's threads, between its steps. One caller at a time.
class Sampler {
public:
    explicit Sampler(Executor& executor);  // which must live as long
    ~Sampler();

    // results[i] belongs to rows[i]; the top logprobs of row i are top[i * top_stride] and on, largest first, as many
    // as the request wants and the vocabulary has.
    void sample(const std::vector<SampleRow>& rows, int64_t vocab, SampleResult* results, TopLogprob* top,
                int64_t top_stride);
    // Only the logprobs: of tokens[i], and the `count` largest, of row i at logits + i * stride.
    void logprobs(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const int32_t* tokens,
                  int64_t count, SampleResult* results, TopLogprob* top);

private:
    struct Scratch;
    struct Cut;

    void reserve(int64_t vocab);
    template <class Body>
    void for_rows(int64_t rows, const Body& body);
    void sample_row(Scratch& s, const SampleRow& row, int64_t n, SampleResult& result, TopLogprob* top) const;
    bool find_peak(Scratch& s, const float* x, int64_t n, float* peak) const;
    const float* adjusted(Scratch& s, const SampleRow& row, int64_t n, float* peak, SampleResult& result) const;
    void find_bad_tokens(Scratch& s, const SampleRow& row) const;
    void forbid(Scratch& s, const std::vector<int32_t>& tokens, int64_t n, bool careful) const;
    void penalise(Scratch& s, const SampleRow& row) const;
    int32_t draw(Scratch& s, const SampleParams& params, const float* x, int64_t n, float peak, uint64_t bits) const;
    int32_t draw_from_all(Scratch& s, const float* x, int64_t n, float peak, float scale, uint64_t target) const;
    uint64_t total_mass(Scratch& s, const float* x, int64_t n, float peak, float scale) const;
    float top_of_blocks(Scratch& s, int64_t n, int64_t count, float peak) const;
    void collect_top(Scratch& s, const float* x, int64_t n, int64_t count, float least, float peak) const;
    Cut cut(Scratch& s, const SampleList& list, const float* keys, bool counted, uint64_t needed, float low,
            float high) const;
    void top_logprobs(Scratch& s, const float* x, int64_t n, float peak, int64_t count, double* offset,
                      TopLogprob* top) const;

    Executor& executor_;
    const SampleKernels& kernels_;
    int64_t vocab_ = 0;  // that the scratch has room for
    std::vector<Scratch> scratch_;
};

}  // namespace pelton::cpu
