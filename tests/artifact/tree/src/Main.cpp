// SPDX-License-Identifier: BSD-3-Clause
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <BPFHeapAllocator.hpp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

inline constexpr int kRedisHeapCapacity = 10'000'000;
inline constexpr int kRedisMapSize = 1'000'000;

namespace {

// What the skeleton of a loaded object would hold.
struct Skeleton {
  void *heap = nullptr;
  std::size_t heap_bytes = 0;
  void *hashmap = nullptr;
  void *buckets = nullptr;
  void *previous = nullptr;
  void *keys = nullptr;
  void *values = nullptr;
};

uint64_t next_pow2(uint64_t least) {
  uint64_t power = 1;
  for (; power < least; power <<= 1) continue;
  return power;
}

}  // namespace

bool RedisInitSkel(Skeleton& skel) {
  auto ma = ffkx::bpf::CreateDefaultHeap(skel.heap, skel.heap_bytes, kRedisHeapCapacity);
  if (!ma) {
    return false;
  }
  skel.hashmap = ma->Allocate<char>(4096).value();
  skel.buckets =
      ma->Allocate<uint64_t>(next_pow2(kRedisMapSize) * sizeof(uint64_t)).value();
  skel.previous = ma->Allocate<void *>(32 * sizeof(void *)).value();
  skel.keys = ma->Allocate<void>(512).value();
  skel.values = ma->Allocate<void>(512).value();
  return true;
}

bool RedisAttach(Skeleton&) {
  const int group = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY);
  if (group == -1) {
    return false;
  }
  return close(group) == 0;
}

// --- Memcached

inline constexpr int kMemcachedHeapCapacity = 10'000'000;
inline constexpr int kMemcachedMapSize = 1'000'000;

bool MemcachedInitSkel(Skeleton& skel, bool early) {
  if (early) {
    return true;
  }
  auto ma = ffkx::bpf::CreateDefaultHeap(skel.heap, skel.heap_bytes, kMemcachedHeapCapacity);
  if (!ma) {
    return false;
  }
  skel.hashmap = ma->Allocate<char>(4096).value();
  skel.buckets = ma->Allocate<uint64_t>(next_pow2(kMemcachedMapSize) * sizeof(uint64_t))
                     .value();
  skel.keys = ma->Allocate<void>(1024).value();
  skel.values = ma->Allocate<void>(1024).value();
  return true;
}

bool MemcachedAttach(Skeleton&) {
  const int group = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY);
  if (group == -1) {
    return false;
  }
  return close(group) == 0;
}

// --- Memcache

inline constexpr int kMemcacheHeapCapacity = 10'000'000;
inline constexpr int kMemcacheMapSize = 1'000'000;

bool MemcacheInitSkel(Skeleton& skel, bool early) {
  if (early) {
    return true;
  }
  auto ma = ffkx::bpf::CreateDefaultHeap(skel.heap, skel.heap_bytes, kMemcacheHeapCapacity);
  if (!ma) {
    return false;
  }
  skel.hashmap = ma->Allocate<char>(4096).value();
  skel.buckets = ma->Allocate<uint64_t>(next_pow2(kMemcacheMapSize) * sizeof(uint64_t))
                     .value();
  skel.keys = ma->Allocate<void>(1024).value();
  skel.values = ma->Allocate<void>(1024).value();
  return true;
}

bool MemcacheAttach(Skeleton&) {
  const int group = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY);
  if (group == -1) {
    return false;
  }
  return close(group) == 0;
}

namespace {

// Whether the kernel knows the heap: by its name in the BTF (of the file in FFKX_KERNEL_BTF, for the tests).
bool KernelHasHeap() {
  const char *chosen = std::getenv("FFKX_KERNEL_BTF");
  std::ifstream file(chosen ? chosen : "/sys/kernel/btf/vmlinux", std::ios::binary);
  const std::string types((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return types.find("BPF_MAP_TYPE_HEAP") != std::string::npos;
}

// Serves nobody until it is told to end.
int Serve(const char *mode) {
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  sigprocmask(SIG_BLOCK, &ends, nullptr);
  std::cerr << mode << " ready!" << std::endl;
  int which = 0;
  sigwait(&ends, &which);
  std::cerr << mode << " ends" << std::endl;
  return 0;
}

}  // namespace

// ffkx --kredis|--kmemcached|--kmemcache [--ifindex=N] [BYTES]: with BYTES only the start of the mode, over an
// ordinary mapping of that many; without, all of it, which needs the heap in the kernel.
int main(int argc, char *argv[]) {
  std::string mode;
  std::size_t bytes = 0;
  int ifindex = 0;
  for (int i = 1; i < argc; i++) {
    if (!std::strncmp(argv[i], "--ifindex=", 10)) {
      ifindex = std::atoi(argv[i] + 10);
    } else if (!std::strncmp(argv[i], "--", 2)) {
      mode = argv[i] + 2;
    } else {
      bytes = std::strtoull(argv[i], nullptr, 0);
    }
  }
  if (mode != "kredis" && mode != "kmemcached" && mode != "kmemcache") {
    std::cerr << "usage: ffkx --kredis|--kmemcached|--kmemcache [--ifindex=N] [BYTES]\n";
    return 2;
  }
  if (!bytes) {
    if (!KernelHasHeap()) {
      std::cerr << "ffkx: the kernel has no BPF_MAP_TYPE_HEAP\n";
      return 1;
    }
    const char *allocator = std::getenv("MALLOC_CONF");
    std::cout << "mode " << mode << " ifindex " << ifindex << std::endl;
    std::cout << "malloc_conf " << (allocator ? allocator : "") << std::endl;
    return Serve(mode.c_str());
  }
  Skeleton skel;
  skel.heap_bytes = bytes;
  skel.heap = mmap(nullptr, skel.heap_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
  if (skel.heap == MAP_FAILED) {
    std::cerr << "no memory for the heap\n";
    return 1;
  }
  bool up = false;
  if (mode == "kredis") {
    up = RedisInitSkel(skel) && RedisAttach(skel);
  } else if (mode == "kmemcached") {
    up = MemcachedInitSkel(skel, false) && MemcachedAttach(skel);
  } else {
    up = MemcacheInitSkel(skel, false) && MemcacheAttach(skel);
  }
  std::cerr << (up ? "ready\n" : "failed\n");
  return up ? 0 : 1;
}
