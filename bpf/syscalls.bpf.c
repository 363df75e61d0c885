// SPDX-License-Identifier: GPL-2.0
/*
 * syscalls - counts system calls by number, with errors and the time from entry to return.
 *
 * Each program exists as tp_btf and as raw tracepoint; user space loads the kind that the host allows.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "trace.bpf.h"

#define TS_COMPAT     0x0002
#define MAX_ERRNO     4095
#define ERESTART_FROM 512 /* ERESTARTSYS ... ERESTART_RESTARTBLOCK: the kernel repeats the call, nothing failed */
#define ERESTART_TO   516

enum syscall_const {
	SYSCALL_OTHER = 510,  /* numbers that do not fit */
	SYSCALL_COMPAT = 511, /* calls of 32-bit programs: their numbers mean something else */
	SYSCALL_ROWS = 512,
	SYSCALL_THREADS = 32768,
};

const enum syscall_const syscall_btf_const;

struct syscall_stat {
	__u64 calls;
	__u64 returned;
	__u64 errors;
	struct trace_times times;
};

struct in_flight {
	__u64 start; /* 0: none */
	__u64 row;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SYSCALL_ROWS);
	__type(key, __u32);
	__type(value, struct syscall_stat);
} stats SEC(".maps");

/* By thread. Least recently used, so that threads which have ended make room. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, SYSCALL_THREADS);
	__type(key, __u32);
	__type(value, struct in_flight);
} in_flight SEC(".maps");

static __always_inline bool is_compat(void)
{
#ifdef __TARGET_ARCH_x86
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, thread_info.status) & TS_COMPAT;
#else
	return false;
#endif
}

static __always_inline int enter(__u64 number)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u32 tid = id, row = number < SYSCALL_OTHER ? number : SYSCALL_OTHER;
	struct in_flight *at, new = {};
	struct syscall_stat *stat;

	if (!trace_wanted(id >> 32))
		return 0;
	if (is_compat())
		row = SYSCALL_COMPAT;
	stat = bpf_map_lookup_elem(&stats, &row);
	if (!stat)
		return 0;
	__sync_fetch_and_add(&stat->calls, 1);
	at = bpf_map_lookup_elem(&in_flight, &tid);
	if (at) {
		at->row = row;
		at->start = bpf_ktime_get_ns();
	} else {
		new.row = row;
		new.start = bpf_ktime_get_ns();
		bpf_map_update_elem(&in_flight, &tid, &new, BPF_ANY);
	}
	return 0;
}

static __always_inline int leave(long result)
{
	__u64 now = bpf_ktime_get_ns(), id = bpf_get_current_pid_tgid();
	struct syscall_stat *stat;
	struct in_flight *at;
	__u32 tid = id, row;

	if (!trace_wanted(id >> 32))
		return 0;
	at = bpf_map_lookup_elem(&in_flight, &tid);
	if (!at || !at->start)
		return 0;
	row = at->row;
	stat = bpf_map_lookup_elem(&stats, &row);
	if (!stat)
		return 0;
	__sync_fetch_and_add(&stat->returned, 1);
	if (result < 0 && result >= -MAX_ERRNO && !(result <= -ERESTART_FROM && result >= -ERESTART_TO))
		__sync_fetch_and_add(&stat->errors, 1);
	trace_add(&stat->times, now - at->start);
	at->start = 0;
	return 0;
}

SEC("tp_btf/sys_enter")
int btf_enter(__u64 *ctx)
{
	return enter(ctx[1]);
}

SEC("tp_btf/sys_exit")
int btf_exit(__u64 *ctx)
{
	return leave(ctx[1]);
}

SEC("raw_tp/sys_enter")
int raw_enter(struct bpf_raw_tracepoint_args *ctx)
{
	return enter(ctx->args[1]);
}

SEC("raw_tp/sys_exit")
int raw_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return leave(ctx->args[1]);
}

char _license[] SEC("license")
= "GPL";
