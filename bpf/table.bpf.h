/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The table: buckets of six slots under a seqlock, entries in size classes of 64-byte cells.
 *
 * Readers copy, then check that the bucket's seq has not moved. A writer holds the bucket (odd seq). What a SET needs
 * - bucket, slot, cell - is taken before anything changes, so that the whole message can still be passed to Redis.
 */
#ifndef KFLEX_TABLE_BPF_H
#define KFLEX_TABLE_BPF_H

#include "maps.bpf.h"

#define SPIN 64

static __always_inline struct kflex_entry *entry_at(__u32 cell)
{
	__u32 chunk = cell / KFLEX_CHUNK_CELLS;
	struct kflex_chunk *p = bpf_map_lookup_elem(&heap, &chunk);

	if (!p)
		return NULL;
	return (struct kflex_entry *)&p->bytes[(cell % KFLEX_CHUNK_CELLS) * KFLEX_CELL];
}

static __always_inline struct kflex_bucket *bucket_at(__u32 i)
{
	i &= bucket_mask;
	return bpf_map_lookup_elem(&buckets, &i);
}

/* A value of at most so many bytes that begins in the first bytes of the message lies within c->hdr. */
#define HDR_VALUE    128
#define HDR_VALUE_AT 63

/* Copies words until len bytes are covered, at most 32: a helper call would cost more than it saves. */
static __always_inline void copy_words(__u64 *to, __u64 *from, __u32 len)
{
	__u32 i;

	for (i = 0; i < 32; i++) {
		if (i * 8 >= len)
			break;
		to[i] = from[i];
	}
}

/* Is the key of the entry at cell the one in c->key? */
__noinline int key_equal(struct kflex_conn *c, __u32 cell, __u32 klen)
{
	struct kflex_entry *e = entry_at(cell);
	__u64 *key;
	__u32 i;

	if (!c || !e || e->klen != klen)
		return 0;
	key = (__u64 *)e->data;
	for (i = 0; i < 32; i++) {
		if (i * 8 >= klen)
			return 1;
		if (key[i] != c->key[i])
			return 0;
	}
	return 1;
}

/* The slot of bucket b that holds c->key, or KFLEX_SLOTS. */
static __always_inline __u32 find_slot(struct kflex_conn *c, __u32 b, __u32 tag, __u32 klen)
{
	struct kflex_bucket *bucket = bucket_at(b);
	__u32 i;

	if (!c || !bucket)
		return KFLEX_SLOTS;
	for (i = 0; i < KFLEX_SLOTS; i++) {
		__u32 cell = READ_ONCE(bucket->slot[i].cell);

		if (cell && bucket->slot[i].tag == tag && key_equal(c, cell, klen))
			return i;
	}
	return KFLEX_SLOTS;
}

/* Takes a cell of the class, 0 when there is none. */
__noinline __u32 cell_alloc(__u32 class)
{
	struct kflex_ctl *k = get_ctl();
	__u64 old, pos, cls = class;
	struct kflex_entry *e;
	__u32 i, cell, cells;

	if (!k || cls >= KFLEX_CLASSES)
		return 0;
	BOUND(cls, 15);
	for (i = 0; i < 16; i++) {
		old = READ_ONCE(k->free[cls]);
		cell = (__u32)old;
		if (!cell)
			break;
		e = entry_at(cell);
		if (!e)
			return 0;
		/* The count in the high half makes a head that went and came back fail the exchange. */
		pos = ((old >> 32) + 1) << 32 | READ_ONCE(e->next);
		if (__sync_val_compare_and_swap(&k->free[cls], old, pos) == old)
			return cell;
	}
	cells = kflex_class_cells(cls);
	if (READ_ONCE(k->bump) + cells > heap_cells)
		return 0;
	pos = __sync_fetch_and_add(&k->bump, cells);
	if (pos + cells > heap_cells)
		return 0;
	e = entry_at(pos);
	if (!e)
		return 0;
	e->cls = cls;
	return pos;
}

