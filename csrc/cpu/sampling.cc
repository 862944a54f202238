#include "cpu/sampling.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "cpu/registry.h"

namespace pelton::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kGreedyBelow = 1e-5;
constexpr double kLog2E = 1.4426950408889634;
// exp(-31) is less than half a unit of mass: so far below the peak, nothing is ever drawn.
constexpr double kWeightless = 31.0;
// Lists up to this size are sorted, longer ones are narrowed down first.
constexpr int64_t kSortAtMost = 64;

int64_t num_blocks(int64_t n) { return (n + kSampleBlock - 1) / kSampleBlock; }

uint64_t bits_of(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

uint64_t mass_of(float weight) { return bits_of(static_cast<double>(weight) + kMassShifter) - bits_of(kMassShifter); }

// The mass that makes up a share of `total`; not 0.
uint64_t share_of(double share, uint64_t total) {
    const double wanted = std::ceil(share * static_cast<double>(total));
    return std::min(total, std::max<uint64_t>(1, static_cast<uint64_t>(wanted)));
}

// The least weight whose mass is at least `mass`, which is from 1 to kMassOne.
float weight_with_mass(uint64_t mass) {
    auto weight = static_cast<float>(std::ldexp(static_cast<double>(mass) - 0.5, -kMassBits));
    while (mass_of(weight) >= mass) weight = std::nextafter(weight, 0.0f);
    while (mass_of(weight) < mass) weight = std::nextafter(weight, 2.0f);
    return weight;
}

uint64_t random_target(uint64_t bits, uint64_t total) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(bits) * total >> 53);
}

int32_t largest(const std::vector<int32_t>& ids) {
    return ids.empty() ? -1 : *std::max_element(ids.begin(), ids.end());
}

void require_fit(const char* name, int32_t token, int64_t vocab) {
    if (token < vocab) return;
    throw std::invalid_argument(std::string(name) + " names token " + std::to_string(token) + ", a row has " +
                                std::to_string(vocab) + " logits");
}

// The id of the element that has `before` others with the same key before it.
int32_t id_of_equal(const SampleList& list, const float* keys, float key, int64_t before) {
    if (!list.ids) return INT32_MAX;
    int64_t i = 0;
    for (;; ++i) {
        if (keys[i] == key && before-- == 0) return list.ids[i];
    }
}

}  // namespace

uint64_t philox(uint64_t key, uint64_t counter) {
    uint64_t c[4] = {counter + 1, counter + 1 == 0, 0, 0}, k[2] = {key, 0};
    for (int round = 0; round < 10; ++round) {
        const auto p0 = static_cast<unsigned __int128>(0xD2E7470EE14C6C93) * c[0];
        const auto p1 = static_cast<unsigned __int128>(0xCA5A826395121157) * c[2];
        const uint64_t next[4] = {static_cast<uint64_t>(p1 >> 64) ^ c[1] ^ k[0], static_cast<uint64_t>(p1),
                                  static_cast<uint64_t>(p0 >> 64) ^ c[3] ^ k[1], static_cast<uint64_t>(p0)};
        std::copy(next, next + 4, c);
        k[0] += 0x9E3779B97F4A7C15;
        k[1] += 0xBB67AE8584CAA73B;
    }
    return c[0];
}

void SampleParams::require_sane() const {
    const bool numbers = temperature >= 0.0 && temperature <= 100.0 && top_p > 0.0 && min_p >= 0.0 && min_p <= 1.0 &&
                         typical_p > 0.0 && repetition_penalty > 0.0f && std::isfinite(presence_penalty) &&
                         std::isfinite(frequency_penalty);
    bool ids = biases.size() == bias_ids.size();
    const auto check = [&](const std::vector<int32_t>& list) {
        ids = ids && std::all_of(list.begin(), list.end(), [](int32_t token) { return token >= 0; });
    };
    check(prompt);
    check(stop_ids);
    check(allowed_ids);
    check(bias_ids);
    for (const auto& word : bad_words) {
        check(word);
        ids = ids && !word.empty();
    }
    if (!numbers || !ids) throw std::invalid_argument("a sampling parameter is out of its range");
}

