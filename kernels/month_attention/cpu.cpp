// Month attention on a CPU: one fused pass forward, one backward, compiled for the machine at first use by cpu.py.
//
// A task is a block of pixels of one chip with all its months, small enough that its rows stay in a core's L2 cache.
// Per task: copy the rows in, matrix product, LayerNorm → GELU → Linear in registers, softmax over months, weighted
// sum. The backward repeats the forward of its task, but for the product where the caller kept it (`hidden`). Nothing
// else of the size of the features is allocated besides the result, which matters more than arithmetic: eager PyTorch
// spends most of a large level on page faults.
//
// As in the Triton kernels, the first layer's rows are centred over its outputs, so LayerNorm's mean is zero.
//
// Legend: N images, B chips, P = H·W pixels, D channels, T months of a chip, R = T × (pixels of a block) rows.
// Features are [N, P, D] in memory. Scratch rows are padded with zeros to DP, a multiple of PANEL columns.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS = 8;  // ROWS × 2 accumulators and their operands fill the registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ROWS = 4;
#else
constexpr int VECTOR_BYTES = 16, ROWS = 4;
#endif
constexpr int64_t BLOCK_BYTES = 192 << 10;  // of one scratch matrix; the backward holds three, a core's L2 is 1 MB
constexpr int64_t DEPTH = 160;  // rows a product over rows takes at a time: its panel stays in the L1 cache

template <typename T> struct Simd;
template <> struct Simd<float> { typedef float V __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct Simd<double> { typedef double V __attribute__((vector_size(VECTOR_BYTES))); };
template <typename T> using Vec = typename Simd<T>::V;
typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
template <typename T> constexpr int LANES = VECTOR_BYTES / sizeof(T);
template <typename T> constexpr int PANEL = 2 * LANES<T>;

template <typename T> Vec<T> load(const T* p) { Vec<T> v; std::memcpy(&v, p, sizeof v); return v; }
template <typename T> void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }
// The sums of LANES vectors, one a lane. Each step adds halves of groups of GROUP lanes, two vectors to one: two to three
// instructions a sum, where one alone is a chain of ten.
template <size_t GROUP, typename V, size_t... I> V add_halves(V a, V b, std::index_sequence<I...>) {
    constexpr size_t lanes = sizeof...(I), half = GROUP / 2;
    return __builtin_shufflevector(a, b, (I % GROUP < half ? I : lanes + I - half)...) +
           __builtin_shufflevector(a, b, (I % GROUP < half ? I + half : lanes + I)...);
}
template <typename T, size_t GROUP = LANES<T>> Vec<T> lane_sums(Vec<T>* v) {
    if constexpr (GROUP == 1) return v[0];
    else {
        for (size_t i = 0; i < GROUP / 2; ++i)
            v[i] = add_halves<GROUP>(v[i], v[i + GROUP / 2], std::make_index_sequence<LANES<T>>());
        return lane_sums<T, GROUP / 2>(v);
    }
}

// Zeroed scratch on a cache line, freed with its owner.
template <typename T> struct Buffer {
    T* data;
    explicit Buffer(int64_t n) : data(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)))) {
        std::memset(data, 0, n * sizeof(T));
    }
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    operator T*() const { return data; }
};

inline Vec<float> absolute(Vec<float> v) {
    Int bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= 0x7fffffff;
    std::memcpy(&v, &bits, sizeof bits);
    return v;
}
inline Vec<double> absolute(Vec<double> v) { return v < 0 ? -v : v; }

// Φ(−t) and φ(t) for t ≥ 0. In float32, Φ(−t) = 2^−P(t) as in triton_math.py (error 4e-8).
inline Vec<float> exp2_negative(Vec<float> x) {
#if defined(__AVX512F__)
    const Vec<float> whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = x < -126.f ? Vec<float>{} - 126.f : x;
    const Vec<float> shifted = x + 12582912.f, whole = shifted - 12582912.f;  // 1.5·2^23: leaves an integer's low bits
#endif
    const Vec<float> f = x - whole;
    Vec<float> p = f * 1.327646430581808e-3f + 9.675541892647743e-3f;  // 2^f, relative error 8e-8
    p = p * f + 5.550713464617729e-2f;
    p = p * f + 2.4022120237350464e-1f;
    p = p * f + 6.931469440460205e-1f;
    p = p * f + 1.0000001192092896f;
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, whole);
#else
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;
    Vec<float> scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