__noinline int cell_free(__u32 cell)
{
	struct kflex_ctl *k = get_ctl();
	struct kflex_entry *e = entry_at(cell);
	__u64 old, cls;
	__u32 i;

	if (!k || !e || !cell)
		return -1;
	cls = e->cls;
	if (cls >= KFLEX_CLASSES)
		return -1;
	BOUND(cls, 15);
	WRITE_ONCE(e->state, KFLEX_FREE);
	for (i = 0; i < 1024; i++) {
		old = READ_ONCE(k->free[cls]);
		WRITE_ONCE(e->next, (__u32)old);
		if (__sync_val_compare_and_swap(&k->free[cls], old, ((old >> 32) + 1) << 32 | cell) == old)
			return 0;
	}
	return -1; /* leaked: found again when the table is laid anew */
}

/* Waits a little for bucket b to be free. Returns its seq, odd when it is not. */
__noinline __u32 bucket_wait(__u32 b)
{
	struct kflex_bucket *bucket = bucket_at(b);
	__u32 i, seq = 1;

	if (!bucket)
		return 1;
	for (i = 0; i < SPIN; i++) {
		seq = READ_ONCE(bucket->seq);
		if (!(seq & 1))
			break;
	}
	return seq;
}

/* Locks the bucket for connection `owner`. Returns 0 or the reason why not. */
static __always_inline int bucket_lock(struct kflex_bucket *bucket, __u32 b, __u32 owner)
{
	__u32 seq = READ_ONCE(bucket->seq);

	/* An earlier request of the same message may hold it. */
	if (seq & 1) {
		if (READ_ONCE(bucket->owner) == owner)
			return KFLEX_STAT_WHY_LOCKED;
		seq = bucket_wait(b);
	}
	if (seq & 1 || __sync_val_compare_and_swap(&bucket->seq, seq, seq + 1) != seq)
		return KFLEX_STAT_WHY_LOCKED;
	bucket->owner = owner;
	return 0;
}

static __always_inline int bucket_unlock(__u32 b)
{
	struct kflex_bucket *bucket = bucket_at(b);

	if (!bucket)
		return -1;
	bucket->owner = 0;
	__sync_fetch_and_add(&bucket->seq, 1);
	return 0;
}

/*
 * GET: finds the key (in c->key, hashed by the parser) and notes cell, value length and the bucket's seq in request i.
 * Returns the length of the reply in bytes, or minus the reason for passing.
 */
static __always_inline int table_get(struct kflex_conn *c, __u32 i)
{
	struct kflex_ctl *k = get_ctl();
	struct kflex_bucket *bucket;
	struct kflex_entry *e;
	struct kflex_desc *d;
	__u32 t, seq, vlen, cell;
	__u64 slot;

	if (!k)
		return -KFLEX_STAT_WHY_MISS;
	d = &c->desc[i & (KFLEX_MAX_PIPELINE - 1)];
	bucket = bucket_at(d->bucket);
	if (!bucket)
		return -KFLEX_STAT_WHY_MISS;
	for (t = 0; t < 3; t++) {
		seq = READ_ONCE(bucket->seq);
		if (seq & 1)
			seq = bucket_wait(d->bucket);
		if (seq & 1)
			break;
		KFLEX_BARRIER();
		slot = find_slot(c, d->bucket, d->tag, d->klen);
		if (slot >= KFLEX_SLOTS) {
			KFLEX_BARRIER();
			if (READ_ONCE(bucket->seq) != seq)
				continue;
			return -KFLEX_STAT_WHY_MISS;
		}
		cell = READ_ONCE(bucket->slot[slot].cell);
		e = entry_at(cell);
		if (!e)
			return -KFLEX_STAT_WHY_MISS;
		vlen = e->vlen;
		if (e->epoch != READ_ONCE(k->epoch))
			return -KFLEX_STAT_WHY_MISS;
		if (!e->clock)
			e->clock = 1;
		KFLEX_BARRIER();
		if (READ_ONCE(bucket->seq) != seq)
			continue;
		if (vlen > KFLEX_MAX_VALUE)
			return -KFLEX_STAT_WHY_MISS;
		d->cell = cell;
		d->seq = seq;
		d->vlen = vlen;
		d->rlen = vlen + 5 + (vlen < 10 ? 1 : vlen < 100 ? 2 : vlen < 1000 ? 3 : 4);
		return d->rlen;
	}
	return -KFLEX_STAT_WHY_LOCKED;
}

