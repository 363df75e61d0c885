// SPDX-License-Identifier: GPL-2.0-only
/*
 * hello - the smallest program that does something real: counts the read() calls of each process.
 *
 * Two ways to see all system calls, of which one is loaded: the BTF tracepoint, and the raw one.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

#define TS_COMPAT 2 /* x86: a 32-bit call, whose numbers are others */

const volatile __u64 read_number;

struct hello_count {
	__u64 calls;
	char comm[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct hello_count);
} hello_counts SEC(".maps");

__u64 hello_missed;

static __always_inline int count(void)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32;
	struct hello_count first = {}, *seen;

	seen = bpf_map_lookup_elem(&hello_counts, &process);
	if (!seen) {
		bpf_get_current_comm(first.comm, sizeof(first.comm));
		bpf_map_update_elem(&hello_counts, &process, &first, BPF_NOEXIST);
		seen = bpf_map_lookup_elem(&hello_counts, &process);
	}
	__sync_fetch_and_add(seen ? &seen->calls : &hello_missed, 1);
	return 0;
}

static __always_inline int entered(__u64 number)
{
	if (number != read_number)
		return 0;
#ifdef __TARGET_ARCH_x86
	if (bpf_get_current_task_btf()->thread_info.status & TS_COMPAT)
		return 0;
#endif
	return count();
}

/* Both get the registers and the number of the system call. */
SEC("tp_btf/sys_enter")
int hello_btf(__u64 *context)
{
	return entered(context[1]);
}

SEC("raw_tp/sys_enter")
int hello_raw(struct bpf_raw_tracepoint_args *context)
{
	return entered(context->args[1]);
}

char LICENSE[] SEC("license")
= "GPL";
