// Threads that run one function side by side, and wait for one another inside it.
//
// Of our own rather than OpenMP: PyTorch brings an OpenMP runtime, and a wheel would bring a second, each keeping threads
// awake on the cores that the other needs; and Apple's compiler brings none. A thread that waits spins for some
// microseconds, then gives its core to whoever wants it, and soon sleeps, so that a thread whose core another program has
// taken may move to this one. Nothing is pinned to a core.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace quasar {

inline double now() {  // seconds
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The part [begin, end) of `count` things that falls to one of `parts`, as even as can be.
struct Range {
    int begin, end;
    Range(int begin, int end) : begin(begin), end(end) {}
    Range(int count, int part, int parts)
        : begin(int(int64_t(count) * part / parts)), end(int(int64_t(count) * (part + 1) / parts)) {}
};

// Rows that are cut into tiles of at most `most`, as even as can be: 9 rows by 6 are 5 and 4.
class Tiles {
public:
    const int total;
    Tiles(int rows, int most) : total((rows + most - 1) / most), rows_left(rows), left(total) {}
    int next() {  // rows of the next tile
        const int rows = (rows_left + left - 1) / left;
        rows_left -= rows, left -= 1;
        return rows;
    }

private:
    int rows_left, left;
};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");  // `yield` takes no time there
#endif
}

constexpr int SPINS = 1000;  // some tens of microseconds: a step of a pass is often shorter

constexpr double PATIENCE = 2e-4;  // seconds: what lies between two passes is mostly less

// Whether it is done before long.
template <typename Done>
bool soon(Done done) {
    for (int i = 0; i < SPINS; ++i) {
        if (done()) return true;
        relax();
    }
    for (const double start = now(); now() - start < PATIENCE; std::this_thread::yield())
        if (done()) return true;
    return done();
}

// Waits for other threads, which work.
template <typename Done>
void wait_until(Done done) {
    if (soon(done)) return;
    while (!done()) {
#ifdef _WIN32
        std::this_thread::yield();  // the shortest sleep is a long one
#else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
    }
}

// Lets all threads of a team go on once all have come.
class Barrier {
public:
    explicit Barrier(int threads) : threads(threads) {}

    void wait() {
        const unsigned before = rounds.load(std::memory_order_acquire);
        if (come.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            come.store(0, std::memory_order_relaxed);
            rounds.store(before + 1, std::memory_order_release);
            return;
        }
        wait_until([&] { return rounds.load(std::memory_order_acquire) != before; });
    }

private:
    const int threads;
    alignas(64) std::atomic<int> come{0};
    alignas(64) std::atomic<unsigned> rounds{0};  // read all the time by those that wait
};

// What a function that runs in several threads knows of them.
struct Team {
    int thread, threads;
    Barrier* meeting;
    Range share(int count) const { return Range(count, thread, threads); }
    void barrier() const { meeting->wait(); }
};

// A function that a team runs. `left` counts the threads, but the caller's, that have not ended yet.
struct Job {
    void (*run)(const void* body, const Team& team);
    const void* body;
    int threads;
    Barrier* meeting;
    std::fenv_t arithmetic;  // the caller's: how it rounds, and whether it flushes denormals
    alignas(64) std::atomic<int> left;
};

// A thread that sleeps until it is given a job.
class Worker {
public:
    explicit Worker(int thread) : thread(thread) {
        std::thread([this] { work(); }).detach();
    }

    void give(Job& to_do) {
        {
            const std::lock_guard<std::mutex> held(mutex);
            job.store(&to_do, std::memory_order_release);
        }
        given.notify_one();
    }

private:
    const int thread;
    std::atomic<Job*> job{nullptr};
    std::mutex mutex;
    std::condition_variable given;

    void work() {
        while (true) {
            Job& own = *wait_for_job();
            std::fesetenv(&own.arithmetic);
            own.run(own.body, Team{thread, own.threads, own.meeting});
            job.store(nullptr, std::memory_order_relaxed);
            own.left.fetch_sub(1, std::memory_order_release);  // the job may be gone from here on
        }
    }

    Job* wait_for_job() {
        const auto has_come = [this] { return job.load(std::memory_order_acquire) != nullptr; };
        if (!soon(has_come)) {
            std::unique_lock<std::mutex> held(mutex);
            given.wait(held, has_come);
        }
        return job.load(std::memory_order_acquire);
    }
};

// The workers of this process. Never destroyed: they may sleep until the process ends.
class Pool {
public:
    static Pool& own() {
#ifndef _WIN32
        static const int watched = pthread_atfork(nullptr, nullptr, [] { kept() = new Pool; });
        (void)watched;  // a fork has its parent's memory, not its threads
#endif
        return *kept();
    }

    // Calls run one after the other: two at once would only wait for each other's cores.
    void run(Job& job) {
        const std::lock_guard<std::mutex> held(busy);
        job.threads = 1 + hire(job.threads - 1);
        Barrier meeting(job.threads);
        job.meeting = &meeting;
        job.left.store(job.threads - 1, std::memory_order_relaxed);
        for (int i = 0; i + 1 < job.threads; ++i) workers[i]->give(job);
        job.run(job.body, Team{0, job.threads, &meeting});
        wait_until([&] { return job.left.load(std::memory_order_acquire) == 0; });
    }

private:
    std::mutex busy;
    std::vector<std::unique_ptr<Worker>> workers;

    static Pool*& kept() {
        static Pool* pool = new Pool;
        return pool;
    }

    // As many workers as are wanted, or as the system gives.
    int hire(int wanted) {
        try {
            while (int(workers.size()) < wanted) workers.push_back(std::make_unique<Worker>(int(workers.size()) + 1));
        } catch (const std::system_error&) {  // no more threads: what is computed does not depend on their number
        }
        return std::min(wanted, int(workers.size()));
    }
};

// Run body(team) in so many threads at once; in fewer where the system gives no more.
template <typename Body>
void in_parallel(int threads, const Body& body) {
    Barrier alone(1);
    if (threads <= 1) return body(Team{0, 1, &alone});
    Job job{};
    job.run = [](const void* of, const Team& team) { (*static_cast<const Body*>(of))(team); };
    job.body = &body, job.threads = threads;
    std::fegetenv(&job.arithmetic);
    Pool::own().run(job);
}

// Run body(i) for each of `count` things, `chunk` of them at a time wherever a thread is free.
template <typename Body>
void for_each(int threads, int64_t count, int64_t chunk, const Body& body) {
    std::atomic<int64_t> next{0};
    in_parallel(threads, [&](const Team&) {
        for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < count;)
            for (int64_t i = begin; i < std::min(begin + chunk, count); ++i) body(i);
    });
}

}  // namespace quasar
