/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Bringing the kernel's SETs into Redis, in cuts.
 *
 * A cut is all SETs of one generation: what the kernel had accepted at one moment. It is applied as one MULTI/EXEC, so
 * that the AOF and replicas only ever hold states that existed. Entries of a cut are PENDING from the copy until the cut
 * is confirmed (journal.c); a SET that comes meanwhile makes them DIRTY again, for the next cut.
 */
#include "kflex.h"

#include <sched.h>
#include <string.h>
#include <unistd.h>

/* Waits until no program is between accepting a SET and having it in the table. */
void kflex_wait_for_writers(struct kflex_ctl *ctl)
{
#ifdef KFLEX_BREAK_NO_WAIT
	(void)ctl;
#else
	uint64_t began = 0;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	for (uint32_t cpu = 0; cpu < ctl->cpus; cpu++) {
		for (unsigned spins = 0; LOAD(ctl->cpu[cpu].active); spins++) {
			if (!began)
				began = now_ns();
			/* A program may have been preempted, by us even: yielding lets it finish. */
			if (spins > 1000)
				usleep(20);
			else if (spins > 50)
				sched_yield();
		}
	}
	if (began) {
		uint64_t took = now_ns() - began;

		if (took > ctl->wait_max)
			ctl->wait_max = took;
	}
#endif
}

void kflex_close_gate(void)
{
	STORE(K.ctl->armed, 0);
	STORE(K.ctl->gate, 0);
	kflex_wait_for_writers(K.ctl);
}

struct cut {
	RedisModuleString **argv; /* key, value, ... for one MSET */
	size_t argc;
	size_t keys;
	size_t refused;
};

/* Redis keeps integers as such, but only values that nobody else refers to: MSET's "v" arguments are referred to by us. */
static int looks_like_integer(const char *value, size_t len)
{
	if (!len || len > 20)
		return 0;
	for (size_t i = value[0] == '-'; i < len; i++)
		if (value[i] < '0' || value[i] > '9')
			return 0;
	return 1;
}

static void check_reply(RedisModuleCallReply *reply, struct cut *cut, size_t keys)
{
	if (!reply || RedisModule_CallReplyType(reply) == REDISMODULE_REPLY_ERROR)
		cut->refused += keys;
	if (reply)
		RedisModule_FreeCallReply(reply);
}

/* Adds an entry's key and value, as they are now, to the cut. */
static void add(RedisModuleCtx *ctx, struct cut *cut, struct kflex_entry *e)
{
	const char *key = (const char *)e->data, *value = key + ((e->klen + 7) & ~7);

	cut->keys++;
	if (looks_like_integer(value, e->vlen)) {
		/* All commands of a cut leave as one MULTI/EXEC (propagatePendingCommands of Redis 7.0). */
		check_reply(RedisModule_Call(ctx, "SET", "!bb", key, (size_t)e->klen, value, (size_t)e->vlen), cut, 1);
		return;
	}
	cut->argv[cut->argc++] = RedisModule_CreateString(NULL, key, e->klen);
	cut->argv[cut->argc++] = RedisModule_CreateString(NULL, value, e->vlen);
}

/*
 * Applies everything the kernel has accepted so far. With the GIL held; writers_running says whether the gate may be
 * open (drain thread, main thread asleep) or is closed (main thread).
 */
void kflex_drain(RedisModuleCtx *ctx, int writers_running)
{
	struct kflex_ctl *ctl = K.ctl;
	struct cut cut = {0};
	uint64_t end, pos, oldest, age, number;
	uint32_t *orphans;
	size_t norphans = 0;

	if (LOAD(ctl->head) == ctl->tail)
		return;
	if (writers_running) {
		/* Writers wait only for this flip, not for the copy: an entry of an older generation is not overwritten. */
		STORE(ctl->hold, 1);
		kflex_wait_for_writers(ctl);
	}
	end = LOAD(ctl->head);
	oldest = ctl->oldest_ns;
	ctl->oldest_ns = now_ns(); /* no SET of the next generation is older than this */
	number = __atomic_fetch_add(&ctl->gen, 1, __ATOMIC_SEQ_CST);
	if (writers_running)
		STORE(ctl->hold, 0);

	K.applying = 1;
	cut.argv = RedisModule_Alloc((end - ctl->tail) * 2 * sizeof(*cut.argv));
	orphans = RedisModule_Alloc((end - ctl->tail) * sizeof(*orphans));
	for (pos = ctl->tail; pos < end; pos++) {
		uint32_t state, dirty = KFLEX_DIRTY, cell = kflex_cell_of(pos);
		struct kflex_entry *e;

		if (!cell)
			continue;
		e = kflex_entry_at(cell);
		state = LOAD(e->state);
		if (state != KFLEX_DIRTY && state != KFLEX_ORPHAN)
			continue;
		/* A SET of the next generation does not touch it before it is PENDING. */
		add(ctx, &cut, e);
		if (state == KFLEX_ORPHAN || !__atomic_compare_exchange_n(&e->state, &dirty, KFLEX_PENDING, 0,
									  __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			orphans[norphans++] = cell;
	}
	STORE(ctl->tail, end);
	K.mset = cut.argv;
	K.mset_argc = cut.argc;
	K.mset_at = 0;
	if (cut.argc)
		check_reply(RedisModule_Call(ctx, "MSET", "!v", cut.argv, cut.argc), &cut, cut.argc / 2);
	K.mset = NULL;
	K.applying = 0;
	ctl->last_cut = number;
	if (ctl->durable)
		kflex_journal_mark(ctx);
#ifndef KFLEX_BREAK_NO_JOURNAL
	else
#endif
		kflex_journal_confirm();
	if (cut.refused) {
		ctl->refused += cut.refused;
		RedisModule_Log(ctx, "warning", "kflex: Redis refused %zu keys that the kernel had accepted",
				cut.refused);
	}
	for (size_t i = 0; i < cut.argc; i++)
		RedisModule_FreeString(NULL, cut.argv[i]);
	/* A newer SET has their keys' place, and is in the next cut. */
	for (size_t i = 0; i < norphans; i++)
		kflex_cell_free(orphans[i]);
	ctl->drained += cut.keys;
	ctl->cuts++;
	age = now_ns() - oldest;
	ctl->dirty_age_sum += age;
	if (age > ctl->dirty_age_max)
		ctl->dirty_age_max = age;
	RedisModule_Free(cut.argv);
	RedisModule_Free(orphans);
}
