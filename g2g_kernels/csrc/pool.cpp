#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace g2g {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// While it exists, this thread treats denormal numbers as zero. L2 penalties shrink the weights of silent neurons to
// 1e-30, and their products with small gradients are denormal. On Intel each costs 150 cycles: after six epochs of
// default training, a backward pass takes 17 times as long.
class FlushDenormals {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();

public:
    FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // of results and of operands
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    uint64_t before = read();

    static uint64_t read() {
        uint64_t mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void write(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }

public:
    FlushDenormals() { write(before | uint64_t{1} << 24); }
    ~FlushDenormals() { write(before); }
#endif
};

struct Pool {
    std::mutex busy;  // held by the caller whose job runs

    std::mutex mutex;  // guards everything below that is not atomic
    std::condition_variable wake;
    int workers = 0;             // threads started
    int wanted = 0;              // workers that may still join the open job
    int joined = 0;              // workers that have joined it
    bool open = false;
    std::atomic<uint64_t> job{0};  // counts jobs; workers spin on it before they sleep
    std::atomic<int> active{0};    // workers inside the job

    void (*run)(void*, int64_t, int) = nullptr;
    void* context = nullptr;
    int64_t tasks = 0, grain = 1;
    std::fenv_t mode;  // the caller's floating-point mode, with denormal numbers flushed
    std::atomic<int64_t> next{0};

    void work(int worker) {
        for (;;) {
            const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin >= tasks) return;
            const int64_t end = begin + grain < tasks ? begin + grain : tasks;
            for (int64_t task = begin; task < end; ++task) run(context, task, worker);
        }
    }

    void loop() {
        uint64_t seen = 0;
        for (;;) {
            for (int spin = 0; spin < 4000 && job.load(std::memory_order_acquire) == seen; ++spin) pause();
            int worker;
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return job.load(std::memory_order_relaxed) != seen; });
                seen = job.load(std::memory_order_relaxed);
                if (!open || wanted == 0) continue;
                --wanted;
                worker = ++joined;
                active.fetch_add(1, std::memory_order_relaxed);
                std::fesetenv(&mode);
            }
            work(worker);
            active.fetch_sub(1, std::memory_order_release);
        }
    }
};

std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    Pool* current = pool.load(std::memory_order_acquire);
    if (current) return *current;
    static const int registered = [] {
        // A forked child has none of the threads and perhaps a locked mutex: it starts over with a fresh pool.
        return pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
    }();
    (void)registered;
    Pool* fresh = new Pool;  // never freed: its threads run until the process ends
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
    return *current;
}

}  // namespace

void parallel_run(int threads, int64_t tasks, int64_t grain, void (*run)(void*, int64_t, int), void* context) {
    if (grain < 1) grain = 1;
    const int64_t pieces = (tasks + grain - 1) / grain;
    if (threads > pieces) threads = static_cast<int>(pieces);
    Pool* p = threads > 1 ? &the_pool() : nullptr;
    const FlushDenormals flush;
    if (!p || !p->busy.try_lock()) {
        for (int64_t task = 0; task < tasks; ++task) run(context, task, 0);
        return;
    }
    {
        std::lock_guard<std::mutex> lock(p->mutex);
        try {
            for (; p->workers < threads - 1; ++p->workers) std::thread([p] { p->loop(); }).detach();
        } catch (const std::system_error&) {
            // no more threads are available: the existing ones do the work
        }
        p->run = run, p->context = context, p->tasks = tasks, p->grain = grain;
        std::fegetenv(&p->mode);
        p->next.store(0, std::memory_order_relaxed);
        p->wanted = threads - 1, p->joined = 0, p->open = true;
        p->job.fetch_add(1, std::memory_order_release);
    }
    p->wake.notify_all();
    p->work(0);
    {
        std::lock_guard<std::mutex> lock(p->mutex);
        p->open = false;  // a worker that wakes up only now has nothing left to do
    }
    while (p->active.load(std::memory_order_acquire) != 0) pause();
    p->busy.unlock();
}

}  // namespace g2g
