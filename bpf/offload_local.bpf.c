// SPDX-License-Identifier: GPL-2.0
/*
 * offload_local - GET and SET of co-located clients, answered in the client's own sendmsg.
 *
 * kflex_enrol (sockops) pairs the two sockets of a connection; kflex_client (sk_msg on the client's socket) answers a
 * message from the table, or counts its requests and lets it pass; kflex_server (sk_msg on the server's socket) counts
 * replies and opens the gate; adopt.bpf.h takes in the connections that were there before. A reply is put into the client's own ingress queue: the request never crosses TCP.
 */
#include "maps.bpf.h"
#include "resp.bpf.h"
#include "table.bpf.h"
#include "order.bpf.h"
#include "gate.bpf.h"
#include "adopt.bpf.h"

#define MAX_DIRTY_NS	   8000000
#define MAX_INJECTED	   256
#define MAX_INJECTED_BYTES (256 * 1024)

SEC("sockops")
int kflex_enrol(struct bpf_sock_ops *s)
{
	struct kflex_ctl *k = get_ctl();
	struct kflex_link *l;
	struct bpf_sock *sk;

	if (!k)
		return 1;
	switch (s->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		if (bpf_ntohl(s->remote_port) != port || READ_ONCE(k->disabled))
			break;
		enrol_client(s);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (s->local_port != port || READ_ONCE(k->disabled))
			break;
		if (bpf_get_netns_cookie(s) != netns_cookie)
			break;
		enrol_server(s, k);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		release_socket(s, k);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		sk = s->sk;
		l = sk ? bpf_sk_storage_get(&links, sk, NULL, 0) : NULL;
		if (!l)
			break;
		if (l->server && s->args[1] != BPF_TCP_ESTABLISHED)
			leave_client(l->conn);
		if (s->args[1] == BPF_TCP_CLOSE) {
			__u32 i = l->conn;

			bpf_sk_storage_delete(&links, sk);
			conn_put(i);
		}
		break;
	}
	return 1;
}

#define HEAD 320 /* bytes of a request that hold everything but a value */

/* "*2\r\n$3\r\n" and "*3\r\n$3\r\n" as little-endian words. */
#define PREFIX_GET 0x0a0d33240a0d322aull
#define PREFIX_SET 0x0a0d33240a0d332aull

/*
 * Parses the request at byte `at` of the message that starts at kernel address addr and has size bytes; the first one's
 * head is in c->hdr already. Returns its length and fills desc[i] and c->key, or minus the reason for passing.
 */