/* Has the bucket of GET i moved since it was found? */
static __always_inline int table_moved(struct kflex_conn *c, __u32 i)
{
	struct kflex_bucket *bucket;
	struct kflex_desc *d;

	if (!c)
		return 1;
	d = &c->desc[i & (KFLEX_MAX_PIPELINE - 1)];
	bucket = bucket_at(d->bucket);
	return !bucket || READ_ONCE(bucket->seq) != d->seq;
}

/* Has that of any GET of the first n requests? A function of its own, and so followed by the verifier only once. */
__noinline int any_moved(struct kflex_conn *c, __u32 n)
{
	__u32 i;

	if (!c)
		return 1;
	for (i = 0; i < KFLEX_MAX_PIPELINE; i++) {
		if (i >= n)
			break;
		if (!c->desc[i].set && table_moved(c, i))
			return 1;
	}
	return 0;
}

/*
 * SET: locks the bucket of c->key and finds where the value will go. Nothing that a reader sees changes.
 * Returns 0, or the reason for passing (then nothing is held).
 */
__noinline int table_prepare(struct kflex_conn *c, __u32 i, __u32 owner)
{
	struct kflex_ctl *k = get_ctl();
	struct kflex_bucket *bucket;
	struct kflex_entry *e;
	struct kflex_desc *d;
	__u64 slot, victim = KFLEX_SLOTS;
	__u32 s, cell, cls, state;
	int why;

	if (!c || !k)
		return KFLEX_STAT_WHY_FULL;
	d = &c->desc[i & (KFLEX_MAX_PIPELINE - 1)];
	cls = kflex_class(kflex_cells(d->klen, d->vlen));
	d->cls = cls;
	d->old = 0;
	bucket = bucket_at(d->bucket);
	if (!bucket)
		return KFLEX_STAT_WHY_FULL;
	why = bucket_lock(bucket, d->bucket, owner);
	if (why)
		return why;
	why = KFLEX_STAT_WHY_FULL;
	slot = find_slot(c, d->bucket, d->tag, d->klen);
	if (slot < KFLEX_SLOTS) {
		cell = bucket->slot[slot].cell;
		e = entry_at(cell);
		if (!e)
			goto unlock;
		d->slot = slot;
		/* A value that waits for its cut must survive until the cut has been taken. */
		state = READ_ONCE(e->state);
		if (e->cls == cls && !(state == KFLEX_DIRTY && e->cut != k->gen)) {
			d->inplace = 1;
			d->cell = cell;
			return 0;
		}
		d->inplace = 0;
		d->old = cell;
		d->cell = cell_alloc(cls);
		if (d->cell)
			return 0;
		goto unlock;
	}
	d->inplace = 0;
	for (s = 0; s < KFLEX_SLOTS; s++) {
		if (!bucket->slot[s].cell) {
			d->slot = s;
			d->cell = cell_alloc(cls);
			if (d->cell)
				return 0;
			break;
		}
	}
	/* Second chance: replace a clean entry that nobody has read lately; best one whose cell fits. */
	for (s = 0; s < KFLEX_SLOTS; s++) {
		cell = bucket->slot[s].cell;
		e = cell ? entry_at(cell) : NULL;
		if (!e || READ_ONCE(e->state) != KFLEX_CLEAN)
			continue;
		if (e->clock && e->epoch == k->epoch) {
			e->clock = 0;
			continue;
		}
		if (e->cls == cls) {
			d->slot = s;
			d->cell = cell;
			d->old = 0;
			d->inplace = 2;
			count(k, KFLEX_STAT_EVICTED);
			return 0;
		}
		victim = s;
	}
	if (victim < KFLEX_SLOTS) {
		d->cell = cell_alloc(cls);
		if (d->cell) {
			d->slot = victim;
			d->old = bucket->slot[victim].cell;
			count(k, KFLEX_STAT_EVICTED);
			return 0;
		}
	}
unlock:
	bucket_unlock(d->bucket);
	return why;
}

