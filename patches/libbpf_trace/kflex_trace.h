/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What libbpf asks of the kernel for its maps, one JSON line each, into the file that KFLEX_TRACE names
 * (or KFLEX_TRACE=fd:N). Unset: one branch at each of the calls below. Whatever happens to the file, what
 * the program sees does not change, errno included; tracing ends with one line on standard error.
 * The events are described in docs/trace.md.
 */
#ifndef KFLEX_TRACE_H
#define KFLEX_TRACE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/types.h>

#pragma GCC visibility push(hidden)

extern int kflex_trace_state;

void kflex_trace_created(int fd, const char *name, const char *type_name, uint32_t type, uint32_t key_size,
			 uint32_t value_size, uint32_t max_entries, uint32_t flags, uint64_t extra);
void kflex_trace_mapped(void *address, const char *map, void *hint, size_t length, int prot, int flags, int fd);

#pragma GCC visibility pop

#define KFLEX_TRACE_ON __builtin_expect(__atomic_load_n(&kflex_trace_state, __ATOMIC_RELAXED) != 0, 0)

/* `call` creates a map; the other arguments, kflex_trace_created's after the first, are evaluated when tracing. */
#define kflex_trace_create(call, ...)                                                                                  \
	({                                                                                                             \
		int kflex_trace_fd = (call);                                                                           \
                                                                                                                       \
		if (KFLEX_TRACE_ON)                                                                                    \
			kflex_trace_created(kflex_trace_fd, __VA_ARGS__);                                              \
		kflex_trace_fd;                                                                                        \
	})

/* mmap of a map's memory. */
static inline void *kflex_trace_mmap(const char *map, void *hint, size_t length, int prot, int flags, int fd,
				     off_t offset)
{
	void *address = mmap(hint, length, prot, flags, fd, offset);

	if (KFLEX_TRACE_ON)
		kflex_trace_mapped(address, map, hint, length, prot, flags, fd);
	return address;
}

#endif
