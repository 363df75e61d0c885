/* SPDX-License-Identifier: GPL-2.0 */
/* Maps of one attached server. Sizes marked "set by the loader" are placeholders. */
#ifndef KFLEX_MAPS_BPF_H
#define KFLEX_MAPS_BPF_H

#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "abi.h"
#include "hash.h"

#define KFLEX_BARRIER()	 asm volatile("" ::: "memory")
#define READ_ONCE(x)	 (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

/*
 * Bounds x where the verifier can see it: compilers drop a mask that they can prove useless, and kernels before 6.4
 * forget what they know of a 32-bit value that was spilled.
 */
#define BOUND(x, mask) asm volatile("%0 &= %1" : "+r"(x) : "i"(mask))

/*
 * Eight bytes anywhere, in one access. Behind a cast of a struct's member clang knows how little it is aligned, and takes
 * it byte by byte; a pointer's target it believes.
 */
static __always_inline __u64 word_at(const void *at)
{
	return *(const __u64 *)at;
}

static __always_inline void put_word(void *at, __u64 word)
{
	*(__u64 *)at = word;
}

/*
 * The value of x in memory, of which the verifier knows nothing: it follows a loop anew for each set of bounds that led
 * there (the digits of a length, the rounds of a loop before), hundreds of thousands of its million instructions. Where
 * ways meet again, what must be bounded later is read anew, and their bounds are one.
 */
#define forget(x) READ_ONCE(x)

/*
 * The bounds of a message's first element. By hand, because clang may add a field's offset to the context's address
 * before the load, and the verifier refuses that.
 */
static __always_inline void *msg_data(struct sk_msg_md *m)
{
	void *p;

	asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(p) : "r"(m), "i"(__builtin_offsetof(struct sk_msg_md, data)));
	return p;
}

static __always_inline void *msg_end(struct sk_msg_md *m)
{
	void *p;

	asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(p) : "r"(m), "i"(__builtin_offsetof(struct sk_msg_md, data_end)));
	return p;
}

struct kflex_chunk {
	__u8 bytes[KFLEX_CHUNK_CELLS * KFLEX_CELL + KFLEX_CHUNK_SLACK];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kflex_ctl);
} ctl SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set by the loader */
	__type(key, __u32);
	__type(value, struct kflex_chunk);
} heap SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 64); /* set by the loader */
	__type(key, __u32);
	__type(value, struct kflex_bucket);
} buckets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 4096); /* set by the loader */
	__type(key, __u32);
	__type(value, __u64);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KFLEX_MAX_CONNS);
	__type(key, __u32);
	__type(value, struct kflex_conn);
} conns SEC(".maps");

/* Connection numbers not in use, filled by the loader. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, KFLEX_MAX_CONNS);
	__type(value, __u32);
} free_conns SEC(".maps");

/* Addresses as v4-mapped or plain IPv6, ports in host order, seen from the client. */
struct kflex_tuple {
	__u32 client[4];
	__u32 server[4];
	__u32 client_port;
	__u32 server_port;
};

/* What struct kflex_tuple has as the server's address: those of its network namespace, loopback left out. */
struct kflex_address {
	__u32 word[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct kflex_address);
	__type(value, __u8);
} server_addrs SEC(".maps");

/* Client sockets that wait for their server's half. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, KFLEX_MAX_CONNS);
	__type(key, struct kflex_tuple);
	__type(value, __u32);
} pairs SEC(".maps");

struct kflex_link {
	__u32 conn;
	__u32 server;
};

/* Socket -> connection number. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct kflex_link);
} links SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, KFLEX_MAX_CONNS);
	__type(key, __u32);
	__type(value, __u64);
} client_socks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, KFLEX_MAX_CONNS);
	__type(key, __u32);
	__type(value, __u64);
} server_socks SEC(".maps");

struct kflex_command {
	char name[KFLEX_NAME];
};

/* The allow-list: upper-case command, or "CONTAINER|SUB", -> enum kflex_cmd_flag bits. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct kflex_command);
	__type(value, __u32);
} commands SEC(".maps");

const volatile __u32 port = 6379;
const volatile __u64 netns_cookie = 0; /* of the server's network namespace */
const volatile __u32 bucket_mask = 63;
const volatile __u32 ring_mask = 4095;
const volatile __u32 heap_cells = KFLEX_CHUNK_CELLS;
const volatile bool store = false; /* enum kflex_mode KFLEX_MODE_STORE */

static __always_inline struct kflex_ctl *get_ctl(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&ctl, &zero);
}

static __always_inline struct kflex_cpu *get_cpu(struct kflex_ctl *c)
{
	return &c->cpu[bpf_get_smp_processor_id() & (KFLEX_MAX_CPUS - 1)];
}

_Static_assert(KFLEX_STAT_COUNT <= 32, "count_many() masks with 31");

static __always_inline void count_many(struct kflex_ctl *c, __u64 what, __u32 n)
{
	BOUND(what, 31);
	__sync_fetch_and_add(&get_cpu(c)->stat[what], n);
}

static __always_inline void count(struct kflex_ctl *c, enum kflex_stat what)
{
	count_many(c, what, 1);
}

#endif
