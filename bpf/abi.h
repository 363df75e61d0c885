/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * abi.h - every layout that BPF programs, the Redis module and Python share.
 *
 * Python reads it from the objects' BTF (kflex_repro/bpf/btf.py), C includes it: no layout is written twice.
 * Change KFLEX_ABI whenever a structure or the meaning of a field changes.
 */
#ifndef KFLEX_ABI_H
#define KFLEX_ABI_H

#ifndef __bpf__
#include <linux/types.h>
#endif

enum kflex_abi_const {
	KFLEX_MAGIC = 0x6b666c78, /* "kflx" */
	KFLEX_ABI = 2,
	KFLEX_MAX_CPUS = 256,
	KFLEX_MAX_CONNS = 16384,
	KFLEX_TABLE_MIN_BYTES = 4 << 20,
	KFLEX_TABLE_MAX_BYTES = 1 << 30,
	KFLEX_MAX_KEY = 250,
	KFLEX_MAX_VALUE = 4096,
	KFLEX_MAX_PIPELINE = 32,   /* requests of one message that are served together */
	KFLEX_MAX_MESSAGE = 16384, /* bytes of a message, and of its replies, served in the kernel */
	KFLEX_CELL = 64,
	KFLEX_CHUNK_CELLS = 32768, /* 2 MiB of cells per element of the heap map */
	KFLEX_CHUNK_SLACK = 8192,  /* an entry that starts in a chunk's last cells ends here */
	KFLEX_SLOTS = 6,
	KFLEX_CLASSES = 11,
	KFLEX_ENTRY_HEAD = 48,
	KFLEX_NAME = 32, /* "CONTAINER|SUBCOMMAND", zero-padded */
	KFLEX_MAX_USERS = 64,
	KFLEX_USER_NAME = 64, /* longest name of a user that can be served, zero-padded */
	KFLEX_USER_OPEN = 62, /* slot: the default user, for as long as nobody needs a password for it */
	KFLEX_USER_NONE = 63, /* slot: a user that is not known */
	KFLEX_UNPAIRED = 16,  /* messages passed after which a connection that found no server's half is left alone */
	KFLEX_PARK = 512,     /* messages in a row without a GET or SET after which a connection is left alone */
};

/* Counters, per CPU (struct kflex_cpu.stat). served_* and passed count requests, why_* messages. */
enum kflex_stat {
	KFLEX_STAT_SERVED_GET,
	KFLEX_STAT_SERVED_SET,
	KFLEX_STAT_PASSED,
	KFLEX_STAT_WHY_OFF,	   /* disabled, or the rules forbid it now */
	KFLEX_STAT_WHY_NEW,	   /* first request of the connection not answered yet, or not paired */
	KFLEX_STAT_WHY_UNANSWERED, /* an earlier request still waits for Redis */
	KFLEX_STAT_WHY_UNREAD,	   /* the client has not read all of Redis's replies */
	KFLEX_STAT_WHY_MULTI,
	KFLEX_STAT_WHY_OTHER,	/* not a plain GET or SET, or not whole */
	KFLEX_STAT_WHY_SIZE,	/* key, value, pipeline or message too large */
	KFLEX_STAT_WHY_MISS,	/* GET of a key that is not in the table */
	KFLEX_STAT_WHY_GATE,	/* SET while Redis executes commands */
	KFLEX_STAT_WHY_HELD,	/* SET while a cut is being taken, or is overdue */
	KFLEX_STAT_WHY_LOCKED,	/* bucket contended */
	KFLEX_STAT_WHY_FULL,	/* no room in the table or the dirty ring */
	KFLEX_STAT_WHY_NOMEM,	/* the kernel had no page for the reply */
	KFLEX_STAT_WHY_BACKLOG, /* too many unread injected replies */
	KFLEX_STAT_WHY_CLOSING, /* TCP is not ESTABLISHED */
	KFLEX_STAT_WHY_USER,	/* the connection's user may not GET or SET every key */
	KFLEX_STAT_WHY_DEMOTED, /* messages on demoted connections */
	KFLEX_STAT_DEMOTED,	/* connections demoted */
	KFLEX_STAT_PAIRED,	/* connections paired */
	KFLEX_STAT_LOST,	/* replies that could not be delivered: the client saw an error */
	KFLEX_STAT_GATE_REPLY,	/* gate opened by a reply */
	KFLEX_STAT_GATE_SLEEP,	/* gate opened by going to sleep */
	KFLEX_STAT_EVICTED,	/* clean entries replaced by a kernel SET */
	KFLEX_STAT_PARKED,	/* connections left alone: they never ask for what the table has */
	KFLEX_STAT_RELEASED,	/* sockets of demoted and parked connections given back to plain TCP */
	KFLEX_STAT_COUNT,
};

