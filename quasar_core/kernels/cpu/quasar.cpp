// What Python calls: a product with packed codes, and a decoder's whole pass.

#include "causal_attention.h"
#include "pass.h"

using namespace quasar;

namespace {

constexpr int CHUNK = 64;  // rows whose activations stay in the cache beside a block's codes

template <typename X>
void multiply_codes_of(const X* x, const Product& product, X* y, int count, int threads) {
    Buffer<int8_t> values(size_t(count) * product.groups * product.group);
    Buffer<float> scales(size_t(count) * product.groups), sums(scales.size());
    const CodedRows rows{values.data(), scales.data(), sums.data(), product.in, product.groups,
                         product.group};
    auto put = [&](int t, int o, Lanes lanes, Floats value) {
        store(y + size_t(t) * product.out + o, value, lanes);
    };
    in_parallel(threads, [&](const Team& team) {
        const Range own = team.share(count), blocks = team.share((product.out + BLOCK - 1) / BLOCK);
        for (int t = own.begin; t < own.end; ++t)
            for (int g = 0; g < product.groups; ++g) quantize_group(x + size_t(t) * product.in, rows, t, g);
        team.barrier();
        for (int begin = 0; begin < count; begin += CHUNK)
            multiply_codes(product.bits, product.weight, rows, blocks, begin, std::min(begin + CHUNK, count),
                           product.out, put);
    });
}

}  // namespace

