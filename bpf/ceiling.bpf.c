// SPDX-License-Identifier: GPL-2.0
/*
 * ceiling - a responder that looks at nothing: the fastest that the local hook can be.
 *
 * For the benchmark only. Every message that a client sends to `port` and that begins like a GET is answered by the
 * same 64 bytes, like a SET by +OK, in the client's own ingress; the rest passes. No table, no order, no gate.
 */
#include "vmlinux.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define REPLY	71 /* "$64\r\n", 64 bytes, "\r\n" */

const volatile __u32 port = 6379;

struct tuple {
	__u32 local, remote, local_port, remote_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 4096);
	__type(key, struct tuple);
	__type(value, __u64);
} clients SEC(".maps");

SEC("sockops")
int ceiling_enrol(struct bpf_sock_ops *s)
{
	struct tuple t = {s->local_ip4, s->remote_ip4, s->local_port, s->remote_port};

	if (s->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && s->family == AF_INET && bpf_ntohl(s->remote_port) == port)
		bpf_sock_hash_update(s, &clients, &t, BPF_ANY);
	return 1;
}

SEC("sk_msg")
int ceiling_answer(struct sk_msg_md *m)
{
	struct tuple t = {m->local_ip4, m->remote_ip4, m->local_port, m->remote_port};
	__u8 *p = (void *)(long)m->data, *end = (void *)(long)m->data_end;
	__u32 size = m->size, i;

	if (p + 14 > end || p[0] != '*' || p[5] != '3')
		return SK_PASS;
	if (p[8] == 'S' && p[9] == 'E') {
		*(__u32 *)p = 0x0d4b4f2b;
		p[4] = '\n';
		if (bpf_msg_pop_data(m, 5, size - 5, 0))
			return SK_DROP;
	} else if (p[8] == 'G' && p[9] == 'E') {
		if (bpf_msg_push_data(m, 0, REPLY, 0))
			return SK_PASS;
		p = (void *)(long)m->data;
		end = (void *)(long)m->data_end;
		if (p + REPLY > end)
			return SK_DROP;
		for (i = 0; i < REPLY; i++)
			p[i] = 'x';
		p[0] = '$';
		p[1] = '6';
		p[2] = '4';
		p[3] = p[69] = '\r';
		p[4] = p[70] = '\n';
		if (bpf_msg_pop_data(m, REPLY, size, 0))
			return SK_DROP;
	} else {
		return SK_PASS;
	}
	return bpf_msg_redirect_hash(m, &clients, &t, BPF_F_INGRESS);
}

char _license[] SEC("license")
= "GPL";