static __always_inline int parse_request(struct kflex_conn *c, __u64 addr, __u32 at, __u32 size, __u32 i, __u64 seed)
{
	__u32 left = size - at, used = 0, klen, vlen, pos, w, tail, magic = 0;
	__u16 crlf = 0;
	__u64 n;
	struct kflex_desc *d;
	__u64 prefix, word, h = seed;
	__u32 name;
	int num;

	if (!c || at >= size)
		return -KFLEX_STAT_WHY_OTHER;
	d = &c->desc[i & (KFLEX_MAX_PIPELINE - 1)];
	n = left < HEAD ? left : HEAD;
	if (n < 19) /* "*2\r\n$3\r\nGET\r\n$0\r\n\r\n" */
		return -KFLEX_STAT_WHY_OTHER;
	if (at) {
		BOUND(n, 0x1ff);
		if (bpf_probe_read_kernel(c->hdr, n, (void *)(addr + at)))
			return -KFLEX_STAT_WHY_OTHER;
	}
	prefix = word_at(c->hdr);
	name = *(__u32 *)(c->hdr + 8);
	/* Letters differ from the other case's in bit 5; the '\r' has none of its bits there. */
	name &= 0xffdfdfdf;
	if (prefix == PREFIX_GET && name == 0x0d544547)
		d->set = 0;
	else if (prefix == PREFIX_SET && name == 0x0d544553)
		d->set = 1;
	else
		return -KFLEX_STAT_WHY_OTHER;
	if (c->hdr[12] != '\n' || c->hdr[13] != '$')
		return -KFLEX_STAT_WHY_OTHER;
	num = read_length(c, 14, &used);
	if (num < 0)
		return -KFLEX_STAT_WHY_OTHER;
	if (num > KFLEX_MAX_KEY)
		return -KFLEX_STAT_WHY_SIZE;
	klen = num;
	pos = 14 + used; /* <= 20 */
	d->klen = klen;
	d->koff = at + pos;
	if (pos + klen + 2 > n)
		return -KFLEX_STAT_WHY_OTHER;
	/* Byte by byte, which the casts mean: a word that was stored as parts of two others waits until they left the CPU. */
	for (w = 0; w < KFLEX_MAX_KEY / 8; w++) {
		if (w >= klen >> 3)
			break;
		word = *(__u64 *)&c->hdr[(pos & 31) + w * 8];
		c->key[w] = word;
		h = kflex_hash_word(h, word);
	}
	klen = forget(d->klen);
	BOUND(klen, 0xff);
	if (klen & 7) {
		w = klen >> 3;
		word = head_of(*(__u64 *)&c->hdr[(pos & 31) + w * 8], klen & 7);
		c->key[w] = word;
		h = kflex_hash_word(h, word);
	}
	h = kflex_hash_end(h, klen);
	d->tag = h >> 32;
	d->bucket = h & bucket_mask;
	pos += klen;
	if (c->hdr[pos & 0x1ff] != '\r' || c->hdr[(pos + 1) & 0x1ff] != '\n')
		return -KFLEX_STAT_WHY_OTHER;
	pos += 2;
	if (!d->set)
		return pos;
	if (pos + 6 > n || c->hdr[pos & 0x1ff] != '$')
		return -KFLEX_STAT_WHY_OTHER;
	pos++;
	num = read_length(c, pos, &used);
	if (num < 0)
		return -KFLEX_STAT_WHY_OTHER;
	if (num > KFLEX_MAX_VALUE)
		return -KFLEX_STAT_WHY_SIZE;
	vlen = num;
	pos += used;
	if (pos + vlen + 2 > left)
		return -KFLEX_STAT_WHY_OTHER;
	d->vlen = vlen;
	d->voff = at + pos;
	d->rlen = 5;
	tail = pos + vlen;
	if (tail + 2 <= n) {
		magic = *(__u32 *)&c->hdr[pos & 0x1ff];
		crlf = *(__u16 *)&c->hdr[tail & 0x1ff];
	} else {
		bpf_probe_read_kernel(&magic, 4, (void *)(addr + at + pos));
		bpf_probe_read_kernel(&crlf, 2, (void *)(addr + at + tail));
	}
	/* PFCOUNT changes a HyperLogLog's bytes without an event: keep them out of the table. */
	if (crlf != 0x0a0d || (vlen >= 4 && magic == 0x4c4c5948))
		return -KFLEX_STAT_WHY_OTHER;
	return tail + 2;
}

