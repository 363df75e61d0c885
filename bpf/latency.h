/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * latency.h - what latency.bpf.c and Python (kflex_repro/probe) share. Python reads it from the object's BTF.
 *
 * Times are nanoseconds of CLOCK_MONOTONIC. Change KFLEX_LAT_ABI whenever a structure or a meaning changes: recordings
 * carry it.
 */
#ifndef KFLEX_LATENCY_H
#define KFLEX_LATENCY_H

enum kflex_lat_const {
	KFLEX_LAT_ABI = 1,
	KFLEX_LAT_NAME = 24,	 /* longest command name, upper-cased and zero-padded */
	KFLEX_LAT_SLOTS = 256,	 /* commands with counters of their own; slot 0: all others */
	KFLEX_LAT_SUB_BITS = 3,	 /* buckets per power of two, as a power of two: 12.5 % wide */
	KFLEX_LAT_BUCKETS = 288, /* up to 2^38 ns = 275 s; the last one takes the rest */
	KFLEX_LAT_SERVERS = 8,
	KFLEX_LAT_PENDING = 64, /* requests of one connection that wait for their replies and are told apart */
	KFLEX_LAT_TURNS = 8192, /* reads and writes of a server whose times are remembered */
	KFLEX_LAT_TEXT = 256,	/* bytes of a request kept for its event */
	KFLEX_LAT_HEAD = 96,	/* bytes of a reply kept for its event */
	KFLEX_LAT_LINE = 40,	/* the same when values are not to be seen: too short for Redis to quote arguments */
	KFLEX_LAT_PREFIX = 64,	/* longest prefix of a key to look for */
};

enum kflex_lat_phase {
	KFLEX_LAT_TOTAL, /* arrival of the request's bytes in the socket to the end of the write of its reply */
	KFLEX_LAT_QUEUE, /* arrival to the end of the read */
	KFLEX_LAT_EXEC,	 /* to the server's next read or write */
	KFLEX_LAT_REPLY, /* to the end of the write */
	KFLEX_LAT_PHASES,
};

/* Of one command, on one CPU. */
struct kflex_lat_command {
	__u64 calls;	/* requests read whole */
	__u64 answered; /* of these, with a reply and a latency: what the histograms hold */
	__u64 errors;
	__u64 bytes_in;
	__u64 bytes_out;
	__u64 untimed; /* read while too many waited, or from a client that wants no replies: counted, no latency */
	__u64 max[KFLEX_LAT_PHASES];
	__u64 sum[KFLEX_LAT_PHASES];
	__u64 buckets[KFLEX_LAT_PHASES][KFLEX_LAT_BUCKETS];
};

/* What is known of a command by its name. */
enum kflex_lat_flag {
	KFLEX_LAT_F_KEY = 1,	   /* its first argument is a key or a subcommand, which may be shown */
	KFLEX_LAT_F_BLOCKS = 2,	   /* may wait for others: the server's next turn does not end its execution */
	KFLEX_LAT_F_SUBSCRIBE = 4, /* one confirmation for each argument */
	KFLEX_LAT_F_STREAM = 8,	   /* makes the connection a replica's: neither requests nor replies follow */
	KFLEX_LAT_F_CLIENT = 16,   /* CLIENT: REPLY OFF ends the replies */
	KFLEX_LAT_F_WANTED = 32,   /* chosen by --command */
	KFLEX_LAT_F_OTHER = 64,	   /* no name that is known, and no room to learn it */
};

struct kflex_lat_name {
	__u8 text[KFLEX_LAT_NAME];
};

struct kflex_lat_known {
	__u32 slot; /* 0: none yet */
	__u32 flags;
};

enum kflex_lat_kind {
	KFLEX_LAT_K_REPLY,
	KFLEX_LAT_K_PUSH,
};

/* In the ring buffer, followed by request_len bytes of the request and reply_len bytes of the reply. */
struct kflex_lat_event {
	__u64 at;   /* end of the write */
	__u64 conn; /* a number that names the connection while it lives */
	__u64 phase[KFLEX_LAT_PHASES];
	__u64 bytes_in;
	__u64 bytes_out;
	__u32 argc;
	__u32 pid;
	__u16 slot;
	__u16 request_len;
	__u16 reply_len;
	__u8 server;
	__u8 kind;
};

/* Written by the programs, read by Python. */
struct kflex_lat_totals {
	__u64 events;	   /* put into the ring */
	__u64 dropped;	   /* would have been, had there been room */
	__u64 pushed;	   /* messages that answer no request */
	__u64 garbled;	   /* reads or writes that are not Redis's protocol */
	__u64 foreign;	   /* reads of encrypted connections, or by system calls that are not followed */
	__u64 connections; /* met so far */
	__u64 no_room;	   /* reads of connections that there was no memory for */
	__u64 next_slot;
	__u64 next_text;
	__u64 skipped; /* reads that the sampling left out */
};

#endif