SampleRequest::SampleRequest(SampleParams params)
    : params_(std::move(params)),
      has_penalty_(params_.repetition_penalty != 1.0f || params_.presence_penalty != 0.0 ||
                   params_.frequency_penalty != 0.0) {
    if (params_.repetition_penalty != 1.0f) {
        for (int32_t token : params_.prompt) see(token, 0);
    }
    prompt_seen_ = seen_.size();
}

bool SampleRequest::is_greedy() const { return params_.temperature < kGreedyBelow; }

void SampleRequest::see(int32_t token, int64_t count) {
    const auto [place, is_new] = places_.try_emplace(token, seen_.size());
    if (is_new) seen_.push_back({token, 0});
    seen_[place->second].count += count;
}

void SampleRequest::append(int32_t token) {
    if (token < 0) throw std::invalid_argument("the output has a negative token");
    require_fit("the output", token, vocab_);
    output_.push_back(token);
    if (has_penalty_) see(token, 1);
}

void SampleRequest::forget() {
    output_.clear();
    for (size_t i = prompt_seen_; i < seen_.size(); ++i) places_.erase(seen_[i].token);
    seen_.resize(prompt_seen_);
    for (Seen& seen : seen_) seen.count = 0;
}

void SampleRequest::fit(int64_t vocab) {
    if (vocab == vocab_) return;
    require_fit("the prompt", largest(params_.prompt), vocab);
    if (params_.min_tokens > 0) require_fit("stop_token_ids", largest(params_.stop_ids), vocab);
    require_fit("allowed_token_ids", largest(params_.allowed_ids), vocab);
    require_fit("logit_bias", largest(params_.bias_ids), vocab);
    for (const auto& word : params_.bad_words) require_fit("bad_words", largest(word), vocab);
    require_fit("the output", largest(output_), vocab);
    allowed_.clear();
    if (!params_.allowed_ids.empty()) allowed_.resize(static_cast<size_t>((vocab + 31) / 32));
    for (int32_t token : params_.allowed_ids) allowed_[token / 32] |= 1u << (token % 32);
    vocab_ = vocab;
}

// What one thread works with, as long as the longest row so far. Pages that no row needed take no memory.
struct Sampler::Scratch {
    std::unique_ptr<Mapping> memory;
    float* row = nullptr;     // the logits after what the request changes
    float* maxima = nullptr;  // of the blocks of the row that was looked at last
    float* above = nullptr;   // and of blocks of those
    uint64_t* masses = nullptr;
    float* test = nullptr;
    SampleList list = {}, work = {};
    std::vector<int32_t> tokens;
    std::vector<float> values;
};

// What is kept of a list: larger keys, and equal ones up to an id.
struct Sampler::Cut {
    float key;
    int32_t id;
    uint64_t mass;
};

Sampler::Sampler(Executor& executor)
    : executor_(executor), kernels_(sample_kernels(executor.isa())), scratch_(executor.threads()) {}

Sampler::~Sampler() = default;

void Sampler::reserve(int64_t vocab) {
    if (vocab < 1 || vocab > (int64_t{1} << 20)) {
        throw std::invalid_argument("rows of " + std::to_string(vocab) +
                                    " logits cannot be sampled, only of 1 to 1048576");
    }
    if (vocab > vocab_) {
        const int64_t room = (vocab + 2 * kSamplePadding + 15) / 16 * 16, blocks = num_blocks(room) + kSamplePadding;
        std::vector<Scratch> scratch(scratch_.size());
        for (Scratch& s : scratch) {
            s.memory = std::make_unique<Mapping>(8 * room * 4 + 4 * blocks * 4);
            char* next = s.memory->data();
            const auto take = [&](int64_t count, int64_t size) {
                char* taken = next;
                next += count * size;
                return taken;
            };
            const auto floats = [&] { return reinterpret_cast<float*>(take(room, 4)); };
            const auto ids = [&] { return reinterpret_cast<int32_t*>(take(room, 4)); };
            s.masses = reinterpret_cast<uint64_t*>(take(blocks, 8));
            s.row = floats();
            s.test = floats();
            s.list = {floats(), floats(), ids(), 0};
            s.work = {floats(), floats(), ids(), 0};
            s.maxima = reinterpret_cast<float*>(take(blocks, 4));
            s.above = reinterpret_cast<float*>(take(blocks, 4));
        }
        scratch_ = std::move(scratch);
    }
    vocab_ = std::max(vocab, vocab_);
}