#endif
}
inline Vec<float> tail(Vec<float> t) {
    Vec<float> p = t * 2.276000259371358e-06f - 3.2969448511721566e-05f;
    p = p * t + 1.5728511789347976e-04f;
    p = p * t + 2.0246472558937967e-04f;
    p = p * t - 7.142764516174793e-03f;
    p = p * t + 5.2546426653862e-02f;
    p = p * t + 0.45919305086135864f;
    p = p * t + 1.1511069536209106f;
    p = p * t + 0.9999999403953552f;
    return exp2_negative(-p);
}
inline Vec<float> density(Vec<float> t) {
    return exp2_negative(t * t * -0.7213475204444817f - 1.3257480647361592f);
}
// x ≤ 0. The polynomial is 1 + 1e-7 at 0, where a month that is alone (or weighs all) must weigh exactly 1.
inline Vec<float> exponential(Vec<float> x) {
    return x == 0 ? Vec<float>{} + 1.f : exp2_negative(x * 1.44269504f);
}
inline Vec<double> exponential(Vec<double> x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}
inline Vec<double> tail(Vec<double> t) {
    for (int i = 0; i < LANES<double>; ++i) t[i] = 0.5 * std::erfc(t[i] * M_SQRT1_2);
    return t;
}
inline Vec<double> density(Vec<double> t) {
    for (int i = 0; i < LANES<double>; ++i) t[i] = std::exp(-0.5 * t[i] * t[i]) * (0.5 * M_2_SQRTPI * M_SQRT1_2);
    return t;
}