/* Why SET, or everything, is not offloaded now (struct kflex_ctl.rules, a bit each). */
enum kflex_rule {
	KFLEX_RULE_VERSION, /* server version not known good: nothing */
	KFLEX_RULE_MODULE,  /* another module is loaded: nothing */
	KFLEX_RULE_CLUSTER, /* cluster mode: nothing */
	KFLEX_RULE_REPLICA, /* is a replica: nothing */
	KFLEX_RULE_AUTH,    /* no user may GET or SET every key: nothing */
	KFLEX_RULE_RENAMED, /* GET or SET renamed or disabled: nothing */
	KFLEX_RULE_TIMEOUT, /* timeout != 0: nothing */
	KFLEX_RULE_MONITOR, /* a MONITOR client: nothing */
	KFLEX_RULE_PAUSED,  /* CLIENT PAUSE or FAILOVER: nothing */
	KFLEX_RULE_LOADING, /* loading a dataset: nothing */
	KFLEX_RULE_RECHECK, /* an administrative command is running: nothing */
	/* These forbid SET only. */
	KFLEX_RULE_APPENDFSYNC = 16, /* appendonly yes with appendfsync always */
	KFLEX_RULE_MAXMEMORY,
	KFLEX_RULE_MIN_REPLICAS,
	KFLEX_RULE_NOTIFY,	/* notify-keyspace-events */
	KFLEX_RULE_REPLICAS,	/* replicas connected (WAIT would lie) */
	KFLEX_RULE_DISK,	/* stop-writes-on-bgsave-error after a failed save */
	KFLEX_RULE_AOF_ERROR,	/* failed AOF write */
	KFLEX_RULE_TRACKING,	/* a client-side-caching client */
	KFLEX_RULE_SET_SETTING, /* switched off by the module's own setting */
	KFLEX_RULE_JOURNAL,	/* the AOF does not name this table yet: SETs could not be recovered */
	KFLEX_RULE_COUNT,
};

enum kflex_mode { KFLEX_MODE_COHERENT = 1, KFLEX_MODE_STORE = 2 };
enum kflex_allow { KFLEX_ALLOW_GET = 1, KFLEX_ALLOW_SET = 2 };

/* Why the disable word is set. */
enum kflex_disable {
	KFLEX_ON = 0,
	KFLEX_DETACHED = 1,    /* no module has taken the table yet, or it has given it back */
	KFLEX_STOPPING = 2,    /* offload stop */
	KFLEX_SERVER_GONE = 3, /* the main thread of the server has ended or called exec */
	KFLEX_UNLOADED = 4,    /* module unloaded or server shutting down */
};

enum kflex_state {
	KFLEX_FREE,
	KFLEX_CLEAN,   /* same as in Redis */
	KFLEX_PENDING, /* in a cut that is not known to be in Redis, and in its AOF, yet */
	KFLEX_DIRTY,   /* accepted by the kernel, in no cut yet */
	KFLEX_ORPHAN,  /* unlinked by a newer SET while a cut was due: the drainer applies and frees it */
	KFLEX_DROPPED, /* unlinked by Redis while PENDING: kept for recovery until its cut is confirmed */
};