/* Writes the reply of GET i at byte `at` of the (altered, contiguous) message. Returns 0, or -1 if it does not fit. */
__noinline int write_value(struct sk_msg_md *m, __u32 conn, __u32 i, __u32 at)
{
	struct kflex_conn *c = bpf_map_lookup_elem(&conns, &conn);
	struct kflex_entry *e;
	struct kflex_desc *d;
	__u64 vlen, pad, hlen, off = at, head, full;
	__u8 *p, *end = msg_end(m), *v;
	__u32 b;

	if (!c || at > KFLEX_MAX_MESSAGE)
		return -1;
	d = &c->desc[i & (KFLEX_MAX_PIPELINE - 1)];
	e = entry_at(d->cell);
	if (!e)
		return -1;
	vlen = d->vlen;
	if (vlen > KFLEX_MAX_VALUE || d->klen > KFLEX_MAX_KEY)
		return -1;
	pad = ((__u32)d->klen + 7) & 0x1f8;
	v = &e->data[pad];
	if (vlen < 10) {
		head = '$' | ('0' + vlen) << 8 | 0x0a0d0000;
		hlen = 4;
	} else if (vlen < 100) {
		head = '$' | ('0' + vlen / 10) << 8 | ('0' + vlen % 10) << 16 | 0x0a0d000000;
		hlen = 5;
	} else if (vlen < 1000) {
		head = '$' | ('0' + vlen / 100) << 8 | ('0' + vlen / 10 % 10) << 16 | ('0' + vlen % 10) << 24 |
		       0x0a0d00000000;
		hlen = 6;
	} else {
		head = '$' | ('0' + vlen / 1000) << 8 | ('0' + vlen / 100 % 10) << 16 | ('0' + vlen / 10 % 10) << 24 |
		       ('0' + vlen % 10) << 32 | 0x0a0d0000000000;
		hlen = 7;
	}
	BOUND(off, 0x7fff);
	p = (__u8 *)msg_data(m) + off;
	if (p + 8 <= end) {
		*(__u64 *)p = head; /* what is too much is overwritten below, or by the next reply */
	} else {
		/* Only "$0\r\n\r\n" and "$1\r\nx\r\n" are shorter. */
		if (p + 6 > end)
			return -1;
		p[0] = head;
		p[1] = head >> 8;
		p[2] = head >> 16;
		p[3] = head >> 24;
	}
	p += hlen;
	full = vlen >> 6;
	for (b = 0; b < KFLEX_MAX_VALUE / 64; b++) {
		if (b >= full)
			break;
		if (p + 64 > end)
			return -1;
		*(__u64 *)(p + 0) = *(__u64 *)(v + 0);
		*(__u64 *)(p + 8) = *(__u64 *)(v + 8);
		*(__u64 *)(p + 16) = *(__u64 *)(v + 16);
		*(__u64 *)(p + 24) = *(__u64 *)(v + 24);
		*(__u64 *)(p + 32) = *(__u64 *)(v + 32);
		*(__u64 *)(p + 40) = *(__u64 *)(v + 40);
		*(__u64 *)(p + 48) = *(__u64 *)(v + 48);
		*(__u64 *)(p + 56) = *(__u64 *)(v + 56);
		p += 64;
		v += 64;
	}
	vlen = forget(d->vlen);
	if (vlen > KFLEX_MAX_VALUE)
		return -1;
	full = vlen & ~63ull;
	off = at + forget(d->rlen) - 2 - (vlen & 63);
	BOUND(off, 0x7fff);
	p = (__u8 *)msg_data(m) + off;
	v = &e->data[pad + full];
	full = (vlen & 63) >> 3;
	for (b = 0; b < 7; b++) {
		if (b >= full)
			break;
		if (p + 8 > end)
			return -1;
		*(__u64 *)p = *(__u64 *)v;
		p += 8;
		v += 8;
	}
	full = vlen & 7;
	for (b = 0; b < 7; b++) {
		if (b >= full)
			break;
		if (p + 1 > end)
			return -1;
		*p = *v;
		p++;
		v++;
	}
	if (p + 2 > end)
		return -1;
	p[0] = '\r';
	p[1] = '\n';
	return 0;
}

__noinline int write_ok(struct sk_msg_md *m, __u32 at)
{
	__u8 *p, *end = msg_end(m);
	__u64 off = at;

	if (at > KFLEX_MAX_MESSAGE)
		return -1;
	BOUND(off, 0x7fff);
	p = (__u8 *)msg_data(m) + off;
	if (p + 5 > end)
		return -1;
	*(__u32 *)p = 0x0d4b4f2b; /* "+OK\r" */
	p[4] = '\n';
	return 0;
}

/* The results are used so that clang emits the fetching form: only that one is a full barrier on every architecture. */
static __always_inline void enter(struct kflex_ctl *k)
{
	__u64 before = __sync_fetch_and_add(&get_cpu(k)->active, 1);

	asm volatile("" ::"r"(before));
}

static __always_inline void leave(struct kflex_ctl *k, __u32 inside)
{
	if (inside) {
		__u64 before = __sync_fetch_and_sub(&get_cpu(k)->active, 1);

		asm volatile("" ::"r"(before));
	}
}

/* May the connection's user do this on every key? To be asked after ctl.allow, which is 0 while that changes. */
static __always_inline int user_may(struct kflex_ctl *k, struct kflex_conn *c, __u32 what)
{
#ifdef KFLEX_BREAK_NO_USER
	return 1;
#else
	__u64 user = READ_ONCE(c->user);

	BOUND(user, KFLEX_MAX_USERS - 1);
	return READ_ONCE(k->user_allow[user]) & what;
#endif
}

/*
 * Counts ourselves in as a writer, then looks at the gate: whoever closes it waits for the count. Returns 0, or the
 * reason why no SET may be accepted; then nothing is counted.
 */