// C[m, j] (+)= Σ_k A(m, k) · B[k, j] for m rows (a multiple of ROWS) and whole panels of columns.
// A(m, k) = a[m·a_row + k·a_col]; panel j of B starts at b + j·b_panel and has rows b_row apart.
template <typename T>
void matmul(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, int64_t b_panel, const T* bias,
            T* c, int64_t c_row, int64_t rows, int64_t depth, int64_t panels, bool add) {
    for (int64_t j = 0; j < panels; ++j) {
        for (int64_t m = 0; m < rows; m += ROWS) {
            Vec<T> left[ROWS], right[ROWS];
            T* out = c + m * c_row + j * PANEL<T>;
            for (int i = 0; i < ROWS; ++i) {
                left[i] = add ? load(out + i * c_row) : bias ? load(bias + j * PANEL<T>) : Vec<T>{};
                right[i] = add    ? load(out + i * c_row + LANES<T>)
                           : bias ? load(bias + j * PANEL<T> + LANES<T>)
                                  : Vec<T>{};
            }
            const T* pa = a + m * a_row;
            const T* pb = b + j * b_panel;
            for (int64_t k = 0; k < depth; ++k, pa += a_col, pb += b_row) {
                const Vec<T> b0 = load(pb), b1 = load(pb + LANES<T>);
                for (int i = 0; i < ROWS; ++i) {
                    left[i] += pa[i * a_row] * b0;
                    right[i] += pa[i * a_row] * b1;
                }
            }
            for (int i = 0; i < ROWS; ++i) {
                store(out + i * c_row, left[i]);
                store(out + i * c_row + LANES<T>, right[i]);
            }
        }
    }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The layer's parameters, padded, centred and packed for matmul.
template <typename T> struct Layer {
    int64_t d, dp, panels;
    T eps;
    Buffer<T> forward, backward;  // W' as panels of [in, out] and of [out, in]
    Buffer<T> bias, scale, shift, out, slope_scale;

    Layer(const T* w1, const T* b1, const T* ln_weight, const T* ln_bias, const T* w2, int64_t d_, T eps_, bool both)
        : d(d_), dp(round_up(d_, PANEL<T>)), panels(dp / PANEL<T>), eps(eps_), forward(dp * dp),
          backward(both ? dp * dp : 0), bias(dp), scale(dp), shift(dp), out(dp), slope_scale(dp) {
        std::vector<T> mean(d, 0);
        T bias_mean = 0;
        for (int64_t o = 0; o < d; ++o) {
            for (int64_t i = 0; i < d; ++i) mean[i] += w1[o * d + i];
            bias_mean += b1[o] / d;
        }
        for (int64_t i = 0; i < d; ++i) mean[i] /= d;
        for (int64_t first = 0; first < d; first += PANEL<T>) {
            const int64_t width = std::min<int64_t>(PANEL<T>, d - first);
            for (int64_t i = 0; i < d; ++i)
                for (int64_t l = 0; l < width; ++l)
                    forward[first * dp + i * PANEL<T> + l] = w1[(first + l) * d + i] - mean[i];
            for (int64_t o = 0; both && o < d; ++o)
                for (int64_t l = 0; l < width; ++l)
                    backward[first * dp + o * PANEL<T> + l] = w1[o * d + first + l] - mean[first + l];
        }
        for (int64_t o = 0; o < d; ++o) {
            bias[o] = b1[o] - bias_mean;
            scale[o] = ln_weight[o];
            shift[o] = ln_bias[o];
            out[o] = w2[o];
            slope_scale[o] = w2[o] * ln_weight[o];
        }
    }
};

struct Task { int64_t chip, first, months, pixel, count; };

template <typename T>
std::vector<Task> plan(const int32_t* segments, int64_t chips, int64_t pixels, int64_t dp, int64_t* most_rows) {
    std::vector<Task> tasks;
    *most_rows = 0;
    for (int64_t chip = 0; chip < chips; ++chip) {
        const int64_t months = segments[chip + 1] - segments[chip];
        const int64_t fit = BLOCK_BYTES / int64_t(sizeof(T)) / (dp * std::max<int64_t>(months, 1));
        const int64_t step = std::max<int64_t>(std::min(fit, pixels), 1);
        for (int64_t p = 0; p < pixels; p += step)
            tasks.push_back({chip, segments[chip], months, p, std::min(step, pixels - p)});
        *most_rows = std::max(*most_rows, round_up(months * step, std::max(ROWS, LANES<T>)));
    }
    return tasks;
}

template <typename T> void copy_rows(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t d) {
    if (from_row == d && to_row == d) std::memcpy(to, from, rows * d * sizeof(T));
    else for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_row, from + r * from_row, d * sizeof(T));
}

// A task's rows lie in one run a month: into scratch, and back.
template <typename T>
void gather(const T* from, int64_t pixels, int64_t d, const Task& task, T* to, int64_t dp) {
    for (int64_t t = 0; t < task.months; ++t)
        copy_rows(from + ((task.first + t) * pixels + task.pixel) * d, d, to + t * task.count * dp, dp, task.count, d);
}
template <typename T>
void scatter(const T* from, int64_t dp, T* to, int64_t pixels, int64_t d, const Task& task) {
    for (int64_t t = 0; t < task.months; ++t)
        copy_rows(from + t * task.count * dp, dp, to + ((task.first + t) * pixels + task.pixel) * d, d, task.count, d);
}

template <typename T> void first_layer(const Layer<T>& layer, const Task& task, const T* x, T* h) {
    matmul<T>(x, layer.dp, 1, layer.forward, PANEL<T>, layer.dp * PANEL<T>, layer.bias, h, layer.dp,
              round_up(task.months * task.count, ROWS), layer.d, layer.panels, false);
}

// One over the standard deviations of LANES rows, one a lane.
template <typename T> Vec<T> inverse_deviations(const Layer<T>& layer, const T* h) {
    Vec<T> square[LANES<T>] = {};
    for (int i = 0; i < LANES<T>; ++i)
        for (int64_t j = 0; j < layer.dp; j += LANES<T>)
            square[i] += load(h + i * layer.dp + j) * load(h + i * layer.dp + j);
    Vec<T> variance = lane_sums<T>(square) / T(layer.d) + layer.eps;
    for (int i = 0; i < LANES<T>; ++i) variance[i] = 1 / std::sqrt(variance[i]);
    return variance;
}

