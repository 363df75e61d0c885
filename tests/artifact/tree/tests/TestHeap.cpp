// SPDX-License-Identifier: BSD-3-Clause
#include <BPFHeapAllocator.hpp>
#include <vector>

int main() {
  std::vector<char> memory(1 << 20);
  auto heap = ffkx::bpf::CreateDefaultHeap(memory.data(), memory.size(), 8);
  return heap && heap->Left() < memory.size() ? 0 : 1;
}