static __always_inline int enter_gate(struct kflex_conn *c)
{
	struct kflex_ctl *k = get_ctl();
	__u32 t;
	int why;

	if (!c || !k)
		return KFLEX_STAT_WHY_OFF;
	/* A generation is flipped within a microsecond: worth a moment. */
	for (t = 0; t < 256; t++)
		if (!READ_ONCE(k->hold))
			break;
	enter(k);
	why = KFLEX_STAT_WHY_GATE;
	if (!store && !READ_ONCE(k->gate))
		goto out;
	why = KFLEX_STAT_WHY_HELD;
	if (READ_ONCE(k->hold))
		goto out;
	/*
	 * The drain thread does not get a CPU: passing this SET wakes the main thread, which drains first. One SET in
	 * eight looks at the clock.
	 */
	if (!store && !(READ_ONCE(k->head) & 7) && READ_ONCE(k->head) != READ_ONCE(k->tail) &&
	    (__s64)(bpf_ktime_get_ns() - READ_ONCE(k->oldest_ns)) > MAX_DIRTY_NS)
		goto out;
	why = KFLEX_STAT_WHY_OFF;
	if (READ_ONCE(k->disabled) || !(READ_ONCE(k->allow) & KFLEX_ALLOW_SET))
		goto out;
	why = KFLEX_STAT_WHY_USER;
	if (!user_may(k, c, KFLEX_ALLOW_SET))
		goto out;
	why = KFLEX_STAT_WHY_FULL;
	/* Positions whose cut is not written are the journal: recovery needs them. */
	if (!store && READ_ONCE(k->head) - READ_ONCE(k->journal_head) > ring_mask / 2)
		goto out;
	return 0;
out:
	leave(k, 1);
	return why;
}

/*
 * Plans a request; at_i is its first byte << 16 | its number (BPF functions have five arguments). Returns its length, or
 * minus the reason for passing the message.
 */
__noinline int plan_request(struct kflex_conn *c, __u64 addr, __u32 at_i, __u32 size, __u32 owner)
{
	struct kflex_ctl *k = get_ctl();
	__u32 at = at_i >> 16, i = at_i & 0xffff;
	int length, r;

	if (!c || !k)
		return -KFLEX_STAT_WHY_OFF;
	length = parse_request(c, addr, at, size, i, k->seed);
	if (length < 0)
		return length;
	if (!c->desc[i & (KFLEX_MAX_PIPELINE - 1)].set) {
		if (!(READ_ONCE(k->allow) & KFLEX_ALLOW_GET))
			return -KFLEX_STAT_WHY_OFF;
		if (!user_may(k, c, KFLEX_ALLOW_GET))
			return -KFLEX_STAT_WHY_USER;
		r = table_get(c, i);
		if (r < 0)
			return r;
		c->plan_reply += r;
		return length;
	}
	if (!(READ_ONCE(k->allow) & KFLEX_ALLOW_SET))
		return -KFLEX_STAT_WHY_OFF;
	if (!user_may(k, c, KFLEX_ALLOW_SET))
		return -KFLEX_STAT_WHY_USER;
	if (!c->plan_active) {
		r = enter_gate(c);
		if (r)
			return -r;
		c->plan_active = 1;
	}
	r = table_prepare(c, i, owner);
	if (r)
		return -r;
	c->plan_reply += 5;
	c->plan_sets++;
	return length;
}

/* Gives up a plan of n requests: nothing is held any more. */
__noinline int abandon(struct kflex_conn *c, __u32 n)
{
	struct kflex_ctl *k = get_ctl();
	__u32 i;

	if (!c || !k)
		return -1;
	for (i = 0; i < KFLEX_MAX_PIPELINE; i++) {
		if (i >= n)
			break;
		if (c->desc[i].set)
			table_abort(c, i);
	}
	leave(k, c->plan_active);
	c->plan_active = 0;
	return 0;
}

/* Plans the requests after the first, which took `at` bytes. Returns 0, or the reason for passing the message. */
__noinline int plan_rest(struct kflex_conn *c, __u64 addr, __u32 at, __u32 size, __u32 owner)
{
	int r, why = KFLEX_STAT_WHY_SIZE;
	__u32 i;

	if (!c)
		return KFLEX_STAT_WHY_OFF;
	for (i = 1; i < KFLEX_MAX_PIPELINE; i++) {
		r = plan_request(c, addr, at << 16 | i, size, owner);
		if (r < 0) {
			why = -r;
			break;
		}
		c->plan_n = i + 1;
		at += r;
		if (at == size) {
			if (c->plan_reply <= KFLEX_MAX_MESSAGE)
				return 0;
			break;
		}
	}
	abandon(c, c->plan_n);
	return why;
}

