/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Exactly Redis's order on each connection: pairing of the two halves, counting of requests and replies, demotion.
 *
 * Each half writes its own words of struct kflex_conn, under its own socket lock; the other half only reads them.
 */
#ifndef KFLEX_ORDER_BPF_H
#define KFLEX_ORDER_BPF_H

#include "resp.bpf.h"

#define AF_INET	     2
#define AF_INET6     10
#define FEED_WINDOW  16384
#define FEED_WINDOWS 12
/* RTT: so that sockets can be released, which only a sockops program may do. */
#define CALLBACKS (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG)

static __always_inline void demote_client(struct kflex_ctl *k, struct kflex_conn *c)
{
	c->cflags |= KFLEX_C_DEMOTED;
	count(k, KFLEX_STAT_DEMOTED);
}

static __always_inline void demote_server(struct kflex_ctl *k, struct kflex_conn *c)
{
	c->sflags |= KFLEX_S_DEMOTED;
	count(k, KFLEX_STAT_DEMOTED);
}

/* The message's first byte as a plain number: only a number may be handed to a global function or kept in a map. */
static __always_inline __u64 message_addr(struct sk_msg_md *m, struct kflex_conn *c, int role)
{
	WRITE_ONCE(c->addr[role], (__u64)(long)m->data);
	return READ_ONCE(c->addr[role]);
}

/* Feeds a whole message, window by window, to one half's parser. Returns 0, or RESP_BAD to demote. */
static __always_inline int feed_message(struct sk_msg_md *m, struct kflex_conn *c, int role)
{
	struct kflex_parser *p = role == ROLE_REQUEST ? &c->req : &c->rep;
	__u32 size = m->size, at = 0, n, end, w;
	__u64 have;

	for (w = 0; w < FEED_WINDOWS; w++) {
		if (p->skip > 1 && at < size) {
			/* All but the last byte of a bulk string: the parser ends it and counts the frame. */
			n = p->skip - 1;
			if (n > size - at)
				n = size - at;
			p->skip -= n;
			at += n;
		}
		if (at >= size)
			return 0;
		have = (__u64)(long)m->data_end - (__u64)(long)m->data;
		if (at || have < size) {
			end = size - at > FEED_WINDOW ? at + FEED_WINDOW : size;
			if (bpf_msg_pull_data(m, at, end, 0))
				return RESP_BAD;
			/* data may reach beyond the range that was asked for. */
			n = (__u64)(long)m->data_end - (__u64)(long)m->data;
			if (n > end - at)
				n = end - at;
		} else {
			n = size;
		}
		if (!n)
			return RESP_BAD;
		have = message_addr(m, c, role);
		if (role == ROLE_REQUEST ? feed_request(c, have, n) : feed_reply(c, have, n))
			return RESP_BAD;
		at += n;
		if (at >= size)
			return 0;
		/* addr is written anew before it is read as an address. */
		WRITE_ONCE(c->addr[role], at);
		at = forget(c->addr[role]);
	}
	return RESP_BAD;
}

/* What the client's program copied of the message at hand: a password must not stay there. */
static __always_inline void wipe(struct kflex_conn *c)
{
	__builtin_memset(c->hdr, 0, sizeof(c->hdr));
	__builtin_memset(c->key, 0, sizeof(c->key));
	__builtin_memset(c->win[ROLE_REQUEST], 0, sizeof(c->win[ROLE_REQUEST]));
	__builtin_memset(c->name, 0, sizeof(c->name));
}

/* A message that Redis will see. */
static __always_inline void account_request(struct sk_msg_md *m, struct kflex_ctl *k, struct kflex_conn *c, __u32 wseq)
{
	__u32 before = c->req.frames, open = READ_ONCE(k->default_open);
	int bad = feed_message(m, c, ROLE_REQUEST);

	if (bad || (c->cflags & KFLEX_C_SECRET)) {
		wipe(c);
		if (is_whole(&c->req) || !(c->req.cmd & KFLEX_CMD_SECRET))
			c->cflags &= ~KFLEX_C_SECRET;
	}
	if (bad) {
		demote_client(k, c);
		return;
	}
	if (c->user == KFLEX_USER_OPEN && !(open & 1) && !READ_ONCE(c->proof_at) && c->req.frames != before) {
		c->proof_gen = open;
		WRITE_ONCE(c->proof_at, before + 1);
	}
	/* Also a connection that never pairs: its addresses were translated on the way, or another server has them. */
	if (++c->idle > KFLEX_PARK || (!READ_ONCE(c->paired) && ++c->unpaired > KFLEX_UNPAIRED)) {
		c->cflags |= KFLEX_C_DEMOTED;
		count(k, KFLEX_STAT_PARKED);
		return;
	}
	/* A request counts once it is whole; a part of one already stands in the way. */
	c->requests += c->req.frames - before;
	c->expect = wseq + m->size;
	c->cflags |= KFLEX_C_SENT;
	count_many(k, KFLEX_STAT_PASSED, c->req.frames - before);
}

