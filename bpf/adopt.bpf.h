/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Taking in connections that were there before the offload, and listing all of them.
 *
 * What must be known of a connection that is adopted: that nothing is under way on it, in TCP or in Redis. The toolkit
 *
 *   1. runs kflex_adopt_server: under the server socket's lock, its sequence numbers are noted (s_copied: the client's
 *      bytes that Redis has read, s_wseq: the bytes that Redis has sent), and it is enrolled;
 *   2. has the module list the clients: Redis itself says what it thinks of them;
 *   3. runs kflex_adopt_client: under the client socket's lock, the client has sent s_copied and has read s_wseq.
 *
 * If 3 holds, Redis has read nothing between 1 and 3 (it cannot read more than was sent), so what it said in 2 was true
 * all the time; and a client that 2 shows idle is sent nothing unless it asks. Neither Redis nor the client is held up.
 * What could still be wrong is found by the first message, which always passes: it must begin where it was noted
 * (expect) and be framed as a request, and its reply must begin at s_wseq (s_expect); else the connection is demoted.
 *
 * Then kflex_adopt_server, run again, undoes 1 where 3 did not come about, and kflex_adopt_end reports. Numbers of
 * connections in flight are held by the toolkit's own reference, which kflex_adopt_end drops: a socket may close, and its
 * number be given away, at any moment.
 */
#ifndef KFLEX_ADOPT_BPF_H
#define KFLEX_ADOPT_BPF_H

#include "order.bpf.h"

#define SOL_TCP		    6
#define TCP_BPF_SOCK_OPS_CB 1008 /* TCP_BPF_SOCK_OPS_CB_FLAGS: Linux 6.12 */
#define KFLEX_BPF_NOEXIST   1
#define KFLEX_ADOPT_BATCH   1024

struct kflex_adopt {
	__u32 conn;
	__u32 result; /* enum kflex_adoption */
	__u32 user;   /* slot */
	__u32 held;   /* the toolkit has a reference to conn */
	__u32 s_copied;
	__u32 s_wseq;
	__u32 deaf;  /* the kernel cannot tell us when its sockets close */
	__u32 fresh; /* its server socket was not enrolled before */
};

/* Of the batch at hand, filled by the toolkit. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, KFLEX_ADOPT_BATCH);
	__type(key, struct kflex_tuple);
	__type(value, struct kflex_adopt);
} adopting SEC(".maps");

/* The record of a socket's connection if it is to be adopted, NULL otherwise. */
static __always_inline struct kflex_adopt *to_adopt(struct sock_common *sk, int client)
{
	struct kflex_tuple t = {};
	__u32 near[4] = {}, far[4] = {};
	int i;

	if (sk->skc_family == AF_INET) {
		near[2] = far[2] = bpf_htonl(0xffff);
		near[3] = sk->skc_rcv_saddr;
		far[3] = sk->skc_daddr;
	} else if (sk->skc_family == AF_INET6) {
		for (i = 0; i < 4; i++) {
			near[i] = sk->skc_v6_rcv_saddr.in6_u.u6_addr32[i];
			far[i] = sk->skc_v6_daddr.in6_u.u6_addr32[i];
		}
	} else {
		return NULL;
	}
	for (i = 0; i < 4; i++) {
		t.client[i] = client ? near[i] : far[i];
		t.server[i] = client ? far[i] : near[i];
	}
	t.client_port = client ? sk->skc_num : bpf_ntohs(sk->skc_dport);
	t.server_port = client ? bpf_ntohs(sk->skc_dport) : sk->skc_num;
	return bpf_map_lookup_elem(&adopting, &t);
}

/* Whether kflex_enrol hears of the socket from now on. */
static __always_inline void listen_to(struct sock_common *sk, struct kflex_adopt *a, int flags)
{
	if (bpf_setsockopt(sk, SOL_TCP, TCP_BPF_SOCK_OPS_CB, &flags, sizeof(flags)))
		a->deaf = 1;
}

