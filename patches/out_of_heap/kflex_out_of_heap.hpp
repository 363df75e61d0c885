// SPDX-License-Identifier: BSD-3-Clause
#ifndef KFLEX_OUT_OF_HEAP_HPP
#define KFLEX_OUT_OF_HEAP_HPP

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <utility>

// What `result` (a StatusOr or an optional) holds. Where it holds nothing the heap is full: one line on stderr, then
// the end. `bytes` is what was asked for, 0 if that is not known.
template <typename Result>
auto kflex_in_heap(Result&& result, std::size_t bytes = 0) {
  bool held;
  if constexpr (requires { result.ok(); }) {
    held = result.ok();
  } else {
    held = result.has_value();
  }
  if (!held) {
    std::fflush(nullptr);
    if (bytes) {
      std::fprintf(stderr, "ffkx: out of heap: no room for %zu bytes more", bytes);
    } else {
      std::fprintf(stderr, "ffkx: out of heap");
    }
    std::fprintf(stderr,
                 ": use a larger heap or smaller capacities (`kflex-repro fit-heap` plans both for this machine)\n");
    // No destructors: other threads may be using what they destroy.
    std::_Exit(EXIT_FAILURE);
  }
  return *std::forward<Result>(result);
}

#endif