/* May a reply of ours be the next thing that the client reads? Returns 0 or the reason why not. */
static __always_inline int in_order(struct kflex_conn *c, struct tcp_sock *tp)
{
	if (tp->inet_conn.icsk_inet.sk.__sk_common.skc_state != TCP_ESTABLISHED)
		return KFLEX_STAT_WHY_CLOSING;
	if (!READ_ONCE(c->paired) || !(READ_ONCE(c->sflags) & KFLEX_S_OWNED) || !c->requests)
		return KFLEX_STAT_WHY_NEW;
	if (!is_whole(&c->req))
		return KFLEX_STAT_WHY_OTHER;
#ifndef KFLEX_BREAK_NO_REPLY_COUNT
	if (READ_ONCE(c->replies) != c->requests)
		return KFLEX_STAT_WHY_UNANSWERED;
#endif
	if (c->cflags & KFLEX_C_MULTI)
		return KFLEX_STAT_WHY_MULTI;
	KFLEX_BARRIER();
	if (tp->copied_seq != READ_ONCE(c->s_wseq))
		return KFLEX_STAT_WHY_UNREAD;
	return 0;
}

/* Has the client read everything that was put into its ingress queue? */
static __always_inline int ingress_empty(struct sock *sk)
{
	struct list_head *head, *next = NULL;
	__u64 user_data = 0;

	/* sk_psock() in include/linux/skmsg.h: the low bits of sk_user_data are flags. */
	bpf_probe_read_kernel(&user_data, sizeof(user_data), &sk->sk_user_data);
	user_data &= ~7ull;
	if (!user_data)
		return 1;
	head = __builtin_preserve_access_index(&((struct sk_psock *)user_data)->ingress_msg);
	bpf_probe_read_kernel(&next, sizeof(next), &head->next);
	return next == head;
}

/* Both halves' addresses, from the client's point of view. */
static __always_inline void fill_tuple(struct bpf_sock_ops *s, struct kflex_tuple *t, int client)
{
	/* Volatile: clang would merge the branches into a load at a computed offset, which the verifier refuses. */
	volatile struct bpf_sock_ops *v = s;
	__u32 local[4], remote[4];
	int i;

	local[0] = v->local_ip6[0];
	local[1] = v->local_ip6[1];
	local[2] = v->local_ip6[2];
	local[3] = v->local_ip6[3];
	remote[0] = v->remote_ip6[0];
	remote[1] = v->remote_ip6[1];
	remote[2] = v->remote_ip6[2];
	remote[3] = v->remote_ip6[3];
	if (v->family == AF_INET) {
		local[0] = local[1] = remote[0] = remote[1] = 0;
		local[2] = remote[2] = bpf_htonl(0xffff);
		local[3] = v->local_ip4;
		remote[3] = v->remote_ip4;
	}
	for (i = 0; i < 4; i++) {
		t->client[i] = client ? local[i] : remote[i];
		t->server[i] = client ? remote[i] : local[i];
	}
	t->client_port = client ? s->local_port : bpf_ntohl(s->remote_port);
	t->server_port = client ? bpf_ntohl(s->remote_port) : s->local_port;
}