/* A value and its key. At least two cells; the key follows the head, padded to 8 bytes, then the value. */
struct kflex_entry {
	__u32 state; /* enum kflex_state */
	__u32 epoch;
	__u16 klen;
	__u16 vlen;
	__u8 cls;
	__u8 clock; /* read since the hand passed */
	__u16 rsvd;
	__u32 tag;
	__u32 bucket;
	__u64 version; /* counts the writes to this entry */
	__u64 cut;     /* generation in which it was last dirtied: the number of the cut that will hold it */
	__u32 next;    /* free list, a cell number */
	__u32 pos;     /* low half of its position in the dirty ring */
	__u8 data[];
};

struct kflex_slot {
	__u32 tag;
	__u32 cell; /* 0: empty */
};

/* One cache line. seq is a seqlock: odd while a writer is inside. */
struct kflex_bucket {
	__u32 seq;
	__u32 owner; /* connection number + 1 of the kernel writer, or KFLEX_OWNER_MODULE */
	__u32 hand;
	__u32 rsvd;
	struct kflex_slot slot[KFLEX_SLOTS];
};

struct kflex_cpu {
	__u64 active; /* programs between accepting a SET and having it in the table */
	__u64 rsvd[7];
	__u64 stat[40]; /* enum kflex_stat */
};

/* The control block: words that change together share a cache line, others do not. */
struct kflex_ctl {
	/* From here to start_time: in the same place in every version. */
	__u32 magic;
	__u32 abi;
	__u32 mode; /* enum kflex_mode */
	__u32 pid;  /* of the server, in the initial pid namespace */
	__u32 tid;  /* its main thread */
	__u32 port;
	__u64 start_time; /* of the server's main thread, clock ticks since boot (/proc/PID/stat field 22) */
	__u64 seed;	  /* of the key hash */
	__u32 chunks;	  /* heap map elements */
	__u32 buckets;	  /* power of two */
	__u32 ring;	  /* power of two */
	__u32 cpus;	  /* possible CPUs */

	__u32 disabled __attribute__((aligned(64))); /* enum kflex_disable */
	__u32 allow;				     /* enum kflex_allow bits */
	__u32 epoch;				     /* clean entries of another epoch are stale */
	__u32 rules;				     /* enum kflex_rule bits */

	__u32 gate __attribute__((aligned(64))); /* 1: SETs may be accepted */
	__u32 armed;				 /* 1: the next reply or sleep of the main thread opens the gate */
	__u32 hold;				 /* 1: a generation is being flipped */
	__u32 rsvd0;
	__u64 gen; /* generation that new SETs belong to */

	__u64 head __attribute__((aligned(64))); /* dirty ring: next position to write */
	__u64 oldest_ns;			 /* CLOCK_MONOTONIC of the first SET since the last cut */

	__u64 tail __attribute__((aligned(64))); /* dirty ring: first position not in a cut */
	__u64 journal_head;			 /* first position whose cut is not known to be written */

	__u64 bump __attribute__((aligned(64))); /* next cell never used */
	__u64 free[KFLEX_CLASSES];		 /* per class: ABA count << 32 | first free cell */

	/* Written by the module. Times in ns. */
	__u64 drained __attribute__((aligned(64)));
	__u64 cuts;
	__u64 populated;
	__u64 invalidated;
	__u64 epoch_bumps;
	__u64 open_commands; /* commands seen with the gate open: must stay 0 */
	__u64 dirty_age_max;
	__u64 dirty_age_sum;
	__u64 wait_max; /* longest wait for active programs */
	__u64 open_ns;	/* time with the gate open, in the iterations that were sampled */
	__u64 total_ns; /* time of those iterations */
	__u64 refused;	/* drained SETs that Redis refused: must stay 0 */
	__u64 evicted;	/* clean entries reclaimed by the module */
	__u64 sleeps;	/* iterations of the event loop */

	/* Crash recovery. */
	__u64 table_id __attribute__((aligned(64))); /* random; the name of the table's markers in the AOF */
	__u64 journal_cut;			     /* newest cut known to be in the AOF */
	__u64 last_cut;				     /* newest cut applied */
	__u64 aof_ino;				     /* of the file that the server appends to, 0: no AOF */
	__u32 aof_fd;				     /* its number in the server */
	__u32 durable;				     /* 1: with AOF, nothing acknowledged may be lost */
	__u64 death_ino;			     /* of the file behind aof_fd when the server ended, 0: not seen */
	__u64 death_size;			     /* its size in bytes then */
	__u64 recovered;			     /* entries that a later server took over; 0: none yet */

