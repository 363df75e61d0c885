// SPDX-License-Identifier: GPL-2.0-only
#include <vmlinux.h>
#include <bpf/bpf_helpers.h>
#include <ffkx_heap.bpf.h>

ffkx_heap(256, 0) heap SEC(".maps"); /* all of its memory */

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__type(key, __u64);
	__type(value, int);
	__uint(max_entries, 10000);
} sockhash SEC(".maps");

/* Filled in by user space before the programs run. */
void *ffkx_redis_hashmap;
__u64 ffkx_redis_hashmap_max_entries_size;

SEC("tc")
int ffkx_redis_hashmap_init(struct __sk_buff *ctx)
{
	return ffkx_redis_hashmap ? 0 : 12;
}

char LICENSE[] SEC("license") = "GPL";
