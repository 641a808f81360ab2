// One linear layer's product as a pass takes it, of weights of any bits.

#include "../../quasar_core/kernels/cpu/product_input.h"

using namespace quasar;

// x [count, in] in float32 times the weight comes on top of y [count, out]: a row that is given twice shows.
extern "C" void multiply(const Product* product, const float* x, float* y, int count, int threads) {
    ProductInput input;
    input.reserve(*product, count);
    in_parallel(threads, [&](const Team& team) {
        const Range rows = team.share(count);
        for (int t = rows.begin; t < rows.end; ++t) input.take(*product, t, x + size_t(t) * product->in, 0, product->in);
        team.barrier();
        input.multiply(*product, count, team.thread, team.threads, [&](int t, int o, Lanes lanes, Floats value) {
            float* to = y + size_t(t) * product->out + o;
            store(to, load(to, lanes) + value, lanes);
        });
    });
}
