// SPDX-License-Identifier: GPL-2.0-only
#include <vmlinux.h>
#include <bpf/bpf_helpers.h>
#include <ffkx_heap.bpf.h>

ffkx_heap(128, 0) heap SEC(".maps"); /* all of its memory */

#ifdef FFKX_HUGE
ffkx_heap(1024, 0) huge_heap SEC(".maps");
#endif

SEC("tc")
int ffkx_memcache_hashmap_init(struct __sk_buff *ctx)
{
	return ctx->len == 0;
}

char LICENSE[] SEC("license") = "GPL";
