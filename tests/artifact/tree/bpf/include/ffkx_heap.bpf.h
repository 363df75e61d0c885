/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef FFKX_HEAP_BPF_H
#define FFKX_HEAP_BPF_H

#include <vmlinux.h>
#include <bpf/bpf_helpers.h>

/* ffkx_heap(4, 0) would declare a heap of 4 GB: a comment is not a declaration. */
#define FFKX_PAGES_PER_GB 262144

#define FFKX_PAGE 4096

#define ffkx_heap(size, extra)                           \
	struct {                                             \
		__uint(max_entries, (size) * FFKX_PAGES_PER_GB); \
		__uint(map_flags, (extra) | BPF_F_MMAPABLE);     \
		__uint(type, BPF_MAP_TYPE_HEAP);                 \
		__uint(key_size, sizeof(__u32));                 \
		__uint(value_size, FFKX_PAGE);                   \
	}

#endif
