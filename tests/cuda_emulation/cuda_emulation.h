// SPDX-License-Identifier: Apache-2.0
// Lets a C++ compiler build the .cu files as they are and run them, one block after another. Each thread of a
// block is a fiber, so that barriers and warp shuffles mean what they mean on a GPU; threads that do not meet
// where they should are reported as an error.
#pragma once
// The C++ headers of math and memory would take longer to read than all else takes to compile.
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#define OF_FLOAT_AND_DOUBLE(name) \
    static inline float name##f(float v) { return __builtin_##name##f(v); } \
    static inline float name(float v) { return __builtin_##name##f(v); } \
    static inline double name(double v) { return __builtin_##name(v); }
OF_FLOAT_AND_DOUBLE(fabs)
OF_FLOAT_AND_DOUBLE(exp)
OF_FLOAT_AND_DOUBLE(expm1)
OF_FLOAT_AND_DOUBLE(log1p)
OF_FLOAT_AND_DOUBLE(tanh)
OF_FLOAT_AND_DOUBLE(sqrt)
static inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
static inline double fmax(double a, double b) { return __builtin_fmax(a, b); }

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 { unsigned x, y, z; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum Failure { none = 0, wrong_arguments = 1, misaligned = 2, deadlock = 3, lanes_missing = 4, too_many_threads = 5 };
enum State { ready, at_barrier, at_shuffle, done };
constexpr int max_threads = 1024, warp = 32, stack_bytes = 96 * 1024;

struct Fiber {
    ucontext_t start;
    jmp_buf where;
    bool started;
    State state;
    dim3 index;
    int turn;  // which of the two exchange buffers the next shuffle writes
};
static Fiber* fibers;
static jmp_buf scheduler;
static int current, failure;
static double exchange[2][max_threads];

struct Job { virtual void run() {} };
static Job* job;

static inline void check_alignment(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) failure = misaligned;
}

static void pause_as(State state) {
    fibers[current].state = state;
    if (!_setjmp(fibers[current].where)) _longjmp(scheduler, 1);
}

static void fiber_main() {
    for (;;) {
        job->run();
        pause_as(done);
    }
}

static void resume(int i) {
    current = i;
    threadIdx = fibers[i].index;
    if (_setjmp(scheduler)) return;
    if (fibers[i].started) _longjmp(fibers[i].where, 1);
    fibers[i].started = true;
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack.ss_sp = __builtin_malloc(stack_bytes);
    fibers[i].start.uc_stack.ss_size = stack_bytes;
    fibers[i].start.uc_link = nullptr;
    makecontext(&fibers[i].start, fiber_main, 0);
    setcontext(&fibers[i].start);
}

static int count(int from, int to, State state) {
    int n = 0;
    for (int i = from; i < to; i++) n += fibers[i].state == state;
    return n;
}

static void wake(int from, int to) {
    for (int i = from; i < to; i++)
        if (fibers[i].state != done) fibers[i].state = ready;
}

// Lets those go on who have met; false if nobody has.
static bool release(int threads) {
    bool any = false;
    for (int w = 0; w < threads; w += warp) {
        const int end = w + warp < threads ? w + warp : threads, there = count(w, end, at_shuffle);
        if (there == 0) continue;
        if (count(w, end, done)) failure = lanes_missing;
        if (there == end - w) { wake(w, end); any = true; }
    }
    const int finished = count(0, threads, done);
    if (finished < threads && count(0, threads, at_barrier) == threads - finished) {
        wake(0, threads);
        any = true;
    }
    return any;
}

static void run_block(int threads) {
    for (int i = 0; i < threads; i++) {
        fibers[i].state = ready;
        fibers[i].turn = 0;
        fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    }
    while (failure == none) {
        for (int i = 0; i < threads; i++)
            if (fibers[i].state == ready) resume(i);
        if (count(0, threads, done) == threads) return;
        if (!release(threads)) failure = deadlock;
    }
}

static void abandon() {  // fibers of a failed run are in the middle of it
    __builtin_free(fibers);
    fibers = nullptr;
}

static int run_grid(Job* work, const unsigned* grid, const unsigned* block) {
    const int threads = block[0] * block[1] * block[2];
    if (threads > max_threads) return too_many_threads;
    if (!fibers) fibers = static_cast<Fiber*>(__builtin_calloc(max_threads, sizeof(Fiber)));
    job = work;
    failure = none;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0] && failure == none; x++) {
                blockIdx = {x, y, z};
                run_block(threads);
            }
    if (failure != none) abandon();
    return failure;
}

// Arguments arrive as 64-bit words with a letter each for what they are: p pointer, i integer, d double.
template <class A> struct Letter { static constexpr char value = '?'; };
template <class A> struct Letter<A*> { static constexpr char value = 'p'; };
template <class A> struct Letter<A* __restrict__> { static constexpr char value = 'p'; };
template <> struct Letter<long long> { static constexpr char value = 'i'; };
template <> struct Letter<double> { static constexpr char value = 'd'; };

template <class A> A as(const uint64_t& word) {
    static_assert(sizeof(A) == sizeof(word), "kernels take pointers, long long and double only");
    A value;
    memcpy(&value, &word, sizeof(value));
    return value;
}

template <int... I> struct Numbers {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { using type = Numbers<I...>; };

template <class... A> struct Call : Job {
    void (*kernel)(A...);
    const uint64_t* words;
    template <int... I> void spread(Numbers<I...>) { kernel(as<A>(words[I])...); }
    void run() override { spread(typename Count<sizeof...(A)>::type()); }
};

template <class... A>
int launch(void (*kernel)(A...), const uint64_t* words, const char* letters, const unsigned* grid, const unsigned* block) {
    const char expected[] = {Letter<A>::value..., 0};
    if (strcmp(letters, expected)) return wrong_arguments;
    Call<A...> call;
    call.kernel = kernel;
    call.words = words;
    return run_grid(&call, grid, block);
}

}  // namespace emulation

static inline void __syncthreads() { emulation::pause_as(emulation::at_barrier); }

template <class V> V __shfl_xor_sync(unsigned mask, V value, int offset) {
    using namespace emulation;
    const int own = current, turn = fibers[own].turn;
    if (mask != 0xffffffffu) failure = lanes_missing;
    exchange[turn][own] = value;
    fibers[own].turn = 1 - turn;
    pause_as(at_shuffle);
    return V(exchange[turn][own ^ offset]);
}

// Words of 8 and 16 bytes that notice when memory is read (copied from) or written (assigned to) at another address
// than a GPU allows.
template <int SIZE> struct Aligned {
    unsigned parts[SIZE / 4];
    Aligned() = default;
    Aligned(const Aligned& memory) {
        emulation::check_alignment(&memory, SIZE);
        memcpy(parts, memory.parts, SIZE);
    }
    Aligned& operator=(const Aligned& other) {
        emulation::check_alignment(this, SIZE);
        memcpy(parts, other.parts, SIZE);
        return *this;
    }
};
typedef Aligned<8> uint2;
typedef Aligned<16> uint4;
