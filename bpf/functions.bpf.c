// SPDX-License-Identifier: GPL-2.0
/*
 * functions - counts calls of user-space functions by uprobes, on request with the time spent in each.
 *
 * A probe's cookie is its row. Counting takes a probe at the entry; timing one at the return too, and a stack of open
 * calls per thread, so that a function's own time is known as well as that of what it calls.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "trace.bpf.h"

#ifdef __TARGET_ARCH_x86
#define RETURN_ADDRESS 8 /* ret has popped it when the return probe runs */
#else
#define RETURN_ADDRESS 0
#endif

enum function_const {
	FUNCTION_DEPTH = 64, /* as many nested return probes as the kernel follows */
	FUNCTION_THREADS = 4096,
};

struct function_time {
	__u64 returned;
	__u64 self_ns;
	struct trace_times times;
};

struct open_call {
	__u64 start;
	__u64 sp;
	__u64 inner_ns;
	__u64 row;
};

struct open_calls {
	__u64 depth;
	struct open_call call[FUNCTION_DEPTH];
};

/* Resized to the number of functions. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct function_time);
} times SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, FUNCTION_THREADS);
	__type(key, __u32);
	__type(value, struct open_calls);
} threads SEC(".maps");

/* Never written: what a thread's stack is when it is first seen (too large for the program's own stack). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct open_calls);
} no_calls SEC(".maps");

static __always_inline bool count(void *ctx, __u32 *row)
{
	__u64 *n;

	if (!trace_wanted(bpf_get_current_pid_tgid() >> 32))
		return false;
	*row = bpf_get_attach_cookie(ctx);
	n = bpf_map_lookup_elem(&calls, row);
	if (!n)
		return false;
	__sync_fetch_and_add(n, 1);
	return true;
}

SEC("kprobe")
int function_count(struct pt_regs *ctx)
{
	__u32 row;

	count(ctx, &row);
	return 0;
}

SEC("kprobe")
int function_enter(struct pt_regs *ctx)
{
	__u32 row, tid = bpf_get_current_pid_tgid(), zero = 0, i;
	__u64 sp = PT_REGS_SP(ctx), depth;
	struct open_calls *open;
	void *blank;

	if (!count(ctx, &row))
		return 0;
	open = bpf_map_lookup_elem(&threads, &tid);
	if (!open) {
		blank = bpf_map_lookup_elem(&no_calls, &zero);
		if (!blank || bpf_map_update_elem(&threads, &tid, blank, BPF_ANY))
			return 0;
		open = bpf_map_lookup_elem(&threads, &tid);
		if (!open)
			return 0;
	}
	depth = open->depth;
	/*
	 * What has a lower stack pointer than we is left: by longjmp, or its return was not seen. Equal ones are callers
	 * that jumped here as their last act; both will return.
	 */
	for (i = 0; i < FUNCTION_DEPTH; i++) {
		if (!depth || depth > FUNCTION_DEPTH || open->call[(depth - 1) & (FUNCTION_DEPTH - 1)].sp >= sp)
			break;
		depth--;
	}
	if (depth < FUNCTION_DEPTH) {
		struct open_call *call = &open->call[depth & (FUNCTION_DEPTH - 1)];

		call->sp = sp;
		call->row = row;
		call->inner_ns = 0;
		call->start = bpf_ktime_get_ns();
		depth++;
	}
	open->depth = depth;
	return 0;
}

SEC("kprobe")
int function_return(struct pt_regs *ctx)
{
	__u64 now = bpf_ktime_get_ns(), sp = PT_REGS_SP(ctx) - RETURN_ADDRESS, depth, ns,
	      id = bpf_get_current_pid_tgid();
	__u32 row = bpf_get_attach_cookie(ctx), tid = id, i;
	struct open_calls *open;
	struct function_time *t;

	if (!trace_wanted(id >> 32))
		return 0;
	open = bpf_map_lookup_elem(&threads, &tid);
	t = bpf_map_lookup_elem(&times, &row);
	if (!open || !t)
		return 0;
	depth = open->depth;
	for (i = 0; i < FUNCTION_DEPTH; i++) {
		struct open_call *call;

		if (!depth || depth > FUNCTION_DEPTH)
			break;
		call = &open->call[(depth - 1) & (FUNCTION_DEPTH - 1)];
		/* A call from before the probes were there. */
		if (call->sp > sp)
			break;
		depth--;
		if (call->sp != sp || call->row != row)
			continue;
		ns = now - call->start;
		__sync_fetch_and_add(&t->returned, 1);
		__sync_fetch_and_add(&t->self_ns, ns > call->inner_ns ? ns - call->inner_ns : 0);
		trace_add(&t->times, ns);
		if (depth && depth <= FUNCTION_DEPTH)
			open->call[(depth - 1) & (FUNCTION_DEPTH - 1)].inner_ns += ns;
		break;
	}
	open->depth = depth;
	return 0;
}

char _license[] SEC("license")
= "GPL";