template <class Body>
void Sampler::for_rows(int64_t rows, const Body& body) {
    struct {
        const Body* body;
        int64_t rows;
        std::atomic<int64_t> next;
        Scratch* scratch;
    } work{&body, rows, 0, scratch_.data()};
    executor_.run_on_threads(
        [&work](int thread) {
            for (int64_t row; (row = work.next.fetch_add(1, std::memory_order_relaxed)) < work.rows;) {
                (*work.body)(work.scratch[thread], row);
            }
        },
        rows == 1);
}

void Sampler::sample(const std::vector<SampleRow>& rows, int64_t vocab, SampleResult* results, TopLogprob* top,
                     int64_t top_stride) {
    reserve(vocab);
    for_rows(static_cast<int64_t>(rows.size()),
             [&](Scratch& s, int64_t row) { sample_row(s, rows[row], vocab, results[row], top + row * top_stride); });
}

void Sampler::logprobs(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const int32_t* tokens,
                       int64_t count, SampleResult* results, TopLogprob* top) {
    reserve(vocab);
    for_rows(rows, [&](Scratch& s, int64_t row) {
        const float* x = logits + row * stride;
        SampleResult& result = results[row];
        result = {tokens[row], SampleStatus::kDone, 0.0f, 0.0, 0};
        if (!find_peak(s, x, vocab, &result.peak)) {
            result.status = SampleStatus::kBrokenLogits;
            return;
        }
        double offset;
        top_logprobs(s, x, vocab, result.peak, count, &offset, top + row * count);
        result.logprob = static_cast<double>(x[result.token]) - offset;
        result.rank = kernels_.count_above(x, vocab, x[result.token]) + 1;
    });
}

void Sampler::sample_row(Scratch& s, const SampleRow& row, int64_t n, SampleResult& result, TopLogprob* top) const {
    const SampleRequest& request = *row.request;
    const SampleParams& params = request.params();
    result = {-1, SampleStatus::kDone, 0.0f, 0.0, 0};
    float peak;
    if (!find_peak(s, row.logits, n, &peak)) {
        result.status = SampleStatus::kBrokenLogits;
        result.peak = peak;
        return;
    }
    double offset = 0.0;
    if (params.logprobs >= 0) top_logprobs(s, row.logits, n, peak, params.logprobs, &offset, top);
    const float* x = adjusted(s, row, n, &peak, result);
    if (result.status != SampleStatus::kDone) return;
    if (request.is_greedy()) {
        const float* block = std::find(s.maxima, s.maxima + num_blocks(n), peak);
        const int64_t begin = (block - s.maxima) * kSampleBlock;
        result.token = static_cast<int32_t>(std::find(x + begin, x + n, peak) - x);
    } else {
        const uint64_t bits = philox(params.seed, static_cast<uint64_t>(row.step)) >> 11;
        result.token = draw(s, params, x, n, peak, bits);
    }
    if (params.logprobs < 0) return;
    result.logprob = static_cast<double>(row.logits[result.token]) - offset;
    result.rank = kernels_.count_above(row.logits, n, row.logits[result.token]) + 1;
}

// The largest logit, and in s.maxima that of each block. False if it is not finite.
bool Sampler::find_peak(Scratch& s, const float* x, int64_t n, float* peak) const {
    if (kernels_.maxima(x, n, s.maxima)) {
        *peak = std::numeric_limits<float>::quiet_NaN();
        return false;
    }
    kernels_.maxima(s.maxima, num_blocks(n), s.above);
    *peak = *std::max_element(s.above, s.above + num_blocks(num_blocks(n)));
    return std::isfinite(*peak);
}

