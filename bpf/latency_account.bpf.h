/* SPDX-License-Identifier: GPL-2.0 */
/* What latency.bpf.c does with a whole request, a whole reply, and both together: counters, histograms, events. */
#ifndef KFLEX_LATENCY_ACCOUNT_BPF_H
#define KFLEX_LATENCY_ACCOUNT_BPF_H

#include "latency_maps.bpf.h"

/* --- texts: only with events ---------------------------------------------------------------------------------------- */

static __always_inline __u32 text_new(void)
{
	struct kflex_lat_totals *t = get_totals();
	struct text *x;
	__u32 id, i;

	if (!t)
		return 0;
	id = (__u32)__sync_fetch_and_add(&t->next_text, 1) + 1;
	i = id & text_mask;
	x = bpf_map_lookup_elem(&texts, &i);
	if (!x || !id)
		return 0;
	x->id = id;
	x->len = 0;
	return id;
}

static __always_inline struct text *text_of(__u32 id)
{
	__u32 i = id & text_mask;
	struct text *x = id ? bpf_map_lookup_elem(&texts, &i) : NULL;

	return x && x->id == id ? x : NULL;
}

static __always_inline void text_add(__u32 id, __u64 from, __u64 bytes)
{
	struct text *x = text_of(id);
	__u64 len;

	if (!x)
		return;
	len = x->len;
	if (len >= KFLEX_LAT_TEXT)
		return;
	if (bytes > KFLEX_LAT_TEXT - len)
		bytes = KFLEX_LAT_TEXT - len;
	BOUND(len, KFLEX_LAT_TEXT - 1);
	BOUND(bytes, KFLEX_LAT_TEXT * 2 - 1);
	if (bytes <= KFLEX_LAT_TEXT && !bpf_probe_read_user(&x->bytes[len], bytes, (void *)from))
		x->len = len + bytes;
}

/* --- names ------------------------------------------------------------------------------------------------------- */

/* Upper-cases eight ASCII letters at once. */
static __always_inline __u64 upper(__u64 w)
{
	__u64 lower = (w + 0x1f1f1f1f1f1f1f1full) & ~(w + 0x0505050505050505ull) & 0x8080808080808080ull;

	return w - (lower >> 2);
}

/* Only what can be a command's name gets counters of its own: a garbage stream must not use them up. */
static __always_inline bool plausible(struct conn *c)
{
	__u8 *text = (__u8 *)c->name, ch;
	int i;

	if (!c->rq.name_len || c->rq.name_len > KFLEX_LAT_NAME)
		return false;
	for (i = 0; i < KFLEX_LAT_NAME; i++) {
		ch = text[i];
		if (!ch)
			break;
		if (!((ch >= 'A' && ch <= 'Z') || (ch >= '0' && ch <= '9') || ch == '.' || ch == '-' || ch == '_'))
			return false;
	}
	return i == c->rq.name_len;
}

/* Sets last_slot and last_flags by c->name; slot 0 is everybody else's. */
__noinline int command_find(struct conn *c)
{
	struct kflex_lat_totals *t = get_totals();
	struct kflex_lat_known *k, fresh = {};
	struct kflex_lat_name name;
	__u32 slot;

	if (!c || !t)
		return 0;
	c->last[0] = c->name[0];
	c->last[1] = c->name[1];
	c->last[2] = c->name[2];
	c->last_slot = 0;
	c->last_flags = KFLEX_LAT_F_OTHER;
	c->name[0] = upper(c->name[0]);
	c->name[1] = upper(c->name[1]);
	c->name[2] = upper(c->name[2]);
	__builtin_memcpy(&name, c->name, sizeof(name));
	if (c->rq.name_len > KFLEX_LAT_NAME)
		return 0;
	k = bpf_map_lookup_elem(&names, &name);
	if (!k) {
		if (t->next_slot >= KFLEX_LAT_SLOTS / 2 || !plausible(c))
			return 0;
		bpf_map_update_elem(&names, &name, &fresh, BPF_NOEXIST);
		k = bpf_map_lookup_elem(&names, &name);
		if (!k)
			return 0;
	}
	slot = k->slot;
	if (!slot) {
		slot = __sync_fetch_and_add(&t->next_slot, 1) + 1;
		slot = __sync_val_compare_and_swap(&k->slot, 0, slot) ?: slot;
	}
	c->last_slot = slot;
	c->last_flags = k->flags;
	return 0;
}