template <typename T>
void forward(const T* features, const int32_t* segments, int64_t images, int64_t chips, int64_t pixels,
             const Layer<T>& layer, T* pooled, T* lse, T* hidden, int threads) {
    int64_t most_rows;
    const std::vector<Task> tasks = plan<T>(segments, chips, pixels, layer.dp, &most_rows);
    const int64_t d = layer.d, dp = layer.dp, covered = segments[chips] * pixels * d;
    if (hidden) std::memset(hidden + covered, 0, (images * pixels * d - covered) * sizeof(T));
#pragma omp parallel num_threads(threads)
    {
        Buffer<T> x(most_rows * dp), h(most_rows * dp), logits(most_rows + LANES<T>), share(most_rows * LANES<T>);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < int64_t(tasks.size()); ++job) {
            const Task& task = tasks[job];
            gather(features, pixels, d, task, x.data, dp);
            first_layer<T>(layer, task, x, h);
            if (hidden) scatter<T>(h, dp, hidden, pixels, d, task);
            for (int64_t r = 0; r < task.months * task.count; r += LANES<T>) {
                const Vec<T> norm = inverse_deviations(layer, h + r * dp);
                Vec<T> logit[LANES<T>] = {};
                for (int i = 0; i < LANES<T>; ++i)
                    for (int64_t j = 0; j < dp; j += LANES<T>) {
                        const Vec<T> n = load(h + (r + i) * dp + j) * norm[i];
                        const Vec<T> u = n * load(layer.scale + j) + load(layer.shift + j), t = absolute(u);
                        const Vec<T> y = (u + t) * T(0.5) - t * tail(t);  // GELU = max(u, 0) − |u|·Φ(−|u|)
                        logit[i] += y * load(layer.out + j);
                    }
                store(logits + r, lane_sums<T>(logit));
            }
            for (int64_t p = 0; p < task.count; p += LANES<T>) {  // a pixel a lane; lanes past the end are not kept
                const int64_t width = std::min<int64_t>(LANES<T>, task.count - p);
                const int64_t at = task.chip * pixels + task.pixel + p;
                Vec<T> top = Vec<T>{} - T(INFINITY), total{};
                for (int64_t t = 0; t < task.months; ++t) {
                    const Vec<T> logit = load(logits + t * task.count + p);
                    top = logit > top ? logit : top;
                }
                for (int64_t t = 0; t < task.months; ++t) {
                    const Vec<T> e = exponential(load(logits + t * task.count + p) - top);
                    store(share + t * LANES<T>, e);
                    total += e;
                }
                for (int i = 0; i < width; ++i) {
                    const T inverse = task.months ? 1 / total[i] : 0;
                    lse[at + i] = task.months ? top[i] + std::log(total[i]) : 0;
                    for (int64_t j = 0; j < d; j += PANEL<T>) {
                        Vec<T> mean[2] = {};
                        for (int64_t t = 0; t < task.months; ++t) {
                            const T* row = x + (t * task.count + p + i) * dp + j;
                            mean[0] += share[t * LANES<T> + i] * load(row);
                            mean[1] += share[t * LANES<T> + i] * load(row + LANES<T>);
                        }
                        mean[0] *= inverse, mean[1] *= inverse;
                        std::memcpy(pooled + (at + i) * d + j, mean, std::min<int64_t>(PANEL<T>, d - j) * sizeof(T));
                    }
                }
            }
        }
    }
}

