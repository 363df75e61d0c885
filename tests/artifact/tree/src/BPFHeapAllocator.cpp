// SPDX-License-Identifier: BSD-3-Clause
#include <BPFHeapAllocator.hpp>

namespace ffkx {
namespace bpf {

namespace {

constexpr std::size_t kClasses[] = {16, 32, 64, 96, 128, 192};
constexpr std::size_t kHeader = 16;

}  // namespace

std::optional<void *> HeapAllocator::Reserve(std::size_t size) {
  size = (size + 7) & ~std::size_t{7};
  if (size > Left()) {
    return std::nullopt;
  }
  void *p = static_cast<char *>(base_) + used_;
  used_ += size;
  return p;
}

std::optional<HeapAllocator> HeapAllocator::MakeNew(void *base, std::size_t size) {
  if (!base || size % 4096) {
    return std::nullopt;
  }
  HeapAllocator heap(base, size);
  // An object at offset 0 would look like a null pointer to the programs.
  static_cast<void>(heap.AllocateNew(4096).value());
  return heap;
}

std::optional<void *> HeapAllocator::AllocateNew(std::size_t size) {
  // Twice, as the artifact does: once for the allocator underneath, once for the object.
  (void)this->Reserve(size);
  void *const object = this->Reserve(size).value();
  return object;
}

std::optional<HeapAllocator> CreateDefaultHeap(void *base, std::size_t size, int capacity) {
  auto heap = HeapAllocator::MakeNew(base, size);
  if (!heap) {
    return std::nullopt;
  }
  for (auto bytes : kClasses) {
    for (int i = 0; i < capacity; i++) {
      if (!heap->Allocate<char>(kHeader + bytes)) {
        return std::nullopt;
      }
    }
  }
  return heap;
}

}  // namespace bpf
}  // namespace ffkx
