// One step of StoSignSGD or SignSGD on the CPU, in one pass over parameters, gradients and states.
//
// The arithmetic of update.py, rounding.py and noise.py, operation by operation and hence with the same bits; what each
// is for is said there. native.py compiles this for one kind of update, whose choices are the macros:
//   PARAM, STATE          formats, of those below
//   SCALING               of the states: none, fixed, tensor or block
//   LONGEST_ROW           of values, and so the longest block
//   MOMENTUM, ENVELOPE    which states there are
//   STOCHASTIC, MAXIMIZE, DECAYS
//                         whether to draw noise, to ascend, and whether beta2 is less than 1
//   ROUND_STATE, ROUND_DECAYED, ROUND_PARAM
//                         whether momentum, what is left of an envelope, or parameter are rounded at random
// A tensor goes through in rows, short enough that their buffers stay in the first-level cache; every loop over a row
// is one that compilers vectorise. There must be no contraction to fused multiply-adds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr uint32_t SIGN = 1u << 31, EXPONENT = 0x7F800000;

// A gradient beyond this counts as this, so that no difference and no rounded state of finite numbers overflows.
constexpr float LARGEST_GRADIENT = 0x1p126f;

// NaN stays NaN.
float limited(float value, float limit) { return std::min(std::max(value, -limit), limit); }

// What a number is rounded to, and its bits.
template <class Bits>
struct Rounded {
    float value;
    Bits bits;
};

// How to round the magnitude of a number, in units of the spacing of the numbers around it; each for any format.
struct ToNearest {
    float operator()(float units) const { return std::rint(units); }
    uint32_t bfloat16(uint32_t size) const { return size + 0x7FFF + (size >> 16 & 1); }
};

struct Up {
    float operator()(float units) const { return std::ceil(units); }
    uint32_t bfloat16(uint32_t size) const { return size + 0xFFFF; }
};

struct AtRandom {
    uint32_t noise;

    float operator()(float units) const {
        const float lower = std::floor(units), fraction = float(int32_t(noise >> 8)) * 0x1p-24f;
        return lower + (fraction < units - lower ? 1.0f : 0.0f);
    }
    uint32_t bfloat16(uint32_t size) const { return size + 0xFFFF - (noise >> 16); }
};

// What is known of a number: a parameter's or momentum's sign is kept, an envelope has none.
enum class Kind { number, size };

// Formats. Beyond the range, `rounded` gives the largest number; NaN stays NaN.

struct Float32 {
    using Stored = float;
    static constexpr bool narrow = false;
    static constexpr uint32_t largest = 0x7F7FFFFF;
    static float magnitude(float stored) { return std::fabs(stored); }
    static bool exceeds(float size, float other) { return size > other || size != size; }  // NaN does
    template <Kind = Kind::number>
    static float decode(float stored) { return stored; }
    template <Kind = Kind::number, class Round>
    static Rounded<float> rounded(float value, Round) { return {value, value}; }
};

struct BFloat16 {
    using Stored = uint16_t;
    static constexpr bool narrow = true;
    static constexpr uint32_t largest = 0x7F7F0000;  // as float32
    static Stored magnitude(Stored stored) { return stored & 0x7FFF; }
    static bool exceeds(Stored size, Stored other) { return size > other; }
    template <Kind = Kind::number>
    static float decode(Stored stored) { return from_bits(uint32_t(stored) << 16); }

    template <Kind = Kind::number, class Round>
    static Rounded<Stored> rounded(float value, Round round) {
        const uint32_t size = to_bits(value) & ~SIGN;
        const uint32_t number = round.bfloat16(std::min(size, largest));
        const uint32_t bits = (size > EXPONENT ? 0x7FC00000 : number & 0xFFFF0000) | (to_bits(value) & SIGN);
        return {from_bits(bits), Stored(bits >> 16)};
    }
};