// The row after everything that the request changes, with its peak and s.maxima.
const float* Sampler::adjusted(Scratch& s, const SampleRow& row, int64_t n, float* peak, SampleResult& result) const {
    const SampleRequest& request = *row.request;
    const SampleParams& params = request.params();
    const float* x = row.logits;
    const auto broken = [&](SampleStatus status) {
        result.status = status;
        result.peak = *peak;
    };
    if (row.changed) {
        x = row.changed;
        if (!find_peak(s, x, n, peak)) {
            broken(SampleStatus::kBrokenChanges);
            return x;
        }
    }
    const bool too_early = row.step < params.min_tokens && !params.stop_ids.empty();
    if (!row.mask && request.allowed_.empty() && params.bad_words.empty() && !too_early && params.bias_ids.empty() &&
        !request.has_penalty_) {
        return x;
    }
    // Whether a step leaves no token is looked at only if all of them together leave none.
    for (const bool careful : {false, true}) {
        if (row.mask || !request.allowed_.empty()) {
            kernels_.masked(s.row, x, n, row.mask ? row.mask : request.allowed_.data());
            if (row.mask && !request.allowed_.empty()) kernels_.masked(s.row, s.row, n, request.allowed_.data());
            if (careful && !find_peak(s, s.row, n, peak)) {
                broken(SampleStatus::kNothingAllowed);
                return s.row;
            }
        } else {
            std::memcpy(s.row, x, static_cast<size_t>(n) * sizeof(float));
        }
        find_bad_tokens(s, row);
        forbid(s, s.tokens, n, careful);
        if (too_early) forbid(s, params.stop_ids, n, careful);
        for (size_t i = 0; i < params.bias_ids.size(); ++i) s.row[params.bias_ids[i]] += params.biases[i];
        if (request.has_penalty_) penalise(s, row);
        if (find_peak(s, s.row, n, peak)) return s.row;
        if (*peak != -kInfinity) break;
    }
    broken(SampleStatus::kBrokenChanges);
    return s.row;
}

// Into s.tokens, the last tokens of the bad words whose other tokens end output and draft.
void Sampler::find_bad_tokens(Scratch& s, const SampleRow& row) const {
    const std::vector<int32_t>& output = row.request->output_;
    const auto known = static_cast<int64_t>(output.size());
    s.tokens.clear();
    for (const std::vector<int32_t>& word : row.request->params_.bad_words) {
        const int64_t before = static_cast<int64_t>(word.size()) - 1, first = known + row.draft_size - before;
        bool ends = first >= 0;
        for (int64_t i = 0; ends && i < before; ++i) {
            const int64_t at = first + i;
            ends = word[i] == (at < known ? output[at] : row.draft[at - known]);
        }
        if (ends) s.tokens.push_back(word.back());
    }
}

// With `careful`, gives way if no token would be left.
void Sampler::forbid(Scratch& s, const std::vector<int32_t>& tokens, int64_t n, bool careful) const {
    s.values.clear();
    for (int32_t token : tokens) {
        s.values.push_back(s.row[token]);
        s.row[token] = -kInfinity;
    }
    float peak;
    if (!careful || tokens.empty() || find_peak(s, s.row, n, &peak)) return;
    // Backwards: of a token that is named twice, the first value is the right one.
    for (size_t i = tokens.size(); i-- > 0;) s.row[tokens[i]] = s.values[i];
}

void Sampler::penalise(Scratch& s, const SampleRow& row) const {
    const SampleRequest& request = *row.request;
    const SampleParams& params = request.params_;
    const auto penalised = [&](float value, int64_t count) {
        if (params.repetition_penalty != 1.0f) {
            value = value > 0.0f ? value / params.repetition_penalty : value * params.repetition_penalty;
        }
        if (count == 0) return value;
        const double minus = params.frequency_penalty * static_cast<double>(count) + params.presence_penalty;
        return value - static_cast<float>(minus);
    };
    s.values.clear();
    for (int64_t i = 0; i < row.draft_size; ++i) s.values.push_back(s.row[row.draft[i]]);
    for (const SampleRequest::Seen& seen : request.seen_) s.row[seen.token] = penalised(s.row[seen.token], seen.count);
    // What the draft names is counted with it, from the value before.
    for (int64_t i = 0; i < row.draft_size; ++i) {
        const auto place = request.places_.find(row.draft[i]);
        const int64_t count = std::count(row.draft, row.draft + row.draft_size, row.draft[i]);
        s.row[row.draft[i]] =
            penalised(s.values[i], count + (place == request.places_.end() ? 0 : request.seen_[place->second].count));
    }
}

