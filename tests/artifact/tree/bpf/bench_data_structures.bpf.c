// SPDX-License-Identifier: GPL-2.0-only
#include <vmlinux.h>
#include <bpf/bpf_helpers.h>
#include <ffkx_heap.bpf.h>

#define ffkx_heap_unused(size, flags) typedef int ffkx_unused_##size

ffkx_heap(64, 0) heap SEC(".maps"); /* all of its memory */
ffkx_heap_unused(32, 0);

SEC("tc")
int bench_heap_base(struct __sk_buff *ctx)
{
	return ctx->len == 0;
}

char LICENSE[] SEC("license") = "GPL";
