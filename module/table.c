/* SPDX-License-Identifier: BSD-3-Clause */
/* The table from the server's side. The programs' side is bpf/table.bpf.h: same layout, same locks. */
#include "kflex.h"

#include <sched.h>
#include <string.h>

struct kflex_entry *kflex_entry_at(uint32_t cell)
{
	size_t chunk = cell / KFLEX_CHUNK_CELLS, at = cell % KFLEX_CHUNK_CELLS;

	return (struct kflex_entry *)(K.heap + chunk * (KFLEX_CHUNK_CELLS * KFLEX_CELL + KFLEX_CHUNK_SLACK) +
				      at * KFLEX_CELL);
}

/* An empty table. Locks that a killed server left behind go with it. */
void kflex_table_reset(void)
{
	memset(K.buckets, 0, K.ctl->buckets * sizeof(*K.buckets));
	memset(K.ctl->free, 0, sizeof(K.ctl->free));
	K.ctl->bump = 1; /* cell 0 means "none" */
	K.ctl->head = K.ctl->tail = K.ctl->journal_head = 0;
	K.ctl->last_cut = K.ctl->journal_cut = 0;
	K.ctl->gen = 1;
	K.ctl->hold = 0;
	K.sweep = 0;
}

static uint64_t hash(const char *key, size_t len, uint32_t *bucket)
{
	uint64_t h = K.ctl->seed, word;

	for (size_t at = 0; at < len; at += 8) {
		word = 0;
		memcpy(&word, key + at, len - at < 8 ? len - at : 8);
		h = kflex_hash_word(h, word);
	}
	h = kflex_hash_end(h, (uint32_t)len);
	*bucket = (uint32_t)h & (K.ctl->buckets - 1);
	return h;
}