static __always_inline int is_loopback(const __u32 *a)
{
	if (a[0] || a[1])
		return 0;
	if (a[2] == bpf_htonl(0xffff))
		return (a[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a[2] && a[3] == bpf_htonl(1);
}

/*
 * Is this connection to the attached server, and direct? Others would pay for the sockmap and gain nothing. Clients may
 * live in any network namespace: only loopback means another server in each.
 */
static __always_inline int to_server(struct bpf_sock_ops *s, const struct kflex_tuple *t)
{
	struct kflex_address a;

	if (is_loopback(t->server))
		return bpf_get_netns_cookie(s) == netns_cookie;
	__builtin_memcpy(a.word, t->server, sizeof(a.word));
	return !!bpf_map_lookup_elem(&server_addrs, &a);
}

static __always_inline void conn_put(__u32 i)
{
	struct kflex_conn *c = bpf_map_lookup_elem(&conns, &i);

	/* Both halves' programs run under their own socket's lock: only the last one out may give the number back. */
	if (c && __sync_fetch_and_sub(&c->refs, 1) == 1)
		bpf_map_push_elem(&free_conns, &i, 0);
}

/* The server has hung up: nothing is answered in its name any more, also when its FIN is lost between namespaces. */
static __always_inline void leave_client(__u32 i)
{
	struct kflex_conn *c = bpf_map_lookup_elem(&conns, &i);

	if (c)
		c->sflags |= KFLEX_S_DEMOTED;
}

/*
 * Gives the socket of a demoted or parked connection back to plain TCP: a sockmap costs each message about a tenth.
 * Called under the socket's own lock, now and then while data is acknowledged.
 */
static __always_inline void release_socket(struct bpf_sock_ops *s, struct kflex_ctl *k)
{
	struct bpf_sock *sk = s->sk;
	struct kflex_link *l;
	struct kflex_conn *c;
	struct tcp_sock *tp;
	__u32 i;

	if (!sk)
		return;
	l = bpf_sk_storage_get(&links, sk, NULL, 0);
	if (!l)
		return;
	i = l->conn;
	c = bpf_map_lookup_elem(&conns, &i);
	if (!c || !((READ_ONCE(c->cflags) | READ_ONCE(c->sflags)) & 1))
		return;
	if (l->server) {
		bpf_map_delete_elem(&server_socks, &i);
	} else {
		/* Taking it out drops the replies of ours that the client has not read. */
		tp = bpf_skc_to_tcp_sock(sk);
		if (!tp || !ingress_empty((struct sock *)tp))
			return;
		bpf_map_delete_elem(&client_socks, &i);
	}
	bpf_sock_ops_cb_flags_set(s, BPF_SOCK_OPS_STATE_CB_FLAG);
	count(k, KFLEX_STAT_RELEASED);
}

static __always_inline void enrol_client(struct bpf_sock_ops *s)
{
	struct kflex_link link = {}, *l;
	struct kflex_tuple t = {};
	struct bpf_sock *sk = s->sk;
	struct kflex_conn *c;
	__u32 i;

	if (!sk)
		return;
	fill_tuple(s, &t, 1);
	if (!to_server(s, &t) || bpf_map_pop_elem(&free_conns, &i))
		return;
	c = bpf_map_lookup_elem(&conns, &i);
	if (!c)
		return;
	c->cflags = c->sflags = 0;
	c->requests = c->replies = 0;
	c->injected = c->injected_bytes = 0;
	c->served = c->passed = 0;
	c->idle = c->unpaired = 0;
	c->user = KFLEX_USER_OPEN;
	c->auth_at = c->proof_at = 0;
	c->paired = 0;
	c->refs = 1;
	__builtin_memset(&c->req, 0, sizeof(c->req));
	__builtin_memset(&c->rep, 0, sizeof(c->rep));
	c->c_isn = s->snd_nxt;
	c->s_isn = s->rcv_nxt;
	c->s_wseq = s->rcv_nxt;
	c->family = s->family;
	c->ports = t.client_port << 16 | t.server_port;
	__builtin_memcpy(c->client, t.client, sizeof(c->client));
	__builtin_memcpy(c->server, t.server, sizeof(c->server));
	c->adopted = 0;
	link.conn = i;
	l = bpf_sk_storage_get(&links, sk, &link, BPF_SK_STORAGE_GET_F_CREATE);
	if (!l || bpf_sock_ops_cb_flags_set(s, CALLBACKS)) {
		conn_put(i);
		return;
	}
	if (bpf_sock_map_update(s, &client_socks, &i, BPF_ANY))
		return;
	bpf_map_update_elem(&pairs, &t, &i, BPF_ANY);
}

static __always_inline void enrol_server(struct bpf_sock_ops *s, struct kflex_ctl *k)
{
	struct kflex_link link = {.server = 1};
	struct kflex_tuple t = {};
	struct bpf_sock *sk = s->sk;
	struct kflex_conn *c;
	__u32 *found, i;

	if (!sk)
		return;
	fill_tuple(s, &t, 0);
	found = bpf_map_lookup_elem(&pairs, &t);
	if (!found)
		return;
	i = *found;
	bpf_map_delete_elem(&pairs, &t);
	c = bpf_map_lookup_elem(&conns, &i);
	/* Behind address translation the same addresses can belong to other sockets: sequence numbers tell. */
	if (!c || c->paired || c->c_isn != s->rcv_nxt || c->s_isn != s->snd_nxt)
		return;
	link.conn = i;
	__sync_fetch_and_add(&c->refs, 1);
	if (!bpf_sk_storage_get(&links, sk, &link, BPF_SK_STORAGE_GET_F_CREATE) ||
	    bpf_sock_ops_cb_flags_set(s, CALLBACKS)) {
		conn_put(i);
		return;
	}
	if (bpf_sock_map_update(s, &server_socks, &i, BPF_ANY))
		return;
	WRITE_ONCE(c->paired, 1);
	count(k, KFLEX_STAT_PAIRED);
}

#endif