// Parameter gradients, laid out as cpu.py unpacks them: w1 [D, D], b1, ln_weight, ln_bias, w2 [D] each.
template <typename T>
void backward(const T* grad, const T* features, const int32_t* segments, const T* pooled, const T* lse, const T* hidden,
              int64_t images, int64_t chips, int64_t pixels, const Layer<T>& layer, T* grad_features, T* grad_layer, int threads) {
    int64_t most_rows;
    const std::vector<Task> tasks = plan<T>(segments, chips, pixels, layer.dp, &most_rows);
    const int64_t d = layer.d, dp = layer.dp, sums = dp * dp + 4 * dp;
    Buffer<T> partial(sums * threads);
    std::memset(grad_features + segments[chips] * pixels * d, 0, (images - segments[chips]) * pixels * d * sizeof(T));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {  // own sums and a fixed share of the tasks: the same bits each time
        Buffer<T> x(most_rows * dp), h(most_rows * dp), dx(most_rows * dp);
        Buffer<T> g(most_rows * dp), mean(most_rows), y(LANES<T> * dp), slope(LANES<T> * dp);
        T* d_weight = partial + thread * sums;
        T *d_bias = d_weight + dp * dp, *d_scale = d_bias + dp, *d_shift = d_scale + dp, *d_out = d_shift + dp;
        const int64_t begin = tasks.size() * thread / threads, end = tasks.size() * (thread + 1) / threads;
        for (int64_t job = begin; job < end; ++job) {
            const Task& task = tasks[job];
            const int64_t rows = task.months * task.count, at = task.chip * pixels + task.pixel;
            if (!rows) continue;
            if (task.months == 1) {  // its weight is 1 whatever the layer says: rounding must not give that a gradient
                copy_rows(grad + at * d, d, grad_features + (task.first * pixels + task.pixel) * d, d, task.count, d);
                continue;
            }
            gather(features, pixels, d, task, x.data, dp);
            if (hidden) gather(hidden, pixels, d, task, h.data, dp);
            else first_layer<T>(layer, task, x, h);
            copy_rows(grad + at * d, d, g.data, dp, task.count, d);
            for (int64_t p = 0; p < task.count; p += LANES<T>) {
                copy_rows(pooled + (at + p) * d, d, y.data, dp, std::min<int64_t>(LANES<T>, task.count - p), d);
                Vec<T> product[LANES<T>] = {};
                for (int i = 0; i < LANES<T>; ++i)
                    for (int64_t j = 0; j < dp; j += LANES<T>)
                        product[i] += load(g + (p + i) * dp + j) * load(y + i * dp + j);
                store(mean + p, lane_sums<T>(product));
            }
            for (int64_t r = 0, next = 0; r < rows; r += LANES<T>) {
                const Vec<T> norm = inverse_deviations(layer, h + r * dp);
                const T* g_row[LANES<T>];
                Vec<T> logit[LANES<T>] = {}, change[LANES<T>] = {}, along[LANES<T>] = {}, log_total{}, expected{};
                for (int i = 0; i < LANES<T>; ++i) {
                    g_row[i] = g + next * dp;
                    log_total[i] = r + i < rows ? lse[at + next] : T(INFINITY);  // a row past the end has no share
                    expected[i] = mean[next];
                    next = next + 1 < task.count ? next + 1 : 0;
                }
                for (int i = 0; i < LANES<T>; ++i)
                    for (int64_t j = 0; j < dp; j += LANES<T>) {
                        const Vec<T> n = load(h + (r + i) * dp + j) * norm[i];
                        const Vec<T> u = n * load(layer.scale + j) + load(layer.shift + j), t = absolute(u), q = tail(t);
                        const Vec<T> left = q - t * density(t), yj = (u + t) * T(0.5) - t * q;  // left: the slope at −t
                        const Vec<T> slope_j = u > 0 ? 1 - left : left;
                        store(y + i * dp + j, yj);
                        store(slope + i * dp + j, slope_j);
                        logit[i] += yj * load(layer.out + j);
                        change[i] += load(g_row[i] + j) * load(x + (r + i) * dp + j);
                        along[i] += slope_j * load(layer.slope_scale + j) * n;
                    }
                const Vec<T> share = exponential(lane_sums<T>(logit) - log_total);
                const Vec<T> d_logit = share * (lane_sums<T>(change) - expected);
                const Vec<T> d_normed = d_logit * norm, pull = d_normed * norm * lane_sums<T>(along) / T(d);
                for (int64_t j = 0; j < dp; j += LANES<T>) {
                    Vec<T> out = load(d_out + j), shift = load(d_shift + j), scale = load(d_scale + j);
                    Vec<T> bias = load(d_bias + j);
                    for (int i = 0; i < LANES<T>; ++i) {
                        T* row = h + (r + i) * dp + j;
                        const Vec<T> hidden_j = load(row), slope_j = load(slope + i * dp + j);
                        const Vec<T> du = d_normed[i] * slope_j;
                        const Vec<T> dh = du * load(layer.slope_scale + j) - pull[i] * hidden_j;
                        out += d_logit[i] * load(y + i * dp + j);
                        shift += d_logit[i] * slope_j;
                        scale += du * hidden_j;
                        bias += dh;
                        store(row, dh);
                        store(dx + (r + i) * dp + j, share[i] * load(g_row[i] + j));
                    }
                    store(d_out + j, out), store(d_shift + j, shift);
                    store(d_scale + j, scale), store(d_bias + j, bias);
                }
            }
            matmul<T>(h, dp, 1, layer.backward, PANEL<T>, dp * PANEL<T>, nullptr, dx, dp, round_up(rows, ROWS), d,
                      layer.panels, true);
            for (int64_t r = 0; r < rows; r += DEPTH)
                matmul<T>(h + r * dp, 1, dp, x + r * dp, dp, PANEL<T>, nullptr, d_weight, dp, dp,
                          std::min(DEPTH, rows - r), layer.panels, true);
            scatter<T>(dx, dp, grad_features, pixels, d, task);
        }
    }
    for (int thread = 1; thread < threads; ++thread)
        for (int64_t i = 0; i < sums; ++i) partial[i] += partial[thread * sums + i];
    // the way back through the centring of the first layer is the same centring
    const T *d_bias = partial + dp * dp, *vectors = d_bias + dp;
    T bias_mean = 0;
    for (int64_t o = 0; o < d; ++o) bias_mean += d_bias[o] / d;
    for (int64_t i = 0; i < d; ++i) {
        T mean = 0;
        for (int64_t o = 0; o < d; ++o) mean += partial[o * dp + i] / d;
        for (int64_t o = 0; o < d; ++o) grad_layer[o * d + i] = partial[o * dp + i] - mean;
        T* tail_of = grad_layer + d * d + i;
        tail_of[0] = d_bias[i] - bias_mean;
        tail_of[d] = vectors[i] * layer.out[i];
        tail_of[2 * d] = vectors[dp + i] * layer.out[i];
        tail_of[3 * d] = vectors[2 * dp + i];
    }
}

}  // namespace