// MANTISSA bits, the exponent's BIAS, and the bits of the largest number, above which are inf or NaN.
template <class Bits, int MANTISSA, int BIAS, uint32_t LARGEST>
struct Narrow {
    using Stored = Bits;
    static constexpr bool narrow = true;
    static constexpr int dropped = 23 - MANTISSA, width = 8 * sizeof(Bits);
    static constexpr uint32_t sign = 1u << (width - 1), nan = sign - 1, infinity = LARGEST + 1;  // or NaN
    static constexpr uint32_t smallest_normal = (128 - BIAS) << 23;                              // as float32
    static constexpr uint32_t largest = (LARGEST << dropped) + ((127 - BIAS) << 23);

    static Stored magnitude(Stored stored) { return stored & (sign - 1); }
    static bool exceeds(Stored size, Stored other) { return size > other; }

    template <Kind kind = Kind::number>
    static float decode(Stored stored) {
        constexpr uint32_t exponent = 127 - BIAS, missing = 255 - exponent - (infinity >> MANTISSA);
        const uint32_t size = magnitude(stored);
        const uint32_t bits = (size << dropped) + (exponent << 23);
        // A number with these bits but a leading one, which subnormal numbers lack.
        const float with_one = from_bits(size > LARGEST ? bits + (missing << 23) : bits);
        const uint32_t too_much = to_bits(from_bits(smallest_normal) - with_one);
        const float value = with_one - from_bits(std::max(int32_t(too_much), 0));  // negative: has no subnormal's bits
        return kind == Kind::size ? value : from_bits(to_bits(value) | uint32_t(stored & sign) << (32 - width));
    }

    template <Kind kind = Kind::number, class Round>
    static Rounded<Stored> rounded(float value, Round round) {
        const uint32_t sign_of_value = kind == Kind::size ? 0 : to_bits(value) & SIGN;
        const uint32_t size = kind == Kind::size ? to_bits(value) : to_bits(value) & ~SIGN;
        const uint32_t limited = std::min(size, largest);
        const uint32_t binade = std::max(limited & EXPONENT, smallest_normal);
        const uint32_t spacing = binade - (MANTISSA << 23);
        const float units = round(from_bits(limited) * from_bits((254u << 23) - spacing));
        const uint32_t number = to_bits(units * from_bits(spacing));
        const uint32_t bits = uint32_t(int32_t(units)) + (binade >> dropped) - ((128 - BIAS) << MANTISSA);
        const bool is_nan = size > EXPONENT;
        return {from_bits((is_nan ? 0x7FC00000 : number) | sign_of_value),
                Stored((is_nan ? nan : bits) | sign_of_value >> (32 - width))};
    }
};

using Float16 = Narrow<uint16_t, 10, 15, 0x7BFF>;
using Float8E4M3 = Narrow<uint8_t, 3, 7, 0x7E>;
using Float8E5M2 = Narrow<uint8_t, 2, 15, 0x7B>;

using Param = PARAM;
using State = STATE;
enum class Scaling { none, fixed, tensor, block };
constexpr Scaling scaling = Scaling::SCALING;
constexpr bool scaled = scaling != Scaling::none;
constexpr bool only_rises = !DECAYS && !scaled;  // the envelope

// Whether to write only those envelopes that rise, since what is not written need not go back to memory: of a small
// GPT's cache lines one in 60 has such an envelope in the 50th step, one in 250 in the 200th. It needs masked stores.
#if defined(__AVX512BW__)
constexpr bool only_risen = true;
#elif defined(__AVX__)
constexpr bool only_risen = !State::narrow;
#else
constexpr bool only_risen = false;
#endif

constexpr int LONGEST = LONGEST_ROW;
constexpr uint32_t WEYL = 0x9E3779B1;

// The Weyl sequence of a row: loading it is cheaper than multiplying.
struct Sequence {
    uint32_t values[LONGEST];
    constexpr Sequence() : values() {
        for (int i = 0; i < LONGEST; ++i) values[i] = uint32_t(i) * WEYL;
    }
};
constexpr Sequence sequence;

struct Noise {
    uint32_t origin, key;