/* The name of the request at hand is complete. */
static __always_inline void command_known(struct conn *c)
{
	if (c->name[0] == c->last[0] && c->name[1] == c->last[1] && c->name[2] == c->last[2] && c->last_flags &&
	    !(c->last_flags & KFLEX_LAT_F_OTHER))
		return;
	command_find(c);
}

static __always_inline bool key_wanted(__u64 addr, __u64 bytes, __u32 there)
{
	__u8 key[KFLEX_LAT_PREFIX] = {};
	__u64 n = prefix_len;
	__u32 i;

	if (prefix_whole ? bytes != n : bytes < n)
		return false;
	/* A key that is split over reads is judged by what is there. */
	if (n > there)
		n = there;
	BOUND(n, KFLEX_LAT_PREFIX - 1);
	if (bpf_probe_read_user(key, n, (void *)addr))
		return false;
	for (i = 0; i < KFLEX_LAT_PREFIX - 1; i++) {
		if (i >= n)
			break;
		if (key[i] != prefix[i])
			return false;
	}
	return true;
}

/* --- requests ------------------------------------------------------------------------------------------------------- */

static __always_inline struct kflex_lat_command *command_at(__u32 slot)
{
	struct kflex_lat_command *m = bpf_map_lookup_elem(&commands, &slot);

	if (m)
		return m;
	slot = 0;
	return bpf_map_lookup_elem(&commands, &slot);
}

static __always_inline void request_done(struct conn *c, struct feed *f)
{
	__u64 bytes = c->rq.bytes + f->pos - f->start;
	__u32 flags = c->last_flags, slot = c->last_slot;
	struct kflex_lat_command *m;
	struct pending *p;

	if (c->rq.unwanted || (only_wanted && !(flags & KFLEX_LAT_F_WANTED)) || (prefix_len && c->rq.args < 2)) {
		slot = IGNORED;
		m = NULL;
	} else {
		m = command_at(slot);
		if (!m)
			return;
		m->calls++;
		m->bytes_in += bytes;
	}
	if (flags & KFLEX_LAT_F_SUBSCRIBE)
		c->flags |= C_SUBSCRIBED;
	if (flags & KFLEX_LAT_F_STREAM)
		c->flags |= C_DEAF;
	if (c->flags & (C_MUTE | C_DEAF)) {
		if (m)
			m->untimed++;
		return;
	}
	if (!events && c->next != c->first && !c->over && !(flags & KFLEX_LAT_F_SUBSCRIBE)) {
		p = PENDING(c, c->next - 1);
		if (p->slot == slot && p->turn == c->turn && p->read == c->read) {
			p->count++;
			return;
		}
	}
	if (c->over || c->next - c->first >= KFLEX_LAT_PENDING) {
		c->over++;
		if (m)
			m->untimed++;
		if (events && m)
			COUNT(dropped);
		return;
	}
	/* Usually one waits: always the same entry then, which is in the cache. */
	if (c->first == c->next)
		c->first = c->next = 0;
	p = PENDING(c, c->next);
	p->arrival = c->arrival;
	p->read = c->read;
	p->turn = c->turn;
	p->bytes = bytes;
	p->text = c->rq.text;
	p->argc = c->rq.args;
	p->count = 1;
	p->slot = slot;
	p->flags = c->reads_whole | (flags & KFLEX_LAT_F_BLOCKS ? P_WAITS : 0);
	p->due = 1;
	if (flags & KFLEX_LAT_F_SUBSCRIBE) {
		p->flags |= P_CONFIRMED;
		if (c->rq.args > 2)
			p->due = c->rq.args - 1;
	}
	c->next++;
}

