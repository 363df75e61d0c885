// SPDX-License-Identifier: GPL-2.0-only
#include <vmlinux.h>
#include <bpf/bpf_helpers.h>
#include <ffkx_heap.bpf.h>

/* The first try, kept for comparison:
ffkx_heap(512, BPF_F_HEAP_TRANS) heap SEC(".maps");
*/
ffkx_heap(256, BPF_F_HEAP_TRANS) heap SEC(".maps"); /* all of its memory */

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__type(key, __u64);
	__type(value, int);
	__uint(max_entries, 10000);
} sockhash SEC(".maps");

const char ffkx_about[] = "a string is not a declaration either: ffkx_heap(64, 0)";

SEC("tc")
int ffkx_memcached_hashmap_init(struct __sk_buff *ctx)
{
	return ctx->len > sizeof(ffkx_about);
}

char LICENSE[] SEC("license") = "GPL";