/*
 * Parses the message and finds everything that its requests need. Returns 0, or the reason for passing it. Most messages
 * are one request: that one is on the shortest way, each call costs tens of nanoseconds where returns are mitigated.
 */
static __always_inline int plan_message(struct kflex_ctl *k, struct kflex_conn *c, __u64 addr, __u32 size, __u32 owner)
{
	int r;

	c->plan_sets = c->plan_reply = c->plan_active = 0;
	c->plan_n = 1;
	r = plan_request(c, addr, 0, size, owner);
	if (r == size)
		return 0;
	if (r < 0) {
		c->plan_n = 0;
		leave(k, c->plan_active);
		return -r;
	}
	return plan_rest(c, addr, r, size, owner);
}

/* Copies the message's head into c->hdr. Returns 0, or -1 for a message that is no request or not contiguous. */
static __always_inline int load_head(struct sk_msg_md *m, struct kflex_conn *c, __u64 addr, __u32 size)
{
	__u8 *p = msg_data(m), *end = msg_end(m);
	__u64 n = size, at;
	__u32 i;

	if (size < 19) /* "*2\r\n$3\r\nGET\r\n$0\r\n\r\n" */
		return -1;
	if (size > 128) {
		if (n > HEAD)
			n = HEAD;
		BOUND(n, 0x1ff);
		return bpf_probe_read_kernel(c->hdr, n, (void *)addr);
	}
	for (i = 0; i < 16; i++) {
		if (p + 8 > end)
			break;
		put_word(&c->hdr[i * 8], word_at(p));
		p += 8;
	}
	at = size - 8;
	BOUND(at, 0x7f);
	p = (__u8 *)msg_data(m) + at;
	if (p + 8 > end)
		return -1;
	put_word(&c->hdr[at], word_at(p));
	return 0;
}

/* Puts the message, now holding the replies, into the client's own ingress queue. */
static __always_inline int deliver(struct sk_msg_md *m, struct kflex_ctl *k, struct kflex_conn *c, __u32 conn)
{
	__u32 n = c->plan_n, sets = c->plan_sets;

	c->injected += n;
	c->injected_bytes += c->plan_reply;
	c->served += n;
	c->idle = 0;
	if (sets)
		count_many(k, KFLEX_STAT_SERVED_SET, sets);
	if (n != sets)
		count_many(k, KFLEX_STAT_SERVED_GET, n - sets);
	if (bpf_msg_redirect_map(m, &client_socks, conn, BPF_F_INGRESS) == SK_PASS)
		return SK_PASS;
	count(k, KFLEX_STAT_LOST);
	return SK_DROP;
}

static __always_inline void commit_all(struct kflex_conn *c, __u64 addr)
{
	__u32 i;

	for (i = 0; i < KFLEX_MAX_PIPELINE; i++) {
		if (i >= c->plan_n)
			break;
		if (c->desc[i].set)
			table_commit(c, i, addr, 0);
	}
}

/* SETs only: their replies are shorter than they are, so the message shrinks in place and no page is needed. */
static __always_inline int serve_sets(struct sk_msg_md *m, struct kflex_ctl *k, struct kflex_conn *c, __u32 conn,
				      __u64 addr)
{
	__u32 i, n = c->plan_n, size = m->size, keep = c->plan_reply;
	int lost = 0;

	if (n == 1) {
		table_commit(c, 0, addr, 1);
		lost = write_ok(m, 0);
	} else {
		commit_all(c, addr);
		for (i = 0; i < KFLEX_MAX_PIPELINE; i++) {
			if (i >= n)
				break;
			lost |= write_ok(m, i * 5);
		}
	}
	leave(k, c->plan_active);
	if (keep < size)
		lost |= bpf_msg_pop_data(m, keep, size - keep, 0);
	if (lost) {
		count(k, KFLEX_STAT_LOST);
		return SK_DROP;
	}
	return deliver(m, k, c, conn);
}

/*
 * With GETs: the replies are built in a page of their own before the requests, which are cut off last. Until a value is
 * stored everything can be undone by cutting off the page instead.
 * Returns the verdict, or minus the reason for passing.
 */
