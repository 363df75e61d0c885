/* SPDX-License-Identifier: GPL-2.0 */
/* trace.bpf.h - what the counting probes share: whose events count, and histograms of durations. */
#ifndef TRACE_BPF_H
#define TRACE_BPF_H

enum trace_const {
	TRACE_TARGETS = 1024,
	/*
	 * Buckets of durations: the first is below 2^FIRST_BIT ns, then each power of two has SUB buckets, the last is
	 * all that is longer. A quantile read from them is wrong by at most 1/SUB of itself.
	 */
	TRACE_FIRST_BIT = 6,
	TRACE_SUB = 4,
	TRACE_BUCKETS = 122,
};

struct trace_times {
	__u64 ns;
	__u64 max_ns;
	__u64 bucket[TRACE_BUCKETS];
};

/* Process ids (as the first pid namespace sees them) that count; everybody but `tracer` if `everybody`. */
const volatile bool everybody = false;
const volatile __u32 tracer = 0;

/* So that the constants are in the BTF, for Python. */
const enum trace_const trace_btf_const;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, TRACE_TARGETS);
	__type(key, __u32);
	__type(value, __u32);
} targets SEC(".maps");

static __always_inline bool trace_wanted(__u32 tgid)
{
	if (everybody)
		return tgid != tracer;
	return bpf_map_lookup_elem(&targets, &tgid);
}

static __always_inline __u32 trace_log2(__u64 v)
{
	__u32 r, shift;

	r = (v > 0xffffffffULL) << 5;
	v >>= r;
	shift = (v > 0xffff) << 4;
	v >>= shift;
	r |= shift;
	shift = (v > 0xff) << 3;
	v >>= shift;
	r |= shift;
	shift = (v > 0xf) << 2;
	v >>= shift;
	r |= shift;
	shift = (v > 0x3) << 1;
	v >>= shift;
	r |= shift;
	return r | (v >> 1);
}

static __always_inline __u32 trace_bucket(__u64 ns)
{
	__u32 bits = trace_log2(ns), at;

	if (bits < TRACE_FIRST_BIT)
		return 0;
	at = 1 + (bits - TRACE_FIRST_BIT) * TRACE_SUB + ((ns >> (bits - 2)) & (TRACE_SUB - 1));
	return at < TRACE_BUCKETS ? at : TRACE_BUCKETS - 1;
}

/*
 * Atomic although it is per CPU: a program on a uprobe may be preempted by another thread's, which would lose counts.
 * Of two such races for the maximum one may win wrongly, by less than their difference.
 */
static __always_inline void trace_add(struct trace_times *t, __u64 ns)
{
	__u64 at = trace_bucket(ns);

	__sync_fetch_and_add(&t->ns, ns);
	if (ns > t->max_ns)
		t->max_ns = ns;
	if (at < TRACE_BUCKETS)
		__sync_fetch_and_add(&t->bucket[at], 1);
}

#endif
