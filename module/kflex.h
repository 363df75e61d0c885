/* SPDX-License-Identifier: BSD-3-Clause */
/* kflex.so - the Redis module that keeps the kernel's table and Redis's keyspace one. See docs/offload.md. */
#ifndef KFLEX_MODULE_H
#define KFLEX_MODULE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* before any header: kflex.h comes first in each file */
#endif

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "abi.h"
#include "hash.h"
#include "redismodule.h"

#define KFLEX_MAX_REMEMBERED 256

/* Everything here is touched only by who holds the module GIL (the main thread while it runs), unless it says otherwise. */
struct kflex_module {
	int attached;
	pid_t pid; /* a forked child shares this struct, but not the mappings */

	struct kflex_ctl *ctl;
	uint8_t *heap;
	struct kflex_bucket *buckets;
	uint64_t *ring;
	size_t heap_bytes, bucket_bytes, ring_bytes;

	int applying;			/* a cut of ours is being applied: its own events are not news */
	RedisModuleString *const *mset; /* keys and values of the MSET that is running, NULL: none */
	size_t mset_argc, mset_at;	/* its length, and the key that the next event is expected for */
	int slept;			/* beforeSleep has run since the journal was last checked */
	int mark_due;			/* a marker is to be written before the next sleep */
	int unmarked;			/* the AOF does not name this table yet */
	int changed;			/* commands have changed something that beforeSleep may not have written */
	uint64_t checked_ns;		/* when the journal was last checked */
	int recheck;			/* the rules must be looked at before the gate may open again */
	int queued_admin;		/* an administrative command may be in a transaction */
	uint64_t queued_checked_ns;	/* when that was last looked at */
	int renamed;			/* GET or SET does not answer to its name */
	int served_users;		/* users that may GET or SET every key */
	int monitor_possible;		/* a MONITOR was seen and not yet found gone */
	int sleeps_since_check;
	uint64_t sample_ns, armed_ns; /* of the iteration whose gate time is measured, 0: none */
	uint32_t sweep;		      /* next bucket to look at for entries to reclaim */
	uint32_t swept_epoch;

	struct {
		uint16_t len;
		char key[KFLEX_MAX_KEY];
	} remembered[KFLEX_MAX_REMEMBERED]; /* keys of GETs that Redis answered in this iteration */
	int nremembered;

	struct {
		long long drain_us; /* pause between cuts while there is work */
		long long set_offload;
		long long set_with_replicas; /* SETs are served although WAIT does not wait for them */
		long long table_size;	     /* bytes that `offload start` takes, 0: it chooses */
	} settings;
	char run_id[64];

	/* the link and drain thread */
	pthread_t thread;
	int listen_fd, wake_fd;
	atomic_int stop;
	RedisModuleCtx *ctx; /* detached; used with the GIL held */
};

extern struct kflex_module K;

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Is this the event of a key that our own MSET has just written? It comes key by key, with our very string. */
static inline int kflex_own_event(const RedisModuleString *key, RedisModuleString *const *mset, size_t argc, size_t *at)
{
	/* A key that did not exist has two events, "new" and "set". */
	for (size_t i = *at; i < argc && i <= *at + 2; i += 2) {
		if (mset[i] == key) {
			*at = i;
			return 1;
		}
	}
	return 0;
}

/* What recovery knows while it waits for the dataset, and until its own writes are written. */
struct kflex_recovery {
	int done;		   /* nothing more to look for */
	uint64_t marker_id;	   /* table that the last marker in the AOF names, 0: none met */
	uint64_t marker_cut;	   /* its number */
	unsigned tables;	   /* dead tables found that held something */
	uint64_t applied;	   /* entries brought in */
	uint64_t kept;		   /* entries that are not this dataset's, left for `offload recover` */
	char why[160];		   /* the last reason for leaving them */
	struct kflex_ctl *waiting; /* table whose entries are applied and not yet known to be written */
};

#define KFLEX_MARKER_PREFIX "\0kflex\0"
#define KFLEX_MARKER	    23 /* bytes of a marker's name: the prefix and 16 hexadecimal digits */

#define LOAD(x)	    __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)

/* table.c */
struct kflex_entry *kflex_entry_at(uint32_t cell);
void kflex_table_reset(void);
uint32_t kflex_cell_of(uint64_t pos);
void kflex_invalidate(const char *key, size_t len);
int kflex_insert_clean(const char *key, size_t klen, const char *value, size_t vlen);
void kflex_cell_free(uint32_t cell);
void kflex_sweep(uint32_t buckets);

/* drain.c */
void kflex_close_gate(void);
void kflex_wait_for_writers(struct kflex_ctl *ctl);
void kflex_drain(RedisModuleCtx *ctx, int writers_running);

/* journal.c */
void kflex_marker_name(uint64_t table_id, char name[KFLEX_MARKER + 1]);
void kflex_journal_mark(RedisModuleCtx *ctx);
void kflex_journal_confirm(void);
void kflex_journal_check(RedisModuleCtx *ctx);
int kflex_journal_behind(RedisModuleCtx *ctx);
void kflex_journal_durable(RedisModuleCtx *ctx, int durable);
void kflex_journal_forked(void);
int kflex_aof_written(RedisModuleCtx *ctx);

/* recover.c */
extern struct kflex_recovery R;
void kflex_recover_marker(RedisModuleCtx *ctx, const char *event, RedisModuleString *key);
void kflex_recover(RedisModuleCtx *ctx);
void kflex_recover_written(RedisModuleCtx *ctx);
void kflex_recover_let_go(void);

/* rules.c */
void kflex_rules_attach(RedisModuleCtx *ctx);
void kflex_rules_check(RedisModuleCtx *ctx);
void kflex_rules_add(unsigned rule);
void kflex_rules_remove(unsigned rule);
int kflex_is_admin(const char *name, size_t len, const char *sub, size_t sublen);

/* users.c */
int kflex_users_check(RedisModuleCtx *ctx);

/* settings.c */
int kflex_settings_load(RedisModuleCtx *ctx, RedisModuleString **argv, int argc);
void kflex_settings_info(RedisModuleInfoCtx *info);

/* info.c */
void kflex_info(RedisModuleInfoCtx *info, int crash);
/* adopt.c */
int kflex_clients(RedisModuleCtx *ctx, struct kflex_msg *m, int fd);
void kflex_clients_start(RedisModuleCtx *ctx);
void kflex_clients_stop(RedisModuleCtx *ctx);

/* link.c */
size_t kflex_pages(size_t bytes);
void kflex_measure(void);
void kflex_unmap(void);
int kflex_link_start(RedisModuleCtx *ctx);
void kflex_link_stop(void);
void kflex_quiet(RedisModuleCtx *ctx, unsigned why);
void kflex_detach(RedisModuleCtx *ctx, unsigned why);

#endif
