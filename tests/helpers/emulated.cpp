// Runs the C++ for another processor, under an emulator: a call at a time comes by stdin and goes back by stdout.
//
// A call is a block of memory whose pointers are offsets in it, and a list of where they stand. See `emulated.py`.

#include <unistd.h>

#include <cstdlib>

#include "quasar.cpp"

namespace {

struct Call {
    int64_t kind;  // a product, a pass, a rule; of a compressed weight: bases, itself, what it was; norms
    const Model* model;
    const int64_t* tokens;
    const int* parents;
    const float* const* cos;
    const float* const* sin;
    const float* growth;
    void* const* states;
    const StatePlace* recurrent;
    const void* given;
    void* rows;
    float* logits;
    int64_t* chosen;
    float* margins;
    int32_t* likeliest;
    const Recurrence* rule;
    uint8_t *strips, *bases;
    int32_t* first;
    Outlier* outliers;
    const void* x;
    const void* codes;
    void* y;
    int is_bfloat16, count, shown, position, capacity, wanted, in, out, groups, group, bits, threads;
};

bool take(void* to, size_t size) {
    for (size_t done = 0; done < size;) {
        const ssize_t got = read(0, static_cast<char*>(to) + done, size - done);
        if (got <= 0) return false;
        done += size_t(got);
    }
    return true;
}

void give(const void* from, size_t size) {
    for (size_t done = 0; done < size;) {
        const ssize_t put = write(1, static_cast<const char*>(from) + done, size - done);
        if (put <= 0) std::exit(1);
        done += size_t(put);
    }
}

void run_compressed(const Call& call) {
    auto weight = static_cast<const uint16_t*>(call.x);
    if (call.kind == 3) return quasar_choose_bases(weight, call.in, call.out, call.bases, call.first, call.threads);
    if (call.kind == 4)
        return quasar_compress(weight, call.in, call.out, call.bases, call.first, call.strips, call.outliers, call.threads);
    const Compressed compressed{call.strips, call.bases, call.first, call.outliers};
    quasar_restore(&compressed, call.in, call.out, static_cast<uint16_t*>(call.y), call.threads);
}

void run(const Call& call) {
    if (call.kind == 2)
        return quasar_recur(call.rule, call.is_bfloat16, call.count, call.recurrent,
                            static_cast<float*>(call.y), call.threads);
    if (call.kind == 0)
        return quasar_multiply_codes(call.x, call.codes, call.y, call.count, call.in, call.out, call.groups, call.group,
                                     call.bits, call.is_bfloat16, call.threads);
    if (call.kind == 6)
        return quasar_rms_norm(static_cast<const uint16_t*>(call.x), static_cast<const float*>(call.given),
                               static_cast<uint16_t*>(call.y), call.count, call.in, *call.growth, call.bits, call.threads);
    if (call.kind >= 3) return run_compressed(call);
    void* pass = quasar_pass_new(call.model);
    quasar_pass_run(pass, call.is_bfloat16, 0, call.model->layers, call.tokens, call.parents, call.count, call.shown,
                    call.position, call.cos, call.sin, call.growth, call.states, call.recurrent, call.capacity, call.given,
                    call.rows, call.logits, call.chosen, call.margins, call.wanted, call.likeliest, call.threads);
    quasar_pass_delete(pass, call.is_bfloat16);
}

}  // namespace

int main() {
    int64_t sizes[2];
    while (take(sizes, sizeof sizes)) {
        Buffer<char> memory;
        std::vector<int64_t> pointers;
        memory.resize(size_t(sizes[0])), pointers.resize(size_t(sizes[1]));
        if (!take(memory.data(), memory.size()) || !take(pointers.data(), pointers.size() * sizeof(int64_t))) return 1;
        for (int64_t at : pointers) {
            int64_t offset;
            std::memcpy(&offset, memory.data() + at, sizeof offset);
            char* address = memory.data() + offset;
            std::memcpy(memory.data() + at, &address, sizeof address);
        }
        Call call;
        std::memcpy(&call, memory.data(), sizeof call);
        run(call);
        give(memory.data(), memory.size());
    }
}
