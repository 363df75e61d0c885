// SPDX-License-Identifier: GPL-2.0
/*
 * offcpu - where threads wait: the time from being switched out to running again, by the stack they left.
 *
 * Each program exists as tp_btf and as raw tracepoint; user space loads the kind that the host allows.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include "trace.bpf.h"

enum offcpu_const {
	OFFCPU_FRAMES = 127, /* as many as the kernel takes at most by default */
	OFFCPU_STACKS = 16384,
	OFFCPU_THREADS = 32768,
};

const enum offcpu_const offcpu_btf_const;

struct wait_key {
	__u32 tgid;
	__s32 kernel; /* ids in `stacks`; negative: not taken */
	__s32 user;
	__u32 preempted; /* it could have run on: somebody else got the CPU */
	char comm[16];
};

struct wait_sum {
	__u64 ns;
	__u64 count;
};

struct waiting {
	__u64 since;
	struct wait_key key;
};

struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, OFFCPU_STACKS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, OFFCPU_FRAMES * sizeof(__u64));
} stacks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, OFFCPU_THREADS);
	__type(key, __u32);
	__type(value, struct waiting);
} waiting SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, OFFCPU_STACKS);
	__type(key, struct wait_key);
	__type(value, struct wait_sum);
} sums SEC(".maps");

/* Waits that are not in `sums`: it is full. */
__u64 dropped;

static __always_inline void begin(void *ctx, struct task_struct *prev, __u64 now)
{
	struct waiting w = {.since = now};
	__u32 tid = BPF_CORE_READ(prev, pid);

	w.key.tgid = BPF_CORE_READ(prev, tgid);
	if (!tid || !trace_wanted(w.key.tgid))
		return;
	w.key.preempted = !BPF_CORE_READ(prev, __state);
	w.key.kernel = bpf_get_stackid(ctx, &stacks, 0);
	w.key.user = bpf_get_stackid(ctx, &stacks, BPF_F_USER_STACK);
	bpf_get_current_comm(w.key.comm, sizeof(w.key.comm));
	bpf_map_update_elem(&waiting, &tid, &w, BPF_ANY);
}

static __always_inline void end(struct task_struct *next, __u64 now)
{
	__u32 tid = BPF_CORE_READ(next, pid);
	struct wait_sum *sum, first = {.count = 1};
	struct waiting *w;

	if (!tid || !trace_wanted(BPF_CORE_READ(next, tgid)))
		return;
	w = bpf_map_lookup_elem(&waiting, &tid);
	if (!w)
		return;
	first.ns = now - w->since;
	sum = bpf_map_lookup_elem(&sums, &w->key);
	if (!sum && bpf_map_update_elem(&sums, &w->key, &first, BPF_NOEXIST)) {
		/* Another CPU was first, or there is no room. */
		sum = bpf_map_lookup_elem(&sums, &w->key);
		if (!sum)
			__sync_fetch_and_add(&dropped, 1);
	}
	if (sum) {
		__sync_fetch_and_add(&sum->ns, first.ns);
		__sync_fetch_and_add(&sum->count, 1);
	}
	bpf_map_delete_elem(&waiting, &tid);
}

/* The running task is still prev. */
SEC("tp_btf/sched_switch")
int btf_switch(__u64 *ctx)
{
	__u64 now = bpf_ktime_get_ns();

	begin(ctx, (void *)ctx[1], now);
	end((void *)ctx[2], now);
	return 0;
}

SEC("raw_tp/sched_switch")
int raw_switch(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 now = bpf_ktime_get_ns();

	begin(ctx, (void *)ctx->args[1], now);
	end((void *)ctx->args[2], now);
	return 0;
}

char _license[] SEC("license")
= "GPL";