    Noise from(int64_t index) const { return {origin + uint32_t(index) * WEYL, key}; }
    uint32_t bits(int i) const {
        uint32_t x = origin + sequence.values[i];
        x ^= x >> 16;
        x = x * 0x7FEB352D ^ key;
        x ^= x >> 15;
        return x * 0x846CA68B;
    }
    float uniform(int i) const { return float(int32_t((bits(i) & ~0xFFu) | 0x80)) * 0x1p-31f; }
};

struct Stored {
    State::Stored *values;
    float *scale;            // of a block each, or of the tensor
    const float *new_scale;  // of the tensor
};

struct Run {  // consecutive values of a parameter
    Param::Stored *param;
    const Param::Stored *grad;
    int64_t numel;
    Stored exp_avg, exp_inf;
    Noise update, round_state, round_param, round_envelope;
};
static_assert(sizeof(Run) == 13 * 8, "native.py fills it with 64-bit words");

struct Constants {
    float lr, decay, weight, beta2, fixed_scale;
    int32_t row;  // values
};

// Multiplied with: what is read, what is to be stored, what was stored.
struct Factors {
    float read, write, back;
};

Factors factors(const Stored &state, const Constants &constants) {
    if (state.values == nullptr) return {1, 1, 1};
    if (scaling == Scaling::fixed) return {1 / constants.fixed_scale, constants.fixed_scale, 1 / constants.fixed_scale};
    if (scaling == Scaling::tensor) return {*state.scale, 1 / *state.new_scale, *state.new_scale};
    return {1, 1, 1};
}

float power_of_two_scale(float amax) {
    const float ratio = amax / from_bits(State::largest);
    const uint32_t bits = to_bits(ratio);
    const uint32_t exponent = (bits >> 23) + ((bits & ~EXPONENT) != 0);
    return ratio == 0 ? 1 : from_bits(std::min(exponent, 254u) << 23);
}

// The scale of a block of n values >= 0 or of their magnitudes.
void rescale(const float *values, int n, float *scale, Factors &factors) {
    uint32_t largest = 0;
    #pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; ++i) largest = std::max(largest, to_bits(values[i]) & ~SIGN);
    *scale = factors.back = power_of_two_scale(from_bits(largest));
    factors.write = 1 / factors.back;
}

// The larger of two numbers >= 0, NaN if one is.
float larger(float a, float b) { return from_bits(std::max(to_bits(a), to_bits(b))); }

float momentum(float m, float grad, const Constants &constants) {
    grad = limited(grad, LARGEST_GRADIENT);
    return m + ((MAXIMIZE ? -grad : grad) - m) * constants.weight;
}

// A row's momenta.
struct MomentumRow {
    const Param::Stored *grad;
    State::Stored *stored;
    Factors factors;
    Noise noise;
    const Constants &constants;

    // m_t before it is stored
    float next(int i) const {
        const float before = State::decode(stored[i]);
        return momentum(scaled ? before * factors.read : before, Param::decode(grad[i]), constants);
    }
    // Stores it and returns it as stored.
    float store(float value, int i) const {
        if (scaled) value *= factors.write;
        const auto rounded = [&] {
            if constexpr (ROUND_STATE) return State::rounded(value, AtRandom{noise.bits(i)});
            else return State::rounded(value, ToNearest());
        }();
        stored[i] = rounded.bits;
        return scaled ? rounded.value * factors.back : rounded.value;
    }
};

// A row's envelopes.
struct EnvelopeRow {
    State::Stored *stored;
    Factors factors;
    Noise noise;
    const Constants &constants;