static __always_inline int serve_mixed(struct sk_msg_md *m, struct kflex_ctl *k, struct kflex_conn *c, __u32 conn,
				       __u64 addr)
{
	__u32 i, n = c->plan_n, size = m->size, reply = c->plan_reply, at = 0;
	int bad = 0;

	if (bpf_msg_push_data(m, 0, reply, 0)) {
		abandon(c, n);
		return -KFLEX_STAT_WHY_NOMEM;
	}
	if (n == 1) {
		bad = write_value(m, conn, 0, 0);
		KFLEX_BARRIER();
		bad |= table_moved(c, 0);
	} else {
		for (i = 0; i < KFLEX_MAX_PIPELINE; i++) {
			if (i >= n)
				break;
			bad |= c->desc[i].set ? write_ok(m, at) : write_value(m, conn, i, at);
			at += c->desc[i].rlen;
			if (bad)
				break;
		}
		KFLEX_BARRIER();
		bad = bad || any_moved(c, n);
	}
	/* Whoever took a right away since the plan was made may have changed the value after that. */
	bad |= !(READ_ONCE(k->allow) & KFLEX_ALLOW_GET);
	bad |= !user_may(k, c, KFLEX_ALLOW_GET);
	if (bad) {
		abandon(c, n);
		if (bpf_msg_pop_data(m, 0, reply, 0))
			return SK_DROP;
		return -KFLEX_STAT_WHY_LOCKED;
	}
	if (c->plan_sets) {
		commit_all(c, addr);
		leave(k, c->plan_active);
	}
	if (bpf_msg_pop_data(m, reply, size, 0)) {
		count(k, KFLEX_STAT_LOST);
		return SK_DROP;
	}
	return deliver(m, k, c, conn);
}

SEC("sk_msg")
int kflex_client(struct sk_msg_md *m)
{
	struct kflex_ctl *k = get_ctl();
	struct bpf_sock *sk = m->sk;
	struct kflex_link *l;
	struct kflex_conn *c;
	struct tcp_sock *tp;
	__u32 conn, size = m->size, wseq;
	__u64 addr;
	int why, r;

	if (!k || !sk)
		return SK_PASS;
	l = bpf_sk_storage_get(&links, sk, NULL, 0);
	if (!l)
		return SK_PASS;
	conn = l->conn;
	c = bpf_map_lookup_elem(&conns, &conn);
	if (!c)
		return SK_PASS;
	c->passed++;
	if (READ_ONCE(k->disabled) == KFLEX_SERVER_GONE || ((c->cflags | READ_ONCE(c->sflags)) & 1)) {
		count(k, KFLEX_STAT_WHY_DEMOTED);
		return SK_PASS;
	}
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return SK_PASS;
	wseq = tp->write_seq;
	/* TCP took less than was counted, and the rest comes again: what looks like a request may be part of a value. */
	if ((c->cflags & KFLEX_C_SENT) && c->expect != wseq) {
		demote_client(k, c);
		return SK_PASS;
	}
	why = KFLEX_STAT_WHY_OFF;
	if (READ_ONCE(k->disabled) || !READ_ONCE(k->allow))
		goto pass;
	why = in_order(c, tp);
	if (why)
		goto pass;
	why = KFLEX_STAT_WHY_SIZE;
	if (size > KFLEX_MAX_MESSAGE)
		goto pass;
	if (c->injected > MAX_INJECTED || c->injected_bytes > MAX_INJECTED_BYTES) {
		why = KFLEX_STAT_WHY_BACKLOG;
		if (!ingress_empty((struct sock *)tp))
			goto pass;
		c->injected = c->injected_bytes = 0;
	}
	if ((__u64)(long)m->data_end - (__u64)(long)m->data < size) {
		why = KFLEX_STAT_WHY_NOMEM;
		if (bpf_msg_pull_data(m, 0, size, 0))
			goto pass;
	}
	addr = message_addr(m, c, ROLE_REQUEST);
	why = KFLEX_STAT_WHY_OTHER;
	if (load_head(m, c, addr, size))
		goto pass;
	why = plan_message(k, c, addr, size, conn + 1);
	if (why)
		goto pass;
	c->passed--;
	if (c->plan_sets == c->plan_n)
		return serve_sets(m, k, c, conn, addr);
	r = serve_mixed(m, k, c, conn, addr);
	if (r >= 0)
		return r;
	c->passed++;
	why = -r;
pass:
	if (why > 0 && why < KFLEX_STAT_COUNT)
		count(k, why);
	account_request(m, k, c, wseq);
	return SK_PASS;
}