/* --- replies -------------------------------------------------------------------------------------------------------- */

static __always_inline __u32 log2_of(__u64 v)
{
	__u32 r = 0;

	if (v >> 32) {
		v >>= 32;
		r = 32;
	}
	if (v >> 16) {
		v >>= 16;
		r += 16;
	}
	if (v >> 8) {
		v >>= 8;
		r += 8;
	}
	if (v >> 4) {
		v >>= 4;
		r += 4;
	}
	if (v >> 2) {
		v >>= 2;
		r += 2;
	}
	return r + (v >> 1);
}

/* Logarithmic, with 2^SUB_BITS linear steps in each power of two. */
static __always_inline __u32 bucket_of(__u64 v)
{
	__u32 e, i;

	if (v < (1 << KFLEX_LAT_SUB_BITS))
		return v;
	e = log2_of(v) - KFLEX_LAT_SUB_BITS;
	i = ((e + 1) << KFLEX_LAT_SUB_BITS) + ((v >> e) & ((1 << KFLEX_LAT_SUB_BITS) - 1));
	return i < KFLEX_LAT_BUCKETS ? i : KFLEX_LAT_BUCKETS - 1;
}

static __always_inline void histogram(struct kflex_lat_command *m, int phase, __u64 v, __u64 n)
{
	__u32 i = bucket_of(v);

	if (i < KFLEX_LAT_BUCKETS)
		m->buckets[phase][i] += n;
	m->sum[phase] += v * n;
	if (v > m->max[phase])
		m->max[phase] = v;
}

struct split {
	__u64 phase[KFLEX_LAT_PHASES];
};

static __always_inline void split(struct conn *c, struct pending *p, __u64 now, struct split *s)
{
	__u64 total = now > p->arrival ? now - p->arrival : 0, queue = p->read > p->arrival ? p->read - p->arrival : 0;
	__u64 exec = 0, end, rest;
	struct turns *t;
	__u32 server = c->server;

	if (queue > total)
		queue = total;
	rest = total - queue;
	if (p->flags & P_SPANS) {
		exec = rest;
	} else if (!(p->flags & P_WAITS)) {
		t = bpf_map_lookup_elem(&turns, &server);
		if (t && (__u32)t->seq - p->turn < KFLEX_LAT_TURNS && (__u32)t->seq - p->turn > 1) {
			end = t->at[(p->turn + 1) & (KFLEX_LAT_TURNS - 1)];
			exec = end > p->read ? end - p->read : 0;
			if (exec > rest)
				exec = rest;
		}
	}
	s->phase[KFLEX_LAT_TOTAL] = total;
	s->phase[KFLEX_LAT_QUEUE] = queue;
	s->phase[KFLEX_LAT_EXEC] = exec;
	s->phase[KFLEX_LAT_REPLY] = rest - exec;
}

