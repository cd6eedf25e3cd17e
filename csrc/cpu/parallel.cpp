// The helper threads behind parallel.h.
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define LUTGEMM_POSIX 1
#else
#define LUTGEMM_POSIX 0
#endif

namespace lutgemm {
namespace {

// How long a helper stays awake for the next call: the next layer of a model comes within it, and waking a thread takes
// some 15 to 30 us. At first it holds its CPU, since who gives way to a busy program may not be back for 4 ms; then it
// does. The caller waits for the last items in the same way.
constexpr std::chrono::microseconds kHolding{30}, kAwake{100};

struct Task {
  Task(ItemBody body, const void* context, int64_t count) : body(body), context(context), count(count) {}

  ItemBody body;
  const void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() {
    for (int64_t item = next++; item < count; item = next++) {
      try {
        body(context, item);
      } catch (...) {
        next = count;
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
};

class Helpers {
 public:
  // Runs `task` to its end; false when the helpers are at work for somebody else.
  bool run(Task& task, int helpers) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start(helpers);
      task_ = &task;
      free_places_ = helpers;
      ++calls_;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    task.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      task_ = nullptr;
    }
    const auto start = std::chrono::steady_clock::now();
    while (inside_ > 0 && std::chrono::steady_clock::now() - start < kHolding) {
    }
    if (inside_ > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      left_.wait(lock, [&] { return inside_ == 0; });
    }
    return true;
  }

 private:
  void start(int helpers) {
    for (; started_ < helpers; ++started_) {
      try {
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        return;  // the system grants no more threads: the work is done with those there are
      }
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    uint64_t seen = 0;
    for (;;) {
      wake_.wait(lock, [&] { return calls_ != seen; });
      // Awake: also one that came too late for this call stays, to be in time for the next.
      while (calls_ != seen) {
        seen = calls_;
        if (task_ != nullptr && free_places_ > 0) {
          --free_places_;
          ++inside_;
          Task* task = task_;
          lock.unlock();
          task->work();
          lock.lock();
          if (--inside_ == 0) left_.notify_one();
        }
        lock.unlock();
        const auto start = std::chrono::steady_clock::now();
        for (auto now = start; calls_ == seen && now - start < kAwake; now = std::chrono::steady_clock::now()) {
          if (now - start > kHolding) std::this_thread::yield();
        }
        lock.lock();
      }
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, left_;
  Task* task_ = nullptr;
  std::atomic<uint64_t> calls_{0};
  std::atomic<int> inside_{0};
  int free_places_ = 0, started_ = 0;
};

// Never destroyed: helpers sleep on it until the process ends. A forked child has none of the threads and makes its
// own.
std::atomic<Helpers*> the_helpers{nullptr};

Helpers& helpers() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_helpers = new Helpers;
#if LUTGEMM_POSIX
    pthread_atfork(nullptr, nullptr, [] { the_helpers = new Helpers; });
#endif
  });
  return *the_helpers;
}

}  // namespace

void run_items(int64_t count, int threads, ItemBody body, const void* context) {
  Task task(body, context, count);
  const int64_t most = count < threads ? count : threads;
  if (!helpers().run(task, int(most) - 1)) task.work();
  if (task.error) std::rethrow_exception(task.error);
}

}  // namespace lutgemm