int32_t Sampler::draw(Scratch& s, const SampleParams& params, const float* x, int64_t n, float peak,
                      uint64_t bits) const {
    const auto scale = static_cast<float>(kLog2E / params.temperature);
    const bool has_top_k = params.top_k > 0 && params.top_k < n;
    const bool has_top_p = params.top_p < 1.0, has_min_p = params.min_p > 0.0, is_typical = params.typical_p < 1.0;
    if (!has_top_k && !has_top_p && !has_min_p && !is_typical) {
        const uint64_t total = total_mass(s, x, n, peak, scale);
        return draw_from_all(s, x, n, peak, scale, random_target(bits, total));
    }
    SampleList& list = s.list;
    const auto level = [&](double scaled) { return static_cast<float>(peak + scaled * params.temperature); };
    float least = level(-kWeightless);  // what is below is neither kept nor does it count
    const auto collect = [&] {
        list.size = kernels_.collect(x, n, s.maxima, least, list.keys, list.ids);
        return kernels_.weigh(list.weights, list.keys, list.size, peak, scale);
    };
    uint64_t mass;
    if (has_top_k) {
        collect_top(s, x, n, params.top_k, least, peak);
        mass = kernels_.weigh(list.weights, list.keys, list.size, peak, scale);
    } else if (has_top_p) {
        mass = total_mass(s, x, n, peak, scale);
        const float weightless = least;
        // What a peaked distribution needs is in the best quarter of the blocks.
        least = std::max(least, top_of_blocks(s, n, (num_blocks(n) + 3) / 4, peak));
        if (collect() < share_of(params.top_p, mass)) {
            // All below together are at most half of what top-p leaves out, even if each were rounded up to a unit.
            const double left_out = (1.0 - params.top_p) * std::ldexp(static_cast<double>(mass), -kMassBits);
            least = std::max(weightless, level(std::log(0.25 * left_out / static_cast<double>(n)) - 0.001));
            collect();
        }
    } else {
        if (has_min_p) least = std::max(least, level(std::log(params.min_p) - 0.001));
        mass = collect();
    }
    const auto keep = [&](const float* test, const Cut& cut) {
        list.size = kernels_.keep(list, test, cut.key, cut.id, list);
        mass = cut.mass;
    };
    if (has_top_p) keep(list.keys, cut(s, list, list.keys, false, share_of(params.top_p, mass), least, peak));
    if (has_min_p) {
        const auto mass_of_least = static_cast<uint64_t>(std::ceil(std::ldexp(params.min_p, kMassBits)));
        const float weight = weight_with_mass(std::max<uint64_t>(1, mass_of_least));
        keep(list.weights, {weight, INT32_MAX, 0});
        mass = kernels_.split(list.keys, list.weights, list.size, -kInfinity).mass;
    }
    if (is_typical) {
        const int64_t scaled = kernels_.scaled_mass(list, peak, scale);
        const auto mean = static_cast<float>(static_cast<double>(scaled) / static_cast<double>(mass));
        kernels_.nearness(s.test, list.keys, list.size, peak, scale, mean);
        keep(s.test, cut(s, list, s.test, false, share_of(params.typical_p, mass), -FLT_MAX, 0.0f));
    }
    return list.ids[kernels_.draw(list.weights, list.size, random_target(bits, mass))];
}

// Of all weights, with the mass of each block in s.masses.
uint64_t Sampler::total_mass(Scratch& s, const float* x, int64_t n, float peak, float scale) const {
    kernels_.block_masses(x, n, peak, scale, s.masses);
    uint64_t total = 0;
    for (int64_t i = 0; i < num_blocks(n); ++i) total += s.masses[i];
    return total;
}

int32_t Sampler::draw_from_all(Scratch& s, const float* x, int64_t n, float peak, float scale, uint64_t target) const {
    int64_t block = 0;
    for (; target >= s.masses[block]; ++block) target -= s.masses[block];
    const int64_t begin = block * kSampleBlock, size = std::min(kSampleBlock, n - begin);
    kernels_.weigh(s.list.weights, x + begin, size, peak, scale);
    return static_cast<int32_t>(begin + kernels_.draw(s.list.weights, size, target));
}

// A logit that is no larger than the largest of `count` blocks; a row has as many that are no smaller.
float Sampler::top_of_blocks(Scratch& s, int64_t n, int64_t count, float peak) const {
    const SampleList maxima = {s.maxima, nullptr, nullptr, num_blocks(n)};
    return cut(s, maxima, s.maxima, true, static_cast<uint64_t>(count) * kMassOne, -FLT_MAX, peak).key;
}

