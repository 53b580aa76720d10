#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
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

// While it exists, this thread treats denormal numbers as zero (PERFORMANCE.md).
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

using Clock = std::chrono::steady_clock;

// Threads that share the tasks of one loop after another: our own, which wait for work until the process ends, or those
// that the OpenMP runtime lends for one call (with_team()).
struct Team {
    std::mutex busy;              // held by the caller whose loop or call runs; guards the next two
    Clock::time_point own_until;  // calls run on our own threads until then, because OpenMP's came late
    int next_times = 1;           // of a wait: the time for which they do so after the next one

    std::mutex mutex;  // guards everything below that is not atomic
    std::condition_variable wake;
    int workers = 0;             // threads of our own
    int wanted = 0;              // workers that may still join the open job
    int joined = 0;              // workers that have joined it
    bool open = false;           // the job may be joined
    bool closed = true;          // borrowed workers leave
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

    // What a worker does: one job after the other, from the one after `seen`. A borrowed one does so until the call ends.
    void loop(uint64_t seen, bool borrowed) {
        for (;;) {
            for (int spin = 0; spin < 4000 && job.load(std::memory_order_acquire) == seen; ++spin) pause();
            int worker;
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return job.load(std::memory_order_relaxed) != seen || (borrowed && closed); });
                if (borrowed && closed) return;
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

    void hire(int count) {
        try {
            for (; workers < count; ++workers) std::thread([this] { loop(0, false); }).detach();
        } catch (const std::system_error&) {
            // no more threads are available: the existing ones do the work
        }
    }
};

std::atomic<Team*> team{nullptr};
std::atomic<GompParallel> openmp{nullptr};
std::atomic<double> most_waiting{0};
thread_local bool leads = false;  // this thread is the caller whose call OpenMP's threads serve
thread_local bool alone = false;  // its call is too small for them

Team& the_team() {
    Team* current = team.load(std::memory_order_acquire);
    if (current) return *current;
    [[maybe_unused]] static const int registered = [] {
        // A forked child has none of the threads, neither ours nor those of OpenMP, and perhaps a locked mutex: it starts
        // over with threads of our own.
        return pthread_atfork(nullptr, nullptr, [] {
            team.store(nullptr, std::memory_order_release);
            openmp.store(nullptr, std::memory_order_release);
            leads = alone = false;
        });
    }();
    Team* fresh = new Team;  // never freed: its threads run until the process ends
    if (team.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
    return *current;
}

// A call that OpenMP's threads serve.
struct Call {
    Team* team;
    std::thread::id caller;
    uint64_t first;  // jobs before the call
    void (*body)(void*);
    void* context;
    Clock::time_point closed;

    // What every thread of the team runs.
    static void member(void* call) {
        Call& self = *static_cast<Call*>(call);
        if (std::this_thread::get_id() == self.caller) return self.lead();
        std::fenv_t own;  // PyTorch's loops run on this thread too
        std::fegetenv(&own);
        self.team->loop(self.first, true);
        std::fesetenv(&own);
    }

    void lead() {
        body(context);
        closed = Clock::now();
        {
            std::lock_guard<std::mutex> lock(team->mutex);
            team->closed = true;
            team->job.fetch_add(1, std::memory_order_release);  // ends the spinning
        }
        team->wake.notify_all();
    }
};

}  // namespace

void use_openmp(GompParallel parallel, double share) {
    Team& t = the_team();  // forked children must know
    std::lock_guard<std::mutex> lock(t.busy);
    t.own_until = {}, t.next_times = 1;
    most_waiting.store(share, std::memory_order_relaxed);
    openmp.store(parallel, std::memory_order_release);
}

void with_team(int threads, void (*body)(void*), void* context) {
    const GompParallel parallel = leads ? nullptr : openmp.load(std::memory_order_acquire);
    if (!parallel) return body(context);
    if (threads < 2) {
        alone = true;
        body(context);
        alone = false;
        return;
    }
    Team& t = the_team();
    if (!t.busy.try_lock()) return body(context);
    const Clock::time_point begin = Clock::now();
    if (begin < t.own_until) {
        t.busy.unlock();
        return body(context);
    }
    leads = true;
    t.closed = false;
    Call call{&t, std::this_thread::get_id(), t.job.load(std::memory_order_relaxed), body, context, begin};
    parallel(Call::member, &call, static_cast<unsigned>(threads), 0);
    leads = false;
    const Clock::time_point end = Clock::now();
    const Clock::duration waited = end - call.closed;
    const bool late = waited > (call.closed - begin) * most_waiting.load(std::memory_order_relaxed);
    if (late) t.own_until = end + std::min<Clock::duration>(t.next_times * waited, std::chrono::seconds(2));
    t.next_times = late ? std::min(2 * t.next_times, 64) : std::max(t.next_times / 2, 1);
    t.busy.unlock();
}

void parallel_run(int threads, int64_t tasks, int64_t grain, void (*run)(void*, int64_t, int), void* context) {
    if (grain < 1) grain = 1;
    const int64_t pieces = (tasks + grain - 1) / grain;
    if (threads > pieces) threads = static_cast<int>(pieces);
    const bool own = !leads;
    Team* t = threads > 1 && !alone ? &the_team() : nullptr;
    const FlushDenormals flush;
    if (!t || (own && !t->busy.try_lock())) {
        for (int64_t task = 0; task < tasks; ++task) run(context, task, 0);
        return;
    }
    {
        std::lock_guard<std::mutex> lock(t->mutex);
        if (own) t->hire(threads - 1);
        t->run = run, t->context = context, t->tasks = tasks, t->grain = grain;
        std::fegetenv(&t->mode);
        t->next.store(0, std::memory_order_relaxed);
        t->wanted = threads - 1, t->joined = 0, t->open = true;
        t->job.fetch_add(1, std::memory_order_release);
    }
    t->wake.notify_all();
    t->work(0);
    {
        std::lock_guard<std::mutex> lock(t->mutex);
        t->open = false;  // a worker that wakes up only now has nothing left to do
    }
    while (t->active.load(std::memory_order_acquire) != 0) pause();
    if (own) t->busy.unlock();
}

}  // namespace g2g