__noinline int emit(struct conn *c, __u32 which, __u64 now, __u64 bytes_out, __u32 kind)
{
	struct kflex_lat_totals *t = get_totals();
	struct kflex_lat_event *e;
	struct pending *p;
	struct record *r;
	struct split s;
	struct text *x = NULL;
	__u64 n, m;
	__u32 zero = 0;

	if (!c || !t)
		return 0;
	r = bpf_map_lookup_elem(&records, &zero);
	if (!r)
		return 0;
	e = &r->event;
	p = PENDING(c, which);
	e->at = now;
	e->conn = c->id;
	e->pid = c->pid;
	e->server = c->server;
	e->kind = kind;
	e->bytes_out = bytes_out;
	e->request_len = 0;
	if (kind == KFLEX_LAT_K_REPLY) {
		split(c, p, now, &s);
		if (s.phase[KFLEX_LAT_TOTAL] < slower_than)
			return 0;
		__builtin_memcpy(e->phase, s.phase, sizeof(e->phase));
		e->bytes_in = p->bytes;
		e->argc = p->argc;
		e->slot = p->slot;
		x = text_of(p->text);
		if (!x) {
			/* Overwritten by so many requests that came since. */
			__sync_fetch_and_add(&t->dropped, 1);
			return 0;
		}
	} else {
		__builtin_memset(e->phase, 0, sizeof(e->phase));
		e->bytes_in = 0;
		e->argc = 0;
		e->slot = 0;
	}
	n = 0;
	if (x) {
		n = x->len;
		BOUND(n, KFLEX_LAT_TEXT * 2 - 1);
		if (n > KFLEX_LAT_TEXT)
			n = KFLEX_LAT_TEXT;
		if (bpf_probe_read_kernel(r->bytes, n, x->bytes))
			return 0;
	}
	e->request_len = n;
	m = c->rp.head_len;
	BOUND(n, KFLEX_LAT_TEXT * 2 - 1);
	BOUND(m, 127);
	if (bpf_probe_read_kernel(&r->bytes[n], m, c->head))
		return 0;
	e->reply_len = m;
	n += m + sizeof(*e);
	BOUND(n, 1023);
	if (n > sizeof(*r))
		return 0;
	/* The reader looks by the clock: waking it for each event would cost more than the event. */
	if (bpf_ringbuf_output(&ring, r, n, BPF_RB_NO_WAKEUP))
		__sync_fetch_and_add(&t->dropped, 1);
	else
		__sync_fetch_and_add(&t->events, 1);
	return 0;
}

/* Accounts the replies to the first pending entry that this write brought. */
__noinline int settle(struct conn *c, struct feed *f)
{
	struct kflex_lat_command *m;
	struct pending *p;
	struct split s;
	__u64 n;

	if (!c || !f)
		return 0;
	p = PENDING(c, c->first);
	n = f->done;
	f->done = 0;
	if (p->slot != IGNORED) {
		m = command_at(p->slot);
		if (m) {
			split(c, p, f->now, &s);
			m->answered += n;
			m->errors += f->errors;
			m->bytes_out += f->bytes;
			histogram(m, KFLEX_LAT_TOTAL, s.phase[KFLEX_LAT_TOTAL], n);
			histogram(m, KFLEX_LAT_QUEUE, s.phase[KFLEX_LAT_QUEUE], n);
			histogram(m, KFLEX_LAT_EXEC, s.phase[KFLEX_LAT_EXEC], n);
			histogram(m, KFLEX_LAT_REPLY, s.phase[KFLEX_LAT_REPLY], n);
		}
	}
	f->errors = 0;
	f->bytes = 0;
	if (p->count <= n)
		c->first++;
	else
		p->count -= n;
	return 0;
}

/* A frame has been written whole: the reply to the first pending request, or nobody's. */
static __always_inline void reply_done(struct conn *c, struct feed *f)
{
	__u64 bytes = c->rp.bytes + f->pos - f->start;
	struct pending *p = PENDING(c, c->first);
	bool none = c->first == c->next, confirms = !none && p->flags & P_CONFIRMED && c->rp.sub == 2;

	if (c->rp.sub == 1 || (c->rp.sub == 2 && !confirms) || (c->rp.top == '>' && !confirms) || (none && !c->over)) {
		COUNT(pushed);
		if (events && !only_wanted && !prefix_len && !slower_than)
			emit(c, 0, f->now, bytes, KFLEX_LAT_K_PUSH);
		return;
	}
	if (none) {
		c->over--;
		return;
	}
	if (confirms && --p->due)
		return;
	f->bytes += bytes;
	if (c->rp.top == '-' || c->rp.top == '!')
		f->errors++;
	f->done++;
	if (events && p->text && p->slot != IGNORED)
		emit(c, c->first, f->now, bytes, KFLEX_LAT_K_REPLY);
	if (f->done >= p->count)
		settle(c, f);
}

#endif