// Into s.list, whose weights are to be computed, the `count` largest logits that are at least `least`. Needs s.maxima.
void Sampler::collect_top(Scratch& s, const float* x, int64_t n, int64_t count, float least, float peak) const {
    if (count < num_blocks(n)) least = std::max(least, top_of_blocks(s, n, count, peak));
    SampleList& list = s.list;
    list.size = kernels_.collect(x, n, s.maxima, least, list.keys, list.ids);
    if (list.size > count) {
        const Cut last = cut(s, list, list.keys, true, static_cast<uint64_t>(count) * kMassOne, least, peak);
        list.size = kernels_.keep(list, list.keys, last.key, last.id, list);
    }
}

// Where a list, ranked by `keys`, has to end so that its mass is at least `needed`; with `counted`, every weight is 1.
// Keys are in [low, high], save -inf, and `high` occurs if it equals `low`.
Sampler::Cut Sampler::cut(Scratch& s, const SampleList& list, const float* keys, bool counted, uint64_t needed,
                          float low, float high) const {
    SampleList now = {const_cast<float*>(keys), counted ? nullptr : list.weights, nullptr, list.size};  // only read
    const SampleList work = {s.work.keys, counted ? nullptr : s.work.weights, nullptr, 0};
    uint64_t above = 0;  // the mass of what has been left behind with larger keys
    low = std::max(low, -FLT_MAX);
    while (now.size > kSortAtMost) {
        const bool last = !(low < high);
        const float middle = low * 0.5f + high * 0.5f;
        const float pivot = !last && middle > low ? middle : high;
        const SampleSplit split = kernels_.split(now.keys, now.weights, now.size, pivot);
        const bool upper = above + split.mass >= needed;
        const int64_t size = kernels_.part(now, pivot, upper, work);
        now = work;
        now.size = size;
        if (!upper) {
            above += split.mass;
            high = split.largest_lower;
            low = std::min(low, high);
            continue;
        }
        low = split.least_upper;
        if (!last) continue;
        // All keys are equal: the ids decide, in whose order they lie.
        const uint64_t target = needed - above - 1;
        const int64_t index =
            counted ? static_cast<int64_t>(target / kMassOne) : kernels_.draw(now.weights, now.size, target);
        const uint64_t mass = kernels_.split(now.keys, now.weights, index + 1, -kInfinity).mass;
        return {high, id_of_equal(list, keys, high, index), above + mass};
    }
    struct Ranked {
        float key;
        int32_t place;
    } ranked[kSortAtMost];
    for (int64_t i = 0; i < now.size; ++i) ranked[i] = {now.keys[i], static_cast<int32_t>(i)};
    std::sort(ranked, ranked + now.size,
              [](const Ranked& a, const Ranked& b) { return a.key != b.key ? a.key > b.key : a.place < b.place; });
    for (int64_t i = 0;; ++i) {
        above += counted ? kMassOne : mass_of(now.weights[ranked[i].place]);
        if (above < needed && i < now.size - 1) continue;
        const float key = ranked[i].key;
        if (i == now.size - 1 || ranked[i + 1].key != key) return {key, INT32_MAX, above};
        int64_t equals_before = 0;
        while (equals_before < i && ranked[i - equals_before - 1].key == key) ++equals_before;
        return {key, id_of_equal(list, keys, key, equals_before), above};
    }
}

// offset: log of the sum of exp. Needs s.maxima.
void Sampler::top_logprobs(Scratch& s, const float* x, int64_t n, float peak, int64_t count, double* offset,
                           TopLogprob* top) const {
    const uint64_t total = total_mass(s, x, n, peak, static_cast<float>(kLog2E));
    *offset = static_cast<double>(peak) + std::log(std::ldexp(static_cast<double>(total), -kMassBits));
    if (count == 0) return;
    collect_top(s, x, n, count, -kInfinity, peak);
    for (int64_t i = 0; i < s.list.size; ++i) {
        top[i] = {s.list.ids[i], static_cast<double>(s.list.keys[i])};
    }
    std::sort(top, top + s.list.size, [](const TopLogprob& a, const TopLogprob& b) {
        return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
    });
    for (int64_t i = 0; i < s.list.size; ++i) top[i].logprob -= *offset;
}

}  // namespace pelton::cpu