	/* Users: slot 0 is "default". A name keeps its slot as long as the table lives. */
	__u32 user_allow[KFLEX_MAX_USERS] __attribute__((aligned(64))); /* enum kflex_allow bits, on every key */
	/* Odd: no password is needed. Changes with every command that may change that. */
	__u32 default_open;
	__u32 users; /* names in user[], at most KFLEX_USER_OPEN */
	char user[KFLEX_MAX_USERS][KFLEX_USER_NAME];

	struct kflex_cpu cpu[KFLEX_MAX_CPUS] __attribute__((aligned(64)));
};

#define KFLEX_OWNER_MODULE 0xffffffffu

/*
 * What the toolkit and the module say to each other over AF_UNIX (one message each way; fds ride along). Its size, magic,
 * verb and status are the same in every version, and so is KFLEX_DETACH: any toolkit can take any offload off.
 */
enum kflex_verb { KFLEX_ATTACH = 1, KFLEX_DETACH = 2, KFLEX_QUERY = 3, KFLEX_CLIENTS = 4 };
struct kflex_msg {
	__u32 magic;
	__u32 abi;
	__u32 verb;
	__s32 status; /* reply: 0, or a negative errno */
	__u32 sizeof_ctl;
	__u32 sizeof_entry;
	__u32 sizeof_bucket;
	__u32 attached;
	__u64 table_size; /* reply: the setting kflex.table-size, bytes, 0: auto */
	__u64 cursor;	  /* KFLEX_CLIENTS: ids above this; reply: the last one listed, 0: there are no more */
	__u64 count;	  /* KFLEX_CLIENTS: at most so many, 0: as many as the module likes */
	__u64 gil_ns;	  /* reply to KFLEX_CLIENTS: how long Redis stood still for it */
	char text[192];
};

/* ---- private to the BPF programs from here on; Python's status reads some of it ---- */

enum kflex_conn_flag {
	KFLEX_C_DEMOTED = 1, /* client side saw something it cannot follow */
	KFLEX_C_MULTI = 2,
	KFLEX_C_SENT = 4,    /* expect is valid */
	KFLEX_C_SECRET = 8,  /* the request at hand may hold a password */
	KFLEX_S_DEMOTED = 1, /* server side likewise */
	KFLEX_S_OWNED = 2,   /* a reply was sent by the attached server */
	KFLEX_S_SENT = 4,
};

/* Resumable RESP framing: at any byte the state is complete. */
struct kflex_parser {
	__u32 skip;	 /* bulk bytes (CRLF included) still to come */
	__u32 remaining; /* elements still to come of the current frame */
	__u32 num;
	__u32 argn; /* requests: bulk strings seen */
	__u32 argc;
	__u32 frames; /* complete frames */
	__u8 st;
	__u8 type;
	__u8 neg;
	__u8 push;     /* replies: the frame is a push, not a reply */
	__u8 cmd;      /* requests: enum kflex_cmd_flag of the command */
	__u8 user_arg; /* AUTH, HELLO: argument that is a user's name, 0: none */
	__u8 opt_arg;  /* HELLO: argument that is an option's name, 0: none */
	__u8 rsvd;
};

/* A request of the message at hand. */
struct kflex_desc {
	__u8 set;
	__u8 slot;
	__u8 inplace;
	__u8 cls;
	__u16 klen;
	__u16 vlen;
	__u32 koff; /* from the message's first byte */
	__u32 voff;
	__u32 tag;
	__u32 bucket;
	__u32 cell; /* found (GET) or to be written (SET) */
	__u32 old;  /* SET: entry that the new one replaces, 0: none */
	__u32 seq;  /* GET: of the bucket when found */
	__u32 rlen; /* bytes of its reply */
};