    // beta2 G_{t-1}
    float decayed(int i) const {
        const float before = State::template decode<Kind::size>(stored[i]);
        return (scaled ? before * factors.read : before) * constants.beta2;
    }
    // Stores G_t = max(beta2 G_{t-1}, |m_t|) and returns it as stored.
    float store(float value, float at_least, int i) const {
        if (scaled) value *= factors.write, at_least *= factors.write;
        auto rounded = State::template rounded<Kind::size>(larger(value, at_least), Up());
        if constexpr (ROUND_DECAYED && State::narrow) {
            // What is left of a decay is rounded at random: up would undo it.
            const auto random = State::template rounded<Kind::size>(value, AtRandom{noise.bits(i)});
            rounded = State::template rounded<Kind::size>(at_least, Up());
            rounded = {larger(random.value, rounded.value), std::max(random.bits, rounded.bits)};
        }
        stored[i] = rounded.bits;
        return scaled ? rounded.value * factors.back : rounded.value;
    }
    // The same without decay, for an m_t that is a number of the format already.
    float raise(State::Stored of_m, int i) const {
        const State::Stored size = State::magnitude(of_m), before = stored[i];
        const bool rises = State::exceeds(size, before);
        if constexpr (only_risen) {
            if (rises) stored[i] = size;
        } else {
            stored[i] = rises ? size : before;
        }
        return State::template decode<Kind::size>(rises ? size : before);
    }
};

// value - step * sign(direction)
float stepped(float value, float step, float direction) {
    const float signed_step = from_bits(to_bits(step) ^ (to_bits(direction) & SIGN));
    return direction < 0 || direction > 0 ? value - signed_step : value;
}

// A row's parameters.
struct ParamRow {
    Param::Stored *param;
    const Param::Stored *grad;
    Noise noise, rounding;
    const Constants &constants;

    void step(float m, float G, int i) const {
        float value = Param::decode(param[i]) * constants.decay;
        if constexpr (STOCHASTIC) {
            value = stepped(value, constants.lr, noise.uniform(i) * G + m);
        } else if constexpr (ENVELOPE) {
            value -= (G == 0 ? 0 : m / G) * constants.lr;
        } else {
            value = stepped(value, constants.lr, MOMENTUM ? m : (MAXIMIZE ? -1 : 1) * Param::decode(grad[i]));
        }
        if constexpr (ROUND_PARAM) {
            param[i] = Param::rounded(value, AtRandom{rounding.bits(i)}).bits;
        } else if constexpr (Param::narrow) {
            param[i] = Param::rounded(value, ToNearest()).bits;
        } else {
            param[i] = value;
        }
    }
};

// Brings float32 parameters that overflowed back to the largest number.
void saturate(Param::Stored *param, int n) {
    if constexpr (!Param::narrow) {
        for (int i = 0; i < n; ++i) param[i] = limited(param[i], from_bits(Param::largest));
    }
}

void update_row(const Run &run, int64_t at, int n, const Constants &constants) {
    const Param::Stored *grad = run.grad + at;
    State::Stored *const exp_avg = run.exp_avg.values + at;
    MomentumRow momentum = {grad, exp_avg, factors(run.exp_avg, constants), run.round_state.from(at), constants};
    EnvelopeRow envelope = {run.exp_inf.values + at, factors(run.exp_inf, constants), run.round_envelope.from(at),
                            constants};
    const ParamRow param = {run.param + at, grad, run.update.from(at), run.round_param.from(at), constants};

    if constexpr (ENVELOPE && only_rises && !State::narrow) {
        #pragma omp simd
        for (int i = 0; i < n; ++i) {
            const float m = momentum.store(momentum.next(i), i);
            param.step(m, envelope.raise(m, i), i);
        }
        return;
    }
    // Else the states' numbers wait in the first-level cache: one loop would need more registers than there are.
    alignas(64) float m[LONGEST], G[LONGEST];
    if constexpr (MOMENTUM && scaling == Scaling::block) {
        float *scale = run.exp_avg.scale + at / constants.row;
        momentum.factors.read = *scale;
        #pragma omp simd
        for (int i = 0; i < n; ++i) m[i] = momentum.next(i);
        rescale(m, n, scale, momentum.factors);
        #pragma omp simd
        for (int i = 0; i < n; ++i) m[i] = momentum.store(m[i], i);
    } else if constexpr (MOMENTUM) {
        #pragma omp simd
        for (int i = 0; i < n; ++i) m[i] = momentum.store(momentum.next(i), i);
    }
    if constexpr (ENVELOPE && scaling == Scaling::block) {
        float *scale = run.exp_inf.scale + at / constants.row;
        envelope.factors.read = *scale;
        float largest[LONGEST];
        #pragma omp simd
        for (int i = 0; i < n; ++i) {
            G[i] = envelope.decayed(i);
            largest[i] = larger(std::fabs(m[i]), G[i]);
        }
        rescale(largest, n, scale, envelope.factors);
        #pragma omp simd
        for (int i = 0; i < n; ++i) G[i] = envelope.store(G[i], std::fabs(m[i]), i);
    } else if constexpr (ENVELOPE && only_rises) {
        #pragma omp simd
        for (int i = 0; i < n; ++i) G[i] = envelope.raise(exp_avg[i], i);
    } else if constexpr (ENVELOPE) {
        #pragma omp simd
        for (int i = 0; i < n; ++i) G[i] = envelope.store(envelope.decayed(i), std::fabs(m[i]), i);
    }
    #pragma omp simd
    for (int i = 0; i < n; ++i) param.step(m[i], G[i], i);
}

