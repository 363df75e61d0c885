// SPDX-License-Identifier: GPL-2.0
/*
 * oldmonitor - a Redis monitor of the design that ours replaces, only to be measured beside it (`bench probe`).
 *
 * Written anew after what is known of the design, not after its code: the four tracepoints at the beginning and the end of
 * read and write; each copies the payload (at the beginning of a read: whatever the buffer held before) and sends it to
 * user space as one perf event, which wakes the reader. What it calls latency is the duration of the write call.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

#include "oldmonitor.h"

char LICENSE[] SEC("license")
= "GPL";

const volatile __u32 target = 0;

struct call {
	__u64 at;
	__u64 buffer;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} events SEC(".maps");

/* By thread. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct call);
} calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct oldmon_event);
} scratch SEC(".maps");

static __always_inline void report(void *ctx, __u32 kind, __u64 at, __u64 duration, __u64 buffer, __s64 size)
{
	__u32 zero = 0;
	__u64 length = size < OLDMON_PAYLOAD ? size : OLDMON_PAYLOAD;
	struct oldmon_event *e = bpf_map_lookup_elem(&scratch, &zero);

	if (!e)
		return;
	e->at = at;
	e->duration = duration;
	e->size = size;
	e->tid = (__u32)bpf_get_current_pid_tgid();
	e->kind = kind;
	e->payload[0] = 0;
	/* By hand: the verifier of Linux 6.1 wants to see the bound on this very register. */
	asm volatile("%0 &= %1" : "+r"(length) : "i"(2 * OLDMON_PAYLOAD - 1));
	if (size > 0 && length <= OLDMON_PAYLOAD)
		bpf_probe_read_user(e->payload, length, (void *)buffer);
	bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU, e, sizeof(*e));
}

static __always_inline int enter(struct trace_event_raw_sys_enter *ctx, __u32 kind)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct call call = {};
	__u32 tid = id;

	if (id >> 32 != target)
		return 0;
	call.at = bpf_ktime_get_ns();
	call.buffer = ctx->args[1];
	bpf_map_update_elem(&calls, &tid, &call, BPF_ANY);
	report(ctx, kind, call.at, 0, call.buffer, ctx->args[2]);
	return 0;
}

static __always_inline int leave(struct trace_event_raw_sys_exit *ctx, __u32 kind)
{
	__u64 id = bpf_get_current_pid_tgid(), now;
	struct call *call;
	__u32 tid = id;

	if (id >> 32 != target)
		return 0;
	call = bpf_map_lookup_elem(&calls, &tid);
	if (!call)
		return 0;
	now = bpf_ktime_get_ns();
	report(ctx, kind, now, now - call->at, call->buffer, ctx->ret);
	bpf_map_delete_elem(&calls, &tid);
	return 0;
}

SEC("tracepoint/syscalls/sys_enter_read")
int old_enter_read(struct trace_event_raw_sys_enter *ctx)
{
	return enter(ctx, OLDMON_ENTER_READ);
}

SEC("tracepoint/syscalls/sys_exit_read")
int old_exit_read(struct trace_event_raw_sys_exit *ctx)
{
	return leave(ctx, OLDMON_EXIT_READ);
}

SEC("tracepoint/syscalls/sys_enter_write")
int old_enter_write(struct trace_event_raw_sys_enter *ctx)
{
	return enter(ctx, OLDMON_ENTER_WRITE);
}

SEC("tracepoint/syscalls/sys_exit_write")
int old_exit_write(struct trace_event_raw_sys_exit *ctx)
{
	return leave(ctx, OLDMON_EXIT_WRITE);
}
