// SPDX-License-Identifier: BSD-3-Clause
#ifndef FFKX_BPF_HEAP_ALLOCATOR_HPP
#define FFKX_BPF_HEAP_ALLOCATOR_HPP

#include <cstddef>
#include <optional>

namespace ffkx {
namespace bpf {

// Hands out a heap from its start to its end; nothing is ever given back.
class HeapAllocator {
 public:
  static std::optional<HeapAllocator> MakeNew(void *base, std::size_t size);

  template <typename T = void>
  std::optional<T *> Allocate(std::size_t size) {
    auto object = AllocateNew(size);
    if (!object) {
      return std::nullopt;
    }
    return static_cast<T *>(*object);
  }

  std::optional<void *> Reserve(std::size_t size);
  std::size_t Left() const { return size_ - used_; }

 private:
  HeapAllocator(void *base, std::size_t size) : base_(base), size_(size) {}

  std::optional<void *> AllocateNew(std::size_t size);

  void *base_;
  std::size_t size_;
  std::size_t used_ = 0;
};

// Fills the lists of all size classes with `capacity` objects each.
std::optional<HeapAllocator> CreateDefaultHeap(void *base, std::size_t size, int capacity);

}  // namespace bpf
}  // namespace ffkx

#endif