// The largest |m_t| before it is stored and the largest beta2 G_{t-1} of n values.
void find_largest(const Run &run, int64_t at, int n, const Constants &constants, float &of_m, float &of_G) {
    const Param::Stored *grad = run.grad + at;
    const State::Stored *stored = run.exp_avg.values + at;
    const float scale = *run.exp_avg.scale;
    uint32_t m = 0;
    #pragma omp simd reduction(max : m)
    for (int i = 0; i < n; ++i) {
        const float g = Param::decode(grad[i]);
        const uint32_t next = to_bits(momentum(State::decode(stored[i]) * scale, g, constants)) & ~SIGN;
        const uint32_t size = to_bits(g) & ~SIGN;
        m = std::max(m, size < EXPONENT ? next : size);  // inf and NaN in a gradient are found by the way
    }
    of_m = larger(of_m, from_bits(m));
    if constexpr (ENVELOPE) {
        const State::Stored *envelope = run.exp_inf.values + at;
        State::Stored G = 0;
        #pragma omp simd reduction(max : G)
        for (int i = 0; i < n; ++i) {
            const State::Stored size = State::magnitude(envelope[i]);
            G = size > G ? size : G;
        }
        of_G = larger(of_G, State::decode(G) * *run.exp_inf.scale * constants.beta2);
    }
}

struct Update {
    const Run *runs;
    Constants constants;

    void visit(int64_t run, int64_t at, int64_t n) const {
        update_row(runs[run], at, int(n), constants);
        // With a smaller step, not even the largest number moves.
        if (constants.lr >= 0x1p100f || std::fabs(constants.decay) > 1) saturate(runs[run].param + at, int(n));
    }
    void finish(int64_t) const {}
};

struct Largest {
    const Run *runs;
    Constants constants;
    float (*found)[2];  // of m and of G, for each run; 0 at first
    float m = 0, G = 0;

    void visit(int64_t run, int64_t at, int64_t n) { find_largest(runs[run], at, int(n), constants, m, G); }
    void finish(int64_t run) {
        #pragma omp critical
        {
            found[run][0] = larger(found[run][0], m);
            found[run][1] = larger(found[run][1], G);
        }
        m = G = 0;
    }
};

}  // namespace

extern "C" void update(const Run *runs, int64_t count, const Constants *constants, int threads) {
    const auto numel = [=](int64_t run) { return runs[run].numel; };
    for_rows(numel, count, constants->row, threads, Update{runs, *constants});
}

extern "C" void largest(const Run *runs, int64_t count, const Constants *constants, int threads, float (*found)[2]) {
    const auto numel = [=](int64_t run) { return runs[run].numel; };
    for_rows(numel, count, constants->row, threads, Largest{runs, *constants, found});
}