/* Puts the socket into the sockmap, at its connection's number; `known`: it may be there. Returns what became of it. */
static __always_inline __u32 enrol_socket(struct sock_common *sk, void *socks, struct kflex_adopt *a,
					  struct kflex_conn *c, struct kflex_link *link, int known, __u32 done)
{
	__u32 i = a->conn;

	if (bpf_map_update_elem(socks, &i, sk, KFLEX_BPF_NOEXIST) && !known)
		return KFLEX_A_FOREIGN;
	if (known)
		return done;
	link->conn = i;
	__sync_fetch_and_add(&c->refs, 1);
	if (!bpf_sk_storage_get(&links, sk, link, BPF_SK_STORAGE_GET_F_CREATE)) {
		__sync_fetch_and_sub(&c->refs, 1);
		bpf_map_delete_elem(socks, &i);
		return KFLEX_A_FULL;
	}
	listen_to(sk, a, CALLBACKS);
	return done;
}

/* A connection that is not adopted after all, and was nothing of ours before: its server socket is plain TCP again. */
static __always_inline void undo_server(struct sock_common *sk, struct kflex_adopt *a)
{
	struct kflex_link *l = bpf_sk_storage_get(&links, sk, NULL, 0);
	__u32 i = a->conn;

	if (!a->held || !a->fresh || !l || l->conn != i)
		return;
	bpf_map_delete_elem(&server_socks, &i);
	bpf_sk_storage_delete(&links, sk);
	listen_to(sk, a, 0);
	conn_put(i);
}

SEC("iter/tcp")
int kflex_adopt_server(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct kflex_link link = {.server = 1}, *l;
	struct kflex_adopt *a;
	struct kflex_conn *c;
	struct tcp_sock *tp;
	__u32 i;

	if (!sk || sk->skc_state != TCP_ESTABLISHED || sk->skc_num != port)
		return 0;
	a = to_adopt(sk, 0);
	if (!a || a->result == KFLEX_A_DONE)
		return 0;
	if (a->result != KFLEX_A_UNSEEN) {
		undo_server(sk, a);
		return 0;
	}
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	l = bpf_sk_storage_get(&links, sk, NULL, 0);
	if (l) {
		/* Demoted, parked, or an earlier try. */
		i = l->conn;
		c = bpf_map_lookup_elem(&conns, &i);
		if (!c || !l->server) {
			a->result = KFLEX_A_FOREIGN;
			return 0;
		}
		if (READ_ONCE(c->paired) && !((READ_ONCE(c->cflags) | READ_ONCE(c->sflags)) & 1)) {
			a->result = KFLEX_A_ALREADY;
			return 0;
		}
		if (tp->rcv_nxt != tp->copied_seq) {
			a->result = KFLEX_A_BUSY;
			return 0;
		}
		/* The client's program may run now: it looks at the flags first, then at paired. */
		WRITE_ONCE(c->paired, 0);
		KFLEX_BARRIER();
		__sync_fetch_and_add(&c->refs, 1);
	} else {
		if (tp->rcv_nxt != tp->copied_seq) {
			a->result = KFLEX_A_BUSY;
			return 0;
		}
		if (bpf_map_pop_elem(&free_conns, &i)) {
			a->result = KFLEX_A_FULL;
			return 0;
		}
		c = bpf_map_lookup_elem(&conns, &i);
		if (!c)
			return 0;
		c->refs = 1; /* the toolkit's */
		c->paired = 0;
		c->served = c->passed = 0;
		a->fresh = 1;
	}
	a->conn = i;
	a->held = 1;
	c->sflags = KFLEX_S_SENT;
	c->replies = 0;
	__builtin_memset(&c->rep, 0, sizeof(c->rep));
	c->s_expect = a->s_wseq = tp->write_seq;
	WRITE_ONCE(c->s_wseq, tp->write_seq);
	a->s_copied = tp->copied_seq;
	KFLEX_BARRIER();
	WRITE_ONCE(c->cflags, 0);
	a->result = enrol_socket(sk, &server_socks, a, c, &link, !!l, KFLEX_A_SERVER);
	return 0;
}

