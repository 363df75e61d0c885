// SPDX-License-Identifier: BSD-3-Clause
#include <BPFHeapAllocator.hpp>
#include <chrono>
#include <iostream>
#include <vector>

int main() {
  std::vector<char> memory(1 << 20);
  const auto start = std::chrono::steady_clock::now();
  const bool made = ffkx::bpf::CreateDefaultHeap(memory.data(), memory.size(), 100).has_value();
  const auto took = std::chrono::steady_clock::now() - start;
  std::cout << std::chrono::duration_cast<std::chrono::nanoseconds>(took).count() << " ns\n";
  return made ? 0 : 1;
}
