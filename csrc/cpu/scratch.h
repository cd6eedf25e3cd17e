// Working memory: 64-byte aligned and uninitialised, owned by one call or kept by a thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace lutgemm {

template <class T>
struct AlignedDelete {
  void operator()(T* data) const { ::operator delete[](data, std::align_val_t(64)); }
};
template <class T>
using Scratch = std::unique_ptr<T[], AlignedDelete<T>>;
template <class T>
Scratch<T> make_scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new[](size_t(count > 0 ? count : 1) * sizeof(T), std::align_val_t(64))));
}

// Memory of a thread that is kept from call to call: fresh pages would be cleared by the system each time, which takes
// longer than building the 128 KiB of tables of one token, and as long as a small layer. What is above kMostKept is not
// kept.
class ThreadScratch {
 public:
  static constexpr int64_t kMostKept = int64_t(8) << 20;

  // Valid until the next call; `large` holds it when it is not kept.
  uint8_t* get(int64_t bytes, Scratch<uint8_t>& large) {
    if (bytes > kMostKept) {
      large = make_scratch<uint8_t>(bytes);
      return large.get();
    }
    if (bytes > size_) {
      data_ = make_scratch<uint8_t>(bytes);
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  Scratch<uint8_t> data_;
  int64_t size_ = 0;
};

}  // namespace lutgemm
