/* SPDX-License-Identifier: GPL-2.0 */
/* State and settings of latency.bpf.c. Sizes marked "set by the loader" are placeholders. */
#ifndef KFLEX_LATENCY_MAPS_BPF_H
#define KFLEX_LATENCY_MAPS_BPF_H

#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "latency.h"

/* As in maps.bpf.h, which brings the offload's maps with it. */
#define BOUND(x, mask) asm volatile("%0 &= %1" : "+r"(x) : "i"(mask))

#define IGNORED 0xffff /* slot: a request that a filter leaves out */

/* --- settings: constants by the time of the verifier ---------------------------------------------------------------- */

const volatile __u32 servers = 0;
const volatile __u16 ports[KFLEX_LAT_SERVERS] = {};
const volatile __u32 netns[KFLEX_LAT_SERVERS] = {};
const volatile bool events = false;
const volatile bool redact = true;
const volatile bool only_wanted = false; /* commands with KFLEX_LAT_F_WANTED */
const volatile __u32 sample = 1;	 /* one read of so many is looked at */
const volatile __u64 slower_than = 0;	 /* ns: events of faster requests are left out */
const volatile __u32 text_mask = 0;	 /* texts' entries minus one */
const volatile __u32 prefix_len = 0;
const volatile bool prefix_whole = false; /* it is the whole key */
const volatile __u8 prefix[KFLEX_LAT_PREFIX] = {};
const volatile __u64 tick_ns = 4000000; /* of jiffies */

/* For their types' sake: Python reads these from the BTF, and the compiler keeps only what is used. */
const volatile enum kflex_lat_const abi = KFLEX_LAT_ABI;
const volatile enum kflex_lat_flag flag_type = 0;
const volatile enum kflex_lat_kind kind_type = 0;

/* --- state ---------------------------------------------------------------------------------------------------------- */

struct pending {
	__u64 arrival;
	__u64 read;
	__u64 bytes;
	__u32 turn; /* of the read, see struct turns */
	__u32 text;
	__u32 argc;
	__u32 count; /* requests of one kind, read at once */
	__u32 due;   /* confirmations of SUBSCRIBE */
	__u16 slot;
	__u16 flags; /* P_* */
};

enum {
	P_SPANS = 1, /* what ends its execution is not the server's next turn: do not split it off */
	P_WAITS = 2, /* may be blocked: what follows the read is waiting, not execution */
	P_CONFIRMED = 4,
};

enum {
	C_SYNCED = 1, /* we know where the next request begins */
	C_SUBSCRIBED = 2,
	C_MUTE = 4, /* CLIENT REPLY OFF */
	C_DEAF = 8, /* a replica, or encrypted: not looked at */
	/* When sampling: */
	C_TAKE = 16, /* the next read that can be is looked at */
	C_READ = 32,
	C_WROTE = 64, /* since the last read */
};

struct request_parser {
	__u64 skip;
	__u64 num;
	__u64 bytes; /* of the request at hand, in earlier reads */
	__u32 args;
	__u32 argn;
	__u32 name_len;
	__u32 text; /* 0: no event */
	__u8 st;
	__u8 neg;
	__u8 in_word;
	__u8 hidden; /* nothing further may be kept of it */
	__u8 unwanted;
	__u8 reply_word; /* CLIENT REPLY ... */
};

struct reply_parser {
	__u64 skip;
	__u64 num;
	__u64 left; /* elements of the reply at hand that are still to come */
	__u64 bytes;
	__u32 head_len;
	__u8 st;
	__u8 neg;
	__u8 type;
	__u8 top;
	__u8 nested; /* past its first header */
	__u8 hidden;
	__u8 sub; /* 1: a published message, 2: the confirmation of a (P|S)(UN)SUBSCRIBE */
};

struct conn {
	__u64 id;
	__u64 arrival; /* of the read at hand */
	__u64 read;
	__u32 turn;
	__u32 server;
	__u32 pid;
	__u32 flags;
	__u32 reads_whole; /* P_SPANS of the read at hand */
	__u32 last_slot;
	__u32 last_flags;
	__u32 first; /* of the pending ones */
	__u32 next;
	__u32 wait; /* reads until the one to take */
	__u64 over; /* requests after them that there was no room for */
	struct request_parser rq;
	struct reply_parser rp;
	__u64 name[4];
	__u64 last[3];
	__u8 head[256]; /* KFLEX_LAT_HEAD of them are used, the rest is for the verifier */
	struct pending q[KFLEX_LAT_PENDING];
	/* Written by whoever sends, on another CPU: on cache lines of its own. */
	__u8 gap[64];
	__u64 arrived; /* first bytes that wait to be read; 0: none, or not watched */
	__u64 blind;   /* when sampling: nobody wants to know */
};

#define PENDING(c, i) (&(c)->q[(i) & (KFLEX_LAT_PENDING - 1)])

/* Of the read or write at hand. */
struct feed {
	__u64 addr;
	__u32 len;
	__u32 pos;
	__u32 base; /* of the window, and how much of it is filled */
	__u32 have;
	__u32 start; /* where the request or reply at hand begins, 0 if it began earlier */
	__u32 from;  /* what is before is in its text already */
	__u32 bad;
	__u32 done; /* replies to the first pending entry, not accounted yet */
	__u32 errors;
	__u32 pad;
	__u64 bytes;
	__u64 now;
	__u8 window[128 + 32];
};

enum { FEED_REQUEST, FEED_REPLY };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct feed);
} feeds SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct conn);
} conns SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, KFLEX_LAT_SLOTS); /* set by the loader */
	__type(key, __u32);
	__type(value, struct kflex_lat_command);
} commands SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct kflex_lat_name);
	__type(value, struct kflex_lat_known);
} names SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kflex_lat_totals);
} totals SEC(".maps");

/* When a server's last reads ended and its last writes began, in order: the next turn ends an execution. */
struct turns {
	__u64 seq;
	__u64 open; /* when sampling: a read was taken, and its execution has not ended yet */
	__u64 at[KFLEX_LAT_TURNS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KFLEX_LAT_SERVERS);
	__type(key, __u32);
	__type(value, struct turns);
} turns SEC(".maps");

/* Requests as far as their events show them, until they are answered. */
struct text {
	__u32 id;
	__u32 len;
	__u8 bytes[KFLEX_LAT_TEXT * 2];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); /* set by the loader */
	__type(key, __u32);
	__type(value, struct text);
} texts SEC(".maps");

struct record {
	struct kflex_lat_event event;
	__u8 bytes[KFLEX_LAT_TEXT * 2 + 256];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct record);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096); /* set by the loader */
} ring SEC(".maps");

static __always_inline struct kflex_lat_totals *get_totals(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&totals, &zero);
}

#define COUNT(field)                                                                                                   \
	do {                                                                                                           \
		struct kflex_lat_totals *_t = get_totals();                                                            \
                                                                                                                       \
		if (_t)                                                                                                \
			__sync_fetch_and_add(&_t->field, 1);                                                           \
	} while (0)

#endif