struct kflex_conn {
	/* client's program */
	__u32 cflags;
	__u32 requests; /* passed to Redis */
	__u32 expect;	/* write_seq that the next message must find */
	__u32 injected; /* replies since the ingress queue was last seen empty */
	__u32 injected_bytes;
	__u32 idle;	   /* messages passed since the last GET or SET */
	__u32 unpaired;	   /* messages passed while no server's half was known */
	__u32 plan_n;	   /* requests of the message at hand */
	__u32 plan_sets;   /* of them SETs */
	__u32 plan_reply;  /* bytes of all their replies */
	__u32 plan_active; /* counted in as a writer */
	__u32 user;	   /* slot of struct kflex_ctl.user; the server's program changes it */
	__u32 auth_at;	   /* ordinal of the AUTH, HELLO AUTH or DISCARD that waits for its reply, 0: none */
	__u32 auth_user;   /* slot that it asks for, KFLEX_AUTH_KEEPS, KFLEX_AUTH_DISCARD */
	__u32 proof_at;	   /* ordinal of a request that only an authenticated connection may make, 0: none */
	__u32 proof_gen;   /* ctl.default_open when it was sent */
	__u32 adopted;
	__u64 served;
	__u64 passed; /* messages */
	struct kflex_parser req;
	/* server's program */
	__u32 sflags __attribute__((aligned(64)));
	__u32 replies;
	__u32 s_wseq; /* server's write_seq after its last reply */
	__u32 s_expect;
	struct kflex_parser rep;
	/* sockops */
	__u32 refs __attribute__((aligned(64)));
	__u32 paired;
	__u32 c_isn;
	__u32 s_isn;
	__u32 family;
	__u32 ports;	 /* client's port << 16 | server's */
	__u32 client[4]; /* addresses, IPv4 as v4-mapped, network order */
	__u32 server[4];
	/* scratch of the client's program */
	__u8 hdr[336] __attribute__((aligned(64)));
	__u64 key[32];
	__u64 addr[2];		    /* of the message: client's, server's */
	__u8 win[2][64];	    /* parse windows: likewise */
	__u8 name[KFLEX_NAME + 16]; /* of the command at hand */
	struct kflex_desc desc[KFLEX_MAX_PIPELINE];
};

/* What became of a connection that is to be adopted. */
enum kflex_adoption {
	KFLEX_A_UNSEEN,	 /* no established server socket with these addresses: it is being closed */
	KFLEX_A_SERVER,	 /* the server's half is ready; no client socket on this host */
	KFLEX_A_DONE,	 /* adopted */
	KFLEX_A_ALREADY, /* was enrolled before */
	KFLEX_A_BUSY,	 /* a request or a reply is under way */
	KFLEX_A_FOREIGN, /* one of its sockets belongs to another connection of ours, or to another sockmap */
	KFLEX_A_FULL,	 /* all connection numbers are taken */
};

/* A connection for the toolkit's list: what kflex_list writes. */
struct kflex_conn_info {
	__u32 conn;
	__u32 cflags;
	__u32 sflags;
	__u32 paired;
	__u32 requests;
	__u32 idle;
	__u32 user;
	__u32 adopted;
	__u64 served;
	__u64 passed;
	__u32 client[4];
	__u32 server[4];
	__u32 ports;
	__u32 family;
	char name[KFLEX_NAME]; /* of the last command that was looked at */
};

enum kflex_cmd_flag {
	KFLEX_CMD_OK = 1, /* one reply, no effect on the connection */
	KFLEX_CMD_MULTI = 2,
	KFLEX_CMD_END = 4,     /* EXEC, DISCARD */
	KFLEX_CMD_SUB = 8,     /* look at the subcommand */
	KFLEX_CMD_ZERO = 16,   /* only with the argument 0 (SELECT) */
	KFLEX_CMD_SECRET = 32, /* its arguments may be passwords */
	KFLEX_CMD_TABLE = 64,  /* GET, SET */
	KFLEX_CMD_AUTH = 128,  /* AUTH, HELLO: may change the user */
};

#define KFLEX_AUTH_DISCARD 128u /* kflex_conn.auth_user: it is no AUTH but the DISCARD of a transaction */
#define KFLEX_AUTH_KEEPS   64u	/* kflex_conn.auth_user: refused, it changes nothing (AUTH; of HELLO one cannot tell) */

#endif