SEC("iter/tcp")
int kflex_adopt_client(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct kflex_link link = {}, *l;
	struct kflex_ctl *k = get_ctl();
	struct kflex_adopt *a;
	struct kflex_conn *c;
	struct tcp_sock *tp;
	__u32 i;

	if (!k || !sk || sk->skc_state != TCP_ESTABLISHED || sk->skc_dport != bpf_htons(port))
		return 0;
	a = to_adopt(sk, 1);
	if (!a || a->result != KFLEX_A_SERVER)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	i = a->conn;
	c = bpf_map_lookup_elem(&conns, &i);
	if (!tp || !c)
		return 0;
	l = bpf_sk_storage_get(&links, sk, NULL, 0);
	if (l && (l->server || l->conn != i)) {
		a->result = KFLEX_A_FOREIGN;
		return 0;
	}
	if (tp->write_seq != a->s_copied || tp->copied_seq != a->s_wseq || tp->rcv_nxt != tp->copied_seq ||
	    READ_ONCE(c->s_wseq) != a->s_wseq || READ_ONCE(c->sflags) != KFLEX_S_SENT || READ_ONCE(c->replies) ||
	    !ingress_empty((struct sock *)tp)) {
		a->result = KFLEX_A_BUSY;
		return 0;
	}
	c->cflags = KFLEX_C_SENT;
	c->expect = tp->write_seq;
	c->requests = 0;
	c->injected = c->injected_bytes = 0;
	c->idle = 0;
	c->auth_at = c->proof_at = 0;
	c->user = a->user;
	c->adopted = 1;
	__builtin_memset(&c->req, 0, sizeof(c->req));
	c->family = sk->skc_family;
	c->ports = (__u32)sk->skc_num << 16 | port;
	a->result = enrol_socket(sk, &client_socks, a, c, &link, !!l, KFLEX_A_DONE);
	if (a->result != KFLEX_A_DONE)
		return 0;
	KFLEX_BARRIER();
	WRITE_ONCE(c->paired, 1);
	count(k, KFLEX_STAT_PAIRED);
	return 0;
}

struct kflex_adopted {
	struct kflex_tuple tuple;
	__u32 result;
	__u32 deaf;
};

/* Over `adopting`: lets go of the numbers, and says what became of each. May be run any number of times. */
SEC("iter/bpf_map_elem")
int kflex_adopt_end(struct bpf_iter__bpf_map_elem *ctx)
{
	struct kflex_tuple *t = ctx->key;
	struct kflex_adopt *a = ctx->value;
	struct kflex_adopted record = {};
	struct kflex_conn *c;
	__u32 i;

	if (!t || !a)
		return 0;
	if (a->held) {
		i = a->conn;
		c = bpf_map_lookup_elem(&conns, &i);
		if (c) {
			if (a->result == KFLEX_A_DONE) {
				__builtin_memcpy(c->client, t->client, sizeof(c->client));
				__builtin_memcpy(c->server, t->server, sizeof(c->server));
			} else {
				/* As it was before, if it was. */
				c->cflags |= KFLEX_C_DEMOTED;
			}
			a->held = 0;
			conn_put(i);
		}
	}
	record.tuple = *t;
	record.result = a->result;
	record.deaf = a->deaf;
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}

/* Over `conns`: for `offload status --connections`. */
SEC("iter/bpf_map_elem")
int kflex_list(struct bpf_iter__bpf_map_elem *ctx)
{
	struct kflex_conn *c = ctx->value;
	struct kflex_conn_info record = {};
	__u32 *key = ctx->key;

	if (!key || !c || !c->refs)
		return 0;
	record.conn = *key;
	record.cflags = c->cflags;
	record.sflags = c->sflags;
	record.paired = c->paired;
	record.requests = c->requests;
	record.idle = c->idle;
	record.user = c->user;
	record.adopted = c->adopted;
	record.served = c->served;
	record.passed = c->passed;
	__builtin_memcpy(record.client, c->client, sizeof(record.client));
	__builtin_memcpy(record.server, c->server, sizeof(record.server));
	record.ports = c->ports;
	record.family = c->family;
	__builtin_memcpy(record.name, c->name, sizeof(record.name));
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}

#endif