static void lock(struct kflex_bucket *b)
{
	for (unsigned spins = 0;; spins++) {
		uint32_t seq = LOAD(b->seq);

		if (!(seq & 1) &&
		    __atomic_compare_exchange_n(&b->seq, &seq, seq + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
			break;
		/* The holder may be a program that was preempted on this very CPU. */
		if (spins > 100)
			sched_yield();
	}
	/* Readers must see the odd seq before anything that follows. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	b->owner = KFLEX_OWNER_MODULE;
}

static void unlock(struct kflex_bucket *b)
{
	b->owner = 0;
	__atomic_fetch_add(&b->seq, 1, __ATOMIC_SEQ_CST);
}

static uint32_t cell_alloc(uint32_t cls)
{
	uint32_t cells = kflex_class_cells(cls);
	uint64_t heap_cells = (uint64_t)K.ctl->chunks * KFLEX_CHUNK_CELLS, old, new, pos;

	old = LOAD(K.ctl->free[cls]);
	while ((uint32_t)old) {
		new = ((old >> 32) + 1) << 32 | LOAD(kflex_entry_at((uint32_t)old)->next);
		if (__atomic_compare_exchange_n(&K.ctl->free[cls], &old, new, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return (uint32_t)old;
	}
	if (LOAD(K.ctl->bump) + cells > heap_cells)
		return 0;
	pos = __atomic_fetch_add(&K.ctl->bump, cells, __ATOMIC_ACQ_REL);
	if (pos + cells > heap_cells)
		return 0;
	kflex_entry_at((uint32_t)pos)->cls = (uint8_t)cls;
	return (uint32_t)pos;
}

void kflex_cell_free(uint32_t cell)
{
	struct kflex_entry *e = kflex_entry_at(cell);
	uint64_t old = LOAD(K.ctl->free[e->cls]);

	STORE(e->state, KFLEX_FREE);
	do {
		STORE(e->next, (uint32_t)old);
	} while (!__atomic_compare_exchange_n(&K.ctl->free[e->cls], &old, ((old >> 32) + 1) << 32 | cell, 0,
					      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
}

static int slot_of(struct kflex_bucket *b, uint32_t tag, const char *key, size_t len)
{
	for (int s = 0; s < KFLEX_SLOTS; s++) {
		struct kflex_entry *e;

		if (!b->slot[s].cell || b->slot[s].tag != tag)
			continue;
		e = kflex_entry_at(b->slot[s].cell);
		if (e->klen == len && !memcmp(e->data, key, len))
			return s;
	}
	return -1;
}

/*
 * The cell that ring position pos speaks of, 0 if it speaks of none any more: replaced in the same generation, or freed
 * and perhaps used anew, for which another position speaks.
 */
uint32_t kflex_cell_of(uint64_t pos)
{
	uint64_t record = LOAD(K.ring[pos & (K.ctl->ring - 1)]);

	if ((uint32_t)(record >> 32) != (uint32_t)pos || kflex_entry_at((uint32_t)record)->pos != (uint32_t)pos)
		return 0;
	return (uint32_t)record;
}

static void drop(struct kflex_bucket *b, int s)
{
	uint32_t cell = b->slot[s].cell;

	b->slot[s].cell = 0;
	/* The command that made us forget it may die with the server, unacknowledged; the SET was acknowledged. */
	if (LOAD(kflex_entry_at(cell)->state) == KFLEX_PENDING) {
		STORE(kflex_entry_at(cell)->state, KFLEX_DROPPED);
		return;
	}
	kflex_cell_free(cell);
}

/* Forgets a key: the main thread has just changed it. */
void kflex_invalidate(const char *key, size_t len)
{
	struct kflex_bucket *b;
	uint32_t bucket, tag;
	int s;

	if (len > KFLEX_MAX_KEY)
		return;
	tag = (uint32_t)(hash(key, len, &bucket) >> 32);
	b = &K.buckets[bucket];
	/* Nobody can insert now (the gate is closed), so the common case, not there, needs no lock. */
	for (s = 0; s < KFLEX_SLOTS; s++)
		if (b->slot[s].tag == tag && LOAD(b->slot[s].cell))
			break;
	if (s == KFLEX_SLOTS)
		return;
	lock(b);
	s = slot_of(b, tag, key, len);
	if (s >= 0) {
		uint32_t state = LOAD(kflex_entry_at(b->slot[s].cell)->state);

		/* The event of a cut's own SET: Redis now has what the entry holds, or held before a newer SET. */
		if (!(K.applying && (state == KFLEX_PENDING || state == KFLEX_DIRTY))) {
			drop(b, s);
			K.ctl->invalidated++;
		}
	}
	unlock(b);
}

/* A slot for a new entry: empty, stale, or clean and not read since the hand passed. */
static int free_slot(struct kflex_bucket *b)
{
	int victim = -1;

	for (int s = 0; s < KFLEX_SLOTS; s++)
		if (!b->slot[s].cell)
			return s;
	for (int s = 0; s < KFLEX_SLOTS; s++) {
		struct kflex_entry *e = kflex_entry_at(b->slot[s].cell);

		if (LOAD(e->state) != KFLEX_CLEAN)
			continue;
		if (e->clock && e->epoch == K.ctl->epoch)
			e->clock = 0;
		else
			victim = s;
	}
	if (victim >= 0) {
		drop(b, victim);
		K.ctl->evicted++;
	}
	return victim;
}

/* Main thread, gate closed: copies what Redis holds into the table. Returns 1 when it is there. */
int kflex_insert_clean(const char *key, size_t klen, const char *value, size_t vlen)
{
	struct kflex_bucket *b;
	struct kflex_entry *e;
	uint32_t bucket, tag, cell, cls, pad = ((uint32_t)klen + 7) & ~7u;
	int s, done = 0;

	if (klen > KFLEX_MAX_KEY || vlen > KFLEX_MAX_VALUE)
		return 0;
	tag = (uint32_t)(hash(key, klen, &bucket) >> 32);
	b = &K.buckets[bucket];
	lock(b);
	s = slot_of(b, tag, key, klen);
	if (s >= 0) {
		e = kflex_entry_at(b->slot[s].cell);
		if (e->epoch == K.ctl->epoch || LOAD(e->state) != KFLEX_CLEAN) {
			done = 1;
			goto out;
		}
		drop(b, s);
	} else {
		s = free_slot(b);
	}
	if (s < 0)
		goto out;
	cls = kflex_class(kflex_cells((uint32_t)klen, (uint32_t)vlen));
	cell = cell_alloc(cls);
	if (!cell)
		goto out;
	e = kflex_entry_at(cell);
	memset(e->data, 0, pad);
	memcpy(e->data, key, klen);
	memcpy(e->data + pad, value, vlen);
	e->klen = (uint16_t)klen;
	e->vlen = (uint16_t)vlen;
	e->tag = tag;
	e->bucket = bucket;
	e->clock = 1;
	e->version = 0;
	e->cut = 0;
	e->epoch = K.ctl->epoch;
	STORE(e->state, KFLEX_CLEAN);
	b->slot[s].tag = tag;
	STORE(b->slot[s].cell, cell);
	done = 1;
out:
	unlock(b);
	return done;
}

/* Reclaims stale entries, and clean ones that nobody has read since the last pass, from the next buckets. */
void kflex_sweep(uint32_t buckets)
{
	while (buckets--) {
		struct kflex_bucket *b = &K.buckets[K.sweep];

		K.sweep = (K.sweep + 1) & (K.ctl->buckets - 1);
		lock(b);
		for (int s = 0; s < KFLEX_SLOTS; s++) {
			struct kflex_entry *e;

			if (!b->slot[s].cell)
				continue;
			e = kflex_entry_at(b->slot[s].cell);
			if (LOAD(e->state) != KFLEX_CLEAN)
				continue;
			if (e->epoch == K.ctl->epoch && e->clock) {
				e->clock = 0;
				continue;
			}
			drop(b, s);
			K.ctl->evicted++;
		}
		unlock(b);
	}
}