/* Undoes table_prepare. */
__noinline int table_abort(struct kflex_conn *c, __u32 i)
{
	struct kflex_desc *d;

	if (!c)
		return -1;
	d = &c->desc[i & (KFLEX_MAX_PIPELINE - 1)];
	if (!d->inplace)
		cell_free(d->cell);
	bucket_unlock(d->bucket);
	return 0;
}

/*
 * Stores request i, whose message begins at kernel address addr, and releases its bucket. Cannot fail. `only`: it is the
 * message's only request, so c->key and c->hdr are still its own.
 */
__noinline int table_commit(struct kflex_conn *c, __u32 i, __u64 addr, int only)
{
	struct kflex_ctl *k = get_ctl();
	struct kflex_bucket *bucket;
	struct kflex_entry *e, *old;
	struct kflex_slot *in;
	struct kflex_desc *d;
	__u64 klen, vlen, pad, pos, slot;
	__u32 at, was;

	if (!c || !k)
		return -1;
	d = &c->desc[i & (KFLEX_MAX_PIPELINE - 1)];
	bucket = bucket_at(d->bucket);
	e = entry_at(d->cell);
	if (!bucket || !e)
		return -1;
	klen = d->klen;
	vlen = d->vlen;
	slot = d->slot;
	if (klen > KFLEX_MAX_KEY || vlen > KFLEX_MAX_VALUE || slot >= KFLEX_SLOTS)
		return -1;
	pad = (klen + 7) & 0x1f8;
	was = KFLEX_FREE;
	if (d->inplace == 1) {
		was = READ_ONCE(e->state);
	} else {
		if (only) {
			copy_words((__u64 *)e->data, c->key, klen);
		} else {
			if (pad) {
				at = pad - 8;
				*(__u64 *)&e->data[at & 0xf8] = 0;
			}
			BOUND(klen, 0xff);
			bpf_probe_read_kernel(e->data, klen, (void *)(addr + d->koff));
		}
		e->klen = klen;
		e->tag = d->tag;
		e->bucket = d->bucket;
		e->version = 0;
		e->clock = 1;
	}
	BOUND(pad, 0x1f8);
	BOUND(vlen, 0x1fff);
	/* Whole words: the rest of the last one stays within the entry's last cell. */
	if (only && vlen <= HDR_VALUE && d->voff <= HDR_VALUE_AT)
		copy_words((__u64 *)&e->data[pad], (__u64 *)&c->hdr[d->voff & 0x3f], vlen);
	else
		bpf_probe_read_kernel(&e->data[pad], vlen, (void *)(addr + d->voff));
	e->vlen = vlen;
	e->version++;
	e->epoch = READ_ONCE(k->epoch);
	if (store) {
		WRITE_ONCE(e->state, KFLEX_CLEAN);
	} else {
		e->cut = READ_ONCE(k->gen);
		if (was != KFLEX_DIRTY) {
			pos = __sync_fetch_and_add(&k->head, 1);
			if (pos == READ_ONCE(k->tail))
				k->oldest_ns = bpf_ktime_get_ns();
			e->pos = pos;
			WRITE_ONCE(e->state, KFLEX_DIRTY);
			at = pos & ring_mask;
			__u64 *r = bpf_map_lookup_elem(&ring, &at);
			if (r)
				*r = (pos << 32) | d->cell;
		}
	}
	if (d->inplace != 1) {
		slot = __builtin_offsetof(struct kflex_bucket, slot) + slot * sizeof(*in);
		BOUND(slot, 0x38); /* all slots' offsets, and nothing beyond the bucket */
		in = (void *)bucket + slot;
		in->tag = d->tag;
		WRITE_ONCE(in->cell, d->cell);
		if (d->old) {
			old = entry_at(d->old);
			if (old) {
				if (READ_ONCE(old->state) == KFLEX_DIRTY && old->cut != k->gen &&
				    __sync_val_compare_and_swap(&old->state, KFLEX_DIRTY, KFLEX_ORPHAN) == KFLEX_DIRTY)
					;
				else
					cell_free(d->old);
			}
		}
	}
	bucket_unlock(d->bucket);
	return 0;
}

#endif