extern "C" {

// x [count, in] and y [count, out], both bfloat16 or both float32; codes aligned to 64 bytes, of 2, 4 or 8 bits.
void quasar_multiply_codes(const void* x, const void* codes, void* y, int count, int in, int out, int groups, int group,
                           int bits, int is_bfloat16, int threads) {
    const Product product{codes, nullptr, bits, in, out, groups, group};
    if (is_bfloat16)
        multiply_codes_of(static_cast<const uint16_t*>(x), product, static_cast<uint16_t*>(y), count, threads);
    else
        multiply_codes_of(static_cast<const float*>(x), product, static_cast<float*>(y), count, threads);
}

// The exponents' base of each strip of a bfloat16 weight [out, in], and how many outliers it has.
void quasar_choose_bases(const uint16_t* weight, int in, int out, uint8_t* bases, int32_t* outliers, int threads) {
    in_parallel(threads, [&](const Team& team) {
        const Range strips = team.share((out + STRIP - 1) / STRIP);
        for (int strip = strips.begin; strip < strips.end; ++strip) {
            const int first = strip * STRIP, outs = std::min(STRIP, out - first);
            int count;
            bases[strip] = uint8_t(choose_base(weight + size_t(first) * in, size_t(outs) * in, count));
            outliers[strip] = count;
        }
    });
}

// That weight in 12 bits: to `strips` and `outliers`, of which `first` [strips + 1] tells where those of a strip begin.
void quasar_compress(const uint16_t* weight, int in, int out, const uint8_t* bases, const int32_t* first, uint8_t* strips,
                     Outlier* outliers, int threads) {
    in_parallel(threads, [&](const Team& team) {
        const Range own = team.share((out + STRIP - 1) / STRIP);
        for (int strip = own.begin; strip < own.end; ++strip) {
            const int begin = strip * STRIP;
            compress_strip(weight + size_t(begin) * in, std::min(STRIP, out - begin), in, bases[strip],
                           strips + begin * compressed_row(in), outliers + first[strip]);
        }
    });
}

// A compressed weight as it was, [out, in].
void quasar_restore(const Compressed* weight, int in, int out, uint16_t* w, int threads) {
    in_parallel(threads, [&](const Team& team) {
        const Range own = team.share((out + STRIP - 1) / STRIP);
        for (int at = own.begin; at < own.end; ++at) restore_strip(strip_of(*weight, in, out, at), w + size_t(at) * STRIP * in);
    });
}

// A pass over the model's tensors, which must outlive it; the descriptions are copied.
void* quasar_pass_new(const Model* model) {
    if (model->is_bfloat16) return new Pass<uint16_t>(*model);
    return new Pass<float>(*model);
}

void quasar_pass_delete(void* pass, int is_bfloat16) {
    if (is_bfloat16) return delete static_cast<Pass<uint16_t>*>(pass);
    delete static_cast<Pass<float>*>(pass);
}

// Layers [begin, end) of a pass; see `Pass::run`.
void quasar_pass_run(void* pass, int is_bfloat16, int begin, int end, const int64_t* tokens, const int* parents,
                     int count, int shown, int position, const float* const* cos, const float* const* sin,
                     const float* growth, void* const* states, const StatePlace* recurrent, int capacity, const void* given,
                     void* rows, float* logits, int64_t* chosen, float* margins, int wanted, int32_t* likeliest,
                     int threads) {
    auto run = [&](auto* of) {
        of->run(begin, end, tokens, parents, count, shown, position, cos, sin, growth, states, recurrent, capacity, given,
                rows, logits, chosen, margins, wanted, likeliest, threads);
    };
    if (is_bfloat16) return run(static_cast<Pass<uint16_t>*>(pass));
    run(static_cast<Pass<float>*>(pass));
}

// Causal attention of tensors [texts, heads, tokens, size] in bfloat16, whose strides (text, head, token) follow one another in
// `strides`: queries', keys', values', and those of `to`.
void quasar_attend_causally(const uint16_t* queries, const uint16_t* keys, const uint16_t* values, uint16_t* to,
                            const int64_t* strides, int64_t texts, const AttentionShape* shape, int threads) {
    const auto of = [&](const uint16_t* first, int i) {
        return Heads{const_cast<uint16_t*>(first), strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
    };
    attend_causally(*shape, of(queries, 0), of(keys, 1), of(values, 2), of(to, 3), texts, threads);
}

// RMS norms of rows [count, size] in bfloat16; a weight of null is one of ones.
void quasar_rms_norm(const uint16_t* x, const float* weight, uint16_t* y, int64_t count, int size, float eps, int rounds_first,
                     int threads) {
    for_each(threads, count, 32, [&](int64_t row) {
        normalise_row(x + row * size, weight, size, eps, rounds_first, y + row * size);
    });
}

// Whether the processor multiplies bfloat16 in pairs.
int quasar_multiplies_pairs() { return Terms<uint16_t>::TOKENS == 2; }

// The rule of a recurrent layer over what it reads of tokens; see `Recurring::run`.
void quasar_recur(const Recurrence* rule, int is_bfloat16, int count, const StatePlace* place, float* outputs, int threads) {
    auto run = [&](auto&& recurring) {
        recurring.reserve(*rule, count);
        in_parallel(threads, [&](const Team& team) { recurring.run(*rule, count, *place, outputs, team); });
    };
    if (is_bfloat16) return run(Recurring<uint16_t>());
    run(Recurring<float>());
}

// Seconds of all its passes so far, and those of them in products.
void quasar_pass_seconds(void* pass, int is_bfloat16, double* seconds) {
    auto report = [seconds](const auto* of) { seconds[0] = of->seconds, seconds[1] = of->seconds_in_products; };
    if (is_bfloat16) return report(static_cast<Pass<uint16_t>*>(pass));
    report(static_cast<Pass<float>*>(pass));
}

// What it was compiled for.
const char* quasar_form() { return FORM; }

// For Python to check that both sides describe a model in the same bytes.
int quasar_size_of_model() { return sizeof(Model); }
static_assert(sizeof(Outlier) == 8, "as compressed.py has it");
int quasar_size_of_compressed() { return sizeof(Compressed); }
int quasar_size_of_layer() { return sizeof(Layer); }
int quasar_size_of_experts() { return sizeof(Experts); }
int quasar_size_of_recurrence() { return sizeof(Recurrence); }
int quasar_size_of_state_place() { return sizeof(StatePlace); }
int quasar_size_of_attention_shape() { return sizeof(AttentionShape); }
}