// `hidden` may be null: the forward then keeps nothing and the backward repeats the first layer.
#define EXPORT(T)                                                                                                     \
    extern "C" void forward_##T(const T* features, const int32_t* segments, int64_t images, int64_t chips,            \
                                int64_t pixels, int64_t d, const T* w1, const T* b1, const T* ln_weight,              \
                                const T* ln_bias, const T* w2, double eps, T* pooled, T* lse, T* hidden,              \
                                int threads) {                                                                        \
        const Layer<T> layer(w1, b1, ln_weight, ln_bias, w2, d, T(eps), false);                                       \
        forward<T>(features, segments, images, chips, pixels, layer, pooled, lse, hidden, threads);                   \
    }                                                                                                                 \
    extern "C" void backward_##T(const T* grad, const T* features, const int32_t* segments, const T* pooled,          \
                                 const T* lse, const T* hidden, int64_t images, int64_t chips, int64_t pixels,        \
                                 int64_t d, const T* w1, const T* b1, const T* ln_weight, const T* ln_bias,           \
                                 const T* w2, double eps, T* grad_features, T* grad_layer, int threads) {             \
        const Layer<T> layer(w1, b1, ln_weight, ln_bias, w2, d, T(eps), true);                                        \
        backward<T>(grad, features, segments, pooled, lse, hidden, images, chips, pixels, layer, grad_features,       \
                    grad_layer, threads);                                                                             \
    }

EXPORT(float)
EXPORT(double)