SEC("sk_msg")
int kflex_server(struct sk_msg_md *m)
{
	struct kflex_ctl *k = get_ctl();
	struct bpf_sock *sk = m->sk;
	struct kflex_link *l;
	struct kflex_conn *c;
	struct tcp_sock *tp;
	__u32 conn, wseq, before;
	int bad;

	if (!k || !sk)
		return SK_PASS;
	gate_reply(k);
	l = bpf_sk_storage_get(&links, sk, NULL, 0);
	if (!l)
		return SK_PASS;
	conn = l->conn;
	c = bpf_map_lookup_elem(&conns, &conn);
	if (!c || ((READ_ONCE(c->cflags) | c->sflags) & 1))
		return SK_PASS;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return SK_PASS;
	wseq = tp->write_seq;
	/* Two servers can listen on one port at different addresses: only the attached one's connections are served. */
	if (bpf_get_current_pid_tgid() >> 32 != k->pid || ((c->sflags & KFLEX_S_SENT) && c->s_expect != wseq)) {
		demote_server(k, c);
		return SK_PASS;
	}
	before = c->rep.frames;
	bad = feed_message(m, c, ROLE_REPLY);
	/* Replies can hold passwords, too: CONFIG GET. */
	__builtin_memset(c->win[ROLE_REPLY], 0, sizeof(c->win[ROLE_REPLY]));
	if (bad) {
		demote_server(k, c);
		return SK_PASS;
	}
	wseq += m->size;
	c->s_expect = wseq;
	WRITE_ONCE(c->s_wseq, wseq);
	c->sflags |= KFLEX_S_SENT | KFLEX_S_OWNED;
	/* The client's program reads replies first, then s_wseq. */
	__sync_fetch_and_add(&c->replies, c->rep.frames - before);
	return SK_PASS;
}

/*
 * splice() reads the receive queue only (tcp_read_sock) and would wait for ever for a reply that was put into the ingress
 * queue. Who reads that way is found at the first reply, which always comes from Redis. Runs under the socket's lock.
 */
SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(kflex_read, struct sock *sk)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf());
	struct kflex_ctl *k;
	struct kflex_link *l;
	struct kflex_conn *c;
	__u32 conn;

	if (SYSCALL_NR(regs) != SYS_SPLICE)
		return 0;
	k = get_ctl();
	l = bpf_sk_storage_get(&links, sk, NULL, 0);
	if (!k || !l || l->server)
		return 0;
	conn = l->conn;
	c = bpf_map_lookup_elem(&conns, &conn);
	if (c && !(c->cflags & KFLEX_C_DEMOTED))
		demote_client(k, c);
	return 0;
}

struct kflex_unread {
	__u32 conn;
	__u32 unread;
};

/* For `offload stop`: which clients still have injected replies to read? A record for each enrolled client socket. */
SEC("iter/sockmap")
int kflex_unread(struct bpf_iter__sockmap *ctx)
{
	struct kflex_unread record = {};
	struct sock *sk = ctx->sk;
	__u32 *key = ctx->key;

	if (!sk || !key)
		return 0;
	record.conn = *key;
	record.unread = !ingress_empty(sk);
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}

/* The message layout in the object's BTF, for Python. */
const struct kflex_msg *kflex_btf_msg;
const struct kflex_entry *kflex_btf_entry;
const enum kflex_abi_const kflex_btf_const;
const enum kflex_stat kflex_btf_stat;
const enum kflex_rule kflex_btf_rule;
const enum kflex_mode kflex_btf_mode;
const enum kflex_allow kflex_btf_allow;
const enum kflex_disable kflex_btf_disable;
const enum kflex_state kflex_btf_state;
const enum kflex_verb kflex_btf_verb;
const enum kflex_conn_flag kflex_btf_conn_flag;
const enum kflex_adoption kflex_btf_adoption;
const struct kflex_conn_info *kflex_btf_conn_info;
const enum kflex_cmd_flag kflex_btf_cmd_flag;

char _license[] SEC("license")
= "GPL";
