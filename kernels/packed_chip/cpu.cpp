// A chip of the packed form on a CPU, in one pass: LZ4 blocks → codes side by side → warp → scaled floats in the batch.
//
// A month's byte-planes, of up to 16 bands, are inflated into scratch that stays in the cache, merged to 16-bit codes
// and transposed, 16 pixels at a time, into a tile whose pixels are 16 codes: one vector each.  Every output pixel then
// is one such vector (where it lies exactly on one: upright, flipped or turned tiles) or the bilinear mean of four, in
// codes, rounded as an image operator of integers rounds; then scaled and written to its place.  The batch is written
// once, nothing else of its size is touched, and up to 16 bands of a pixel share one set of coordinates.
//
// Legend: side × side pixels a tile, a multiple of LANES; bands are taken LANES at a time.  A matrix [3, 3] maps output
// to input coordinates, in pixels with the origin at the corner of the first; only its first two rows are read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace {

constexpr int LANES = 16;  // codes of a pixel in the tile, and pixels that are transposed at once
constexpr int CHUNK = 64;  // pixels whose coordinates are computed together

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Codes __attribute__((vector_size(2 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

using Inflate = int (*)(const char* from, char* to, int size, int capacity);  // LZ4_decompress_safe

template <typename V> V load(const void* from) { V v; std::memcpy(&v, from, sizeof v); return v; }

// The first or second halves of two rows, value by value in turn
template <int FIRST, size_t... I> Codes zip(Codes a, Codes b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, ((I % 2 ? LANES : 0) + FIRST + I / 2)...);
}

// [16 bands][16 pixels] → [16 pixels][16 bands]: each round moves one bit of the row's number into the column's
void transpose(Codes (&v)[LANES]) {
    constexpr auto all = std::make_index_sequence<LANES>();
    for (int round = 0; round < 4; round++) {
        Codes w[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            w[2 * i] = zip<0>(v[i], v[i + LANES / 2], all);
            w[2 * i + 1] = zip<LANES / 2>(v[i], v[i + LANES / 2], all);
        }
        std::memcpy(v, w, sizeof w);
    }
}

// A value's byte-planes, from blocks that lie end to end.  −1, or the bad block.
int inflate_value(const uint8_t* blocks, const uint32_t* sizes, int planes, int64_t pixels, Inflate inflate,
                  uint8_t* to) {
    for (int i = 0; i < planes; i++) {
        char* plane = reinterpret_cast<char*>(to + i * pixels);
        int size = static_cast<int>(sizes[i]);
        if (inflate(reinterpret_cast<const char*>(blocks), plane, size, static_cast<int>(pixels)) != pixels) return i;
        blocks += size;
    }
    return -1;
}

// What codes mean, for each band: `mark` becomes `marked`, and a band that is not stored is `absent` everywhere.
struct Meaning { uint16_t mark, marked, absent; };

// Planes [bands, 2, pixels] → tile [pixels, LANES]
void interleave(const uint8_t* planes, const uint32_t* sizes, const Meaning* meaning, int bands, int64_t pixels,
                uint16_t* tile) {
    for (int64_t p = 0; p < pixels; p += LANES) {
        Codes v[LANES] = {};
        for (int b = 0; b < bands; b++) {
            const uint8_t* low = planes + 2 * b * pixels + p;
            if (sizes[2 * b] | sizes[2 * b + 1]) {
                Codes code = __builtin_convertvector(load<Bytes>(low), Codes)
                             | __builtin_convertvector(load<Bytes>(low + pixels), Codes) << 8;
                v[b] = code == meaning[b].mark ? Codes{} + meaning[b].marked : code;
            } else {
                v[b] = Codes{} + meaning[b].absent;
            }
        }
        transpose(v);
        std::memcpy(tile + p * LANES, v, sizeof v);
    }
}

// Where the border is crossed the image is mirrored; the edge pixel itself is not repeated.
int64_t mirror(int64_t i, int64_t side) {
    const int64_t period = std::max<int64_t>(2 * (side - 1), 1);
    i = std::abs(i) % period;
    return i < side ? i : period - i;
}

// Calls one(y, x, at) for output pixels that are the input's pixel `at`, and mean(y, x, at[4], weight[4]) for others.
template <typename One, typename Mean> void sample(const float* matrix, int64_t side, One one, Mean mean) {
    const double a = matrix[0], b = matrix[1], c = matrix[2], d = matrix[3], e = matrix[4], f = matrix[5];
    for (int64_t y = 0; y < side; y++) {
        for (int64_t start = 0; start < side; start += CHUNK) {
            int32_t column[CHUNK], row[CHUNK];
            float right[CHUNK], down[CHUNK];
            for (int i = 0; i < CHUNK; i++) {
                double ox = static_cast<double>(start + i) + 0.5, oy = static_cast<double>(y) + 0.5;
                double sx = a * ox + b * oy + c - 0.5, sy = d * ox + e * oy + f - 0.5;
                double fx = std::floor(sx), fy = std::floor(sy);
                column[i] = static_cast<int32_t>(fx), row[i] = static_cast<int32_t>(fy);
                right[i] = static_cast<float>(sx - fx), down[i] = static_cast<float>(sy - fy);
            }
            for (int64_t i = 0, x = start; i < CHUNK && x < side; i++, x++) {
                int64_t x0 = column[i], y0 = row[i], x1 = x0 + 1, y1 = y0 + 1;
                if (x0 < 0 || y0 < 0 || x1 >= side || y1 >= side) {
                    x0 = mirror(x0, side), x1 = mirror(x1, side), y0 = mirror(y0, side), y1 = mirror(y1, side);
                }
                float r = right[i], l = 1 - r, lower = down[i], upper = 1 - lower;
                if (r == 0 && lower == 0) {
                    one(y * side + x, y0 * side + x0);
                } else {
                    const int64_t at[4] = {y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1};
                    const float weight[4] = {upper * l, upper * r, lower * l, lower * r};
                    mean(y * side + x, at, weight);
                }
            }
        }
    }
}

Floats floats(const uint16_t* tile, int64_t pixel) {
    return __builtin_convertvector(__builtin_convertvector(load<Codes>(tile + pixel * LANES), Ints), Floats);
}

}  // namespace

extern "C" {

// Kept months into out [slots, side, side, bands] float32: (code − low) · scale, zeros after the last month.
// `blocks` [months, bands] is where the two planes of a band's month are stored, one after the other, and `sizes`
// [months, bands, 2] their bytes; `planes` [min(bands, LANES), 2, pixels] and `tile` [pixels, LANES] are scratch.
// Returns −1, or (month, plane) of a bad block as one number.
int64_t packed_images(const uint8_t* const* blocks, const uint32_t* sizes, int64_t months, int64_t slots, int64_t bands,
                      int64_t side, const Meaning* meaning, const float* low, const float* scale, const float* matrix,
                      Inflate inflate, uint8_t* planes, uint16_t* tile, float* out) {
    const int64_t pixels = side * side;
    for (int64_t m = 0; m < months; m++, out += pixels * bands) {
        for (int64_t first = 0; first < bands; first += LANES) {
            const int64_t count = std::min<int64_t>(LANES, bands - first), start = m * bands + first;
            for (int64_t b = 0; b < count; b++) {
                const uint32_t* size = sizes + 2 * (start + b);
                if (!(size[0] | size[1])) continue;
                int bad = inflate_value(blocks[start + b], size, 2, pixels, inflate, planes + 2 * b * pixels);
                if (bad >= 0) return 2 * (start + b) + bad;
            }
            interleave(planes, sizes + 2 * start, meaning + first, static_cast<int>(count), pixels, tile);
            Floats zero = {}, factor = {};
            for (int64_t b = 0; b < count; b++) zero[b] = low[first + b], factor[b] = scale[first + b];
            auto put = [&](int64_t pixel, Floats code) {
                Floats v = (code - zero) * factor;
                float* to = out + pixel * bands + first;
                // A whole vector is quicker to store, and what it spills the next pixels overwrite; after the last
                // there may lie another thread's chip, and beside a group of bands the one before.
                if (bands <= LANES && (pixels - pixel) * bands >= LANES) std::memcpy(to, &v, sizeof v);
                else std::memcpy(to, &v, count * sizeof(float));
            };
            sample(matrix, side, [&](int64_t pixel, int64_t at) { put(pixel, floats(tile, at)); },
                   [&](int64_t pixel, const int64_t* at, const float* weight) {
                       Floats mean = floats(tile, at[0]) * weight[0] + floats(tile, at[1]) * weight[1]
                                     + floats(tile, at[2]) * weight[2] + floats(tile, at[3]) * weight[3];
                       constexpr float whole = 12582912;  // 1.5 · 2²³: where floats are the integers
                       put(pixel, (mean + whole) - whole);
                   });
        }
    }
    std::memset(out, 0, (slots - months) * pixels * bands * sizeof(float));
    return -1;
}

// The label into out [side, side] float32, in the target's unit; `nodata` becomes NaN (NaN: nothing does).  `planes` [4, pixels] and `tile` [pixels] are scratch.
// Returns −1, or the number of a bad block.
int64_t packed_label(const uint8_t* blocks, const uint32_t* sizes, int64_t side, float nodata, const float* matrix,
                     Inflate inflate, uint8_t* planes, float* tile, float* out) {
    const int64_t pixels = side * side;
    int bad = inflate_value(blocks, sizes, 4, pixels, inflate, planes);
    if (bad >= 0) return bad;
    for (int64_t p = 0; p < pixels; p++) {
        uint32_t bits = planes[p] | planes[pixels + p] << 8 | planes[2 * pixels + p] << 16
                        | static_cast<uint32_t>(planes[3 * pixels + p]) << 24;
        float value;
        std::memcpy(&value, &bits, sizeof bits);
        tile[p] = value == nodata ? NAN : value;
    }
    sample(matrix, side, [&](int64_t pixel, int64_t at) { out[pixel] = tile[at]; },
           [&](int64_t pixel, const int64_t* at, const float* weight) {
               out[pixel] = tile[at[0]] * weight[0] + tile[at[1]] * weight[1] + tile[at[2]] * weight[2]
                            + tile[at[3]] * weight[3];
           });
    return -1;
}

}  // extern "C"
