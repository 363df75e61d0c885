// SPDX-License-Identifier: GPL-2.0
/*
 * latency - what each Redis command takes inside the server, watched from outside: for `kflex-repro monitor`.
 *
 * Two ways to see the server's reads and writes; the loader takes one:
 *
 *   sock      sock_recv_length and sock_send_length (Linux 6.3): fire only on sockets, after the call, with the data in
 *             the server's buffer. About as cheap as looking can be.
 *   syscalls  sys_enter and sys_exit: fire on every system call of the machine, but know when a call begins.
 *
 * Both parse what was read and written. When a request's bytes arrived is said by sk_data_ready in the first way; in the
 * second by the socket itself, which notes the time of the last segment. It notes that again when it sends (also a
 * delayed ACK, 40 ms after an unread request came), so where its other note of the last segment, in jiffies, is older,
 * that one counts; and it notes it in the midst of a read, so only a read's beginning can use it.
 */
#include "latency_resp.bpf.h"

#define AF_UNIX		 1
#define AF_INET		 2
#define AF_INET6	 10
#define MSG_PEEK	 2
#define S_IFMT		 0170000
#define S_IFSOCK	 0140000
#define SK_PACING_NONE	 0
#define SERVER_NONE	 KFLEX_LAT_SERVERS
#define IOVECS		 1024
#define REQUEST_STEPS(n) ((n) + 4)

#if defined(__TARGET_ARCH_x86)
enum {
	SYS_READ = 0,
	SYS_WRITE = 1,
	SYS_CLOSE = 3,
	SYS_WRITEV = 20,
	SYS_ACCEPT = 43,
	SYS_SENDTO = 44,
	SYS_RECVFROM = 45,
	SYS_SENDMSG = 46,
	SYS_ACCEPT4 = 288,
};
#define NUMBER_OF(regs) ((regs)->orig_ax)
#define FIRST_OF(regs)	((regs)->di)
#define SECOND_OF(regs) ((regs)->si)
#define THIRD_OF(regs)	((regs)->dx)
#else
#error "only x86-64 so far"
#endif

/* Unix sockets have no port: they are known by the process that holds them. Written by the loader, 0: none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, KFLEX_LAT_SERVERS);
	__type(key, __u32);
	__type(value, __u64);
} unix_pids SEC(".maps");

const volatile bool with_unix = false;

/* --- which socket --------------------------------------------------------------------------------------------------- */

static __always_inline __u32 server_of_port(__u16 port, __u32 inode)
{
	__u32 i;

	for (i = 0; i < KFLEX_LAT_SERVERS; i++) {
		if (i >= servers)
			break;
		if (ports[i] == port && netns[i] == inode)
			return i;
	}
	return SERVER_NONE;
}

/* A cheap no for most sockets of the machine. */
static __always_inline bool is_some_port(__u16 port)
{
	__u32 i;

	for (i = 0; i < KFLEX_LAT_SERVERS; i++) {
		if (i >= servers)
			break;
		if (ports[i] == port)
			return true;
	}
	return false;
}

static __always_inline __u32 server_of_process(void)
{
	__u64 tgid = bpf_get_current_pid_tgid() >> 32, *known;
	__u32 i, key;

	for (i = 0; i < KFLEX_LAT_SERVERS; i++) {
		key = i;
		if (i >= servers)
			break;
		known = bpf_map_lookup_elem(&unix_pids, &key);
		if (known && *known == tgid)
			return i;
	}
	return SERVER_NONE;
}

/* Whether a socket may be a client's at one of the servers. */
static __always_inline bool is_ours(__u16 family, __u16 port)
{
	if (family == AF_INET || family == AF_INET6)
		return is_some_port(port);
	return with_unix && family == AF_UNIX;
}

static __always_inline void conn_begin(struct conn *c, __u32 server)
{
	struct kflex_lat_totals *t = get_totals();

	c->server = server;
	if (sample > 1) {
		c->wait = 1 + bpf_get_prandom_u32() % sample;
		if (c->wait == 1)
			c->flags |= C_TAKE;
	}
	if (t)
		c->id = __sync_fetch_and_add(&t->connections, 1) + 1;
}

/* --- when ----------------------------------------------------------------------------------------------------------- */

static __always_inline __u64 tcp_arrival(__u64 clock, __u32 last_data, __u64 now)
{
	__u32 jiffies = (__u32)bpf_jiffies64() - last_data;
	__u64 latest;

	if (clock > now || !clock)
		clock = now;
	/* Older by more than a tick than the precise note can be: that one is of something sent since. */
	if (jiffies > 1 && jiffies < 1u << 31) {
		latest = now - (jiffies - 1) * tick_ns;
		if (clock > latest)
			clock = latest - tick_ns;
	}
	return clock;
}

/* A read ends or a write begins: whatever the server executed before has ended. Returns the turn's number. */
static __always_inline __u32 turn(__u32 server, __u64 at)
{
	struct turns *t = bpf_map_lookup_elem(&turns, &server);
	__u64 seq;

	if (!t)
		return 0;
	seq = __sync_fetch_and_add(&t->seq, 1);
	t->at[seq & (KFLEX_LAT_TURNS - 1)] = at;
	t->open = 0;
	return seq;
}

/* --- sampling ------------------------------------------------------------------------------------------------------- */

/* Whoever is not looked at still ends the execution of one who is. */
static __always_inline void turn_unseen(__u32 server)
{
	struct turns *t = bpf_map_lookup_elem(&turns, &server);

	if (t && t->open)
		turn(server, bpf_ktime_get_ns());
}

static __always_inline void turn_open(__u32 server)
{
	struct turns *t = bpf_map_lookup_elem(&turns, &server);

	if (t)
		t->open = 1;
}

/*
 * Whether a read is left out. One that is taken must begin a request that nothing unanswered precedes: it is the first, or
 * there was a write since the last read (so a client that does not wait for its replies may be taken too early); and what
 * it begins is followed to its end.
 */
static __always_inline bool leaves_out(struct conn *c)
{
	__u64 blind;
	__u32 flags = c->flags;

	c->flags = (flags & ~C_WROTE) | C_READ;
	if (flags & C_SYNCED && (c->first != c->next || c->over || c->rq.st != RQ_START || c->rp.left))
		return false;
	if (flags & C_TAKE && (flags & C_WROTE || !(flags & C_READ))) {
		/* Anywhere from 1 to 2 * sample - 1, so that no rhythm of a client's is met. */
		c->wait = 1 + bpf_get_prandom_u32() % (2 * sample - 1);
		c->flags &= ~(C_TAKE | C_SYNCED);
		if (c->wait == 1)
			c->flags |= C_TAKE;
		__builtin_memset(&c->rq, 0, sizeof(c->rq));
		__builtin_memset(&c->rp, 0, sizeof(c->rp));
		c->blind = 0;
		return false;
	}
	c->flags &= ~C_SYNCED;
	if (c->wait > 1)
		c->wait--;
	if (c->wait == 1)
		c->flags |= C_TAKE;
	blind = !(c->flags & C_TAKE);
	if (blind != c->blind)
		c->blind = blind;
	if (c->arrived)
		c->arrived = 0;
	turn_unseen(c->server);
	COUNT(skipped);
	return true;
}

/* --- reads and writes ----------------------------------------------------------------------------------------------- */

static __always_inline struct feed *feed_begin(__u32 direction, __u64 addr, __u32 len)
{
	struct feed *f = bpf_map_lookup_elem(&feeds, &direction);

	if (!f)
		return NULL;
	f->addr = addr;
	f->len = len;
	f->pos = f->base = f->have = f->start = f->from = f->bad = 0;
	return f;
}

/* We do not know where requests or replies begin any more. */
static __always_inline void lose(struct conn *c)
{
	c->flags &= ~(C_SYNCED | C_SUBSCRIBED | C_MUTE);
	__builtin_memset(&c->rq, 0, sizeof(c->rq));
	__builtin_memset(&c->rp, 0, sizeof(c->rp));
	c->first = c->next;
	c->over = 0;
	COUNT(garbled);
}

/* Whether a read begins like a request: for connections that were there before us, or that we lost. */
static __always_inline bool begins(struct conn *c, __u64 addr, __u32 len)
{
	__u8 t[4] = {}, last = 0;

	if (bpf_probe_read_user(t, len < 3 ? 1 : 3, (void *)addr))
		return false;
	if (t[0] == '*')
		return len < 3 || (t[1] >= '0' && t[1] <= '9');
	/* A TLS record: handshake or data. */
	if ((t[0] == 0x16 || t[0] == 0x17) && t[1] == 3) {
		c->flags |= C_DEAF;
		COUNT(foreign);
		return false;
	}
	if (!((t[0] >= 'a' && t[0] <= 'z') || (t[0] >= 'A' && t[0] <= 'Z')))
		return false;
	return !bpf_probe_read_user(&last, 1, (void *)(addr + len - 1)) && last == '\n';
}

/* The server has read len bytes into addr. */
__noinline int on_read(struct conn *c, __u64 addr, __u32 len, __u64 began, __u64 now)
{
	__u64 who = bpf_get_current_pid_tgid();
	struct run r = {.c = c};
	struct feed *f;

	if (!c || c->flags & C_DEAF || !len)
		return 0;
	if (!(c->flags & C_SYNCED)) {
		if (!begins(c, addr, len))
			return 0;
		c->flags |= C_SYNCED;
	}
	f = feed_begin(FEED_REQUEST, addr, len);
	if (!f)
		return 0;
	c->read = now;
	c->turn = turn(c->server, began);
	c->pid = who >> 32;
	/* Threads that only read leave the execution to the main one. */
	c->reads_whole = (__u32)who != who >> 32 ? P_SPANS : 0;
	if (sample > 1)
		turn_open(c->server);
	r.f = f;
	bpf_loop(REQUEST_STEPS(len), request_step, &r, 0);
	if (f->bad) {
		lose(c);
		return 0;
	}
	c->rq.bytes += f->pos - f->start;
	if (c->rq.st != RQ_START)
		request_text(c, f, f->pos);
	return 0;
}

/* A part of what the server has written: len bytes from addr. */
__noinline int reply_part(struct conn *c, __u64 addr, __u32 len)
{
	struct run r = {.c = c};
	struct feed *f;

	if (!c || !len)
		return 0;
	f = feed_begin(FEED_REPLY, addr, len);
	if (!f)
		return 0;
	r.f = f;
	bpf_loop(len + 4, reply_step, &r, 0);
	c->rp.bytes += f->pos - f->start;
	if (c->rp.left)
		reply_text(c, f, f->pos);
	return f->bad;
}

struct vector {
	struct conn *c;
	__u64 iov;
	__u64 count;
	__u64 left;
	int bad;
};

static long vector_step(__u32 i, struct vector *v)
{
	struct iovec io = {};
	__u64 n;

	if (i >= v->count || !v->left || bpf_probe_read_user(&io, sizeof(io), (void *)(v->iov + 16ull * i)))
		return 1;
	n = io.iov_len < v->left ? io.iov_len : v->left;
	v->left -= n;
	v->bad |= reply_part(v->c, (__u64)io.iov_base, n);
	return 0;
}

/* The server has written len bytes, from a buffer, or from `count` of them that `addr` lists. */
__noinline int on_write(struct conn *c, __u64 addr, __u32 len, __u32 count, __u64 now)
{
	struct vector v = {.c = c, .iov = addr, .count = count, .left = len};
	__u32 key = FEED_REPLY;
	struct feed *f;

	if (!c || !(c->flags & C_SYNCED) || c->flags & C_DEAF || !len)
		return 0;
	f = bpf_map_lookup_elem(&feeds, &key);
	if (!f)
		return 0;
	f->now = now;
	f->done = f->errors = 0;
	f->bytes = 0;
	if (count)
		bpf_loop(IOVECS, vector_step, &v, 0);
	else
		v.bad = reply_part(c, addr, len);
	if (f->done)
		settle(c, f);
	if (v.bad)
		lose(c);
	return 0;
}

struct user_message {
	__u64 name;
	__u64 name_len;
	__u64 iov;
	__u64 count;
};

/* Where the data of a write is: 1 if there, 0 if not known. */
static __always_inline int written(__u64 nr, __u64 *addr, __u64 third, __u32 *count)
{
	struct user_message m = {};

	*count = 0;
	if (nr == SYS_WRITE || nr == SYS_SENDTO)
		return 1;
	if (nr == SYS_WRITEV) {
		*count = third;
		return 1;
	}
	if (nr != SYS_SENDMSG || bpf_probe_read_user(&m, sizeof(m), (void *)*addr))
		return 0;
	*addr = m.iov;
	*count = m.count;
	return 1;
}

/* --- by socket events ----------------------------------------------------------------------------------------------- */

static __always_inline struct conn *conn_of(struct sock *sk, bool create)
{
	struct conn *c = bpf_sk_storage_get(&conns, sk, NULL, 0);
	__u32 server;

	if (c || !create)
		return c;
	if (sk->__sk_common.skc_family == AF_UNIX)
		server = server_of_process();
	else
		server = server_of_port(sk->__sk_common.skc_num, sk->__sk_common.skc_net.net->ns.inum);
	if (server == SERVER_NONE)
		return NULL;
	c = bpf_sk_storage_get(&conns, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (c)
		conn_begin(c, server);
	else
		COUNT(no_room);
	return c;
}

SEC("tp_btf/sock_recv_length")
int BPF_PROG(kflex_recv, struct sock *sk, int ret, int flags)
{
	struct pt_regs *regs;
	struct tcp_sock *tp;
	struct conn *c;
	__u64 now, nr, arrived;

	if (!is_ours(sk->__sk_common.skc_family, sk->__sk_common.skc_num) || ret <= 0 || flags & MSG_PEEK)
		return 0;
	c = conn_of(sk, true);
	if (!c || (sample > 1 && leaves_out(c)))
		return 0;
	regs = (struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf());
	nr = NUMBER_OF(regs);
	if (nr != SYS_READ && nr != SYS_RECVFROM) {
		COUNT(foreign);
		return 0;
	}
	now = bpf_ktime_get_ns();
	arrived = c->arrived;
	tp = bpf_skc_to_tcp_sock(sk);
	/* Not told of anything new: it came about when the last read ended. A connection's first read has nothing else. */
	c->arrival = arrived ?: tp && c->read ? c->read : now;
	/* What is left came with this, if the buffer was too small for more; else since. */
	arrived = !tp || tp->rcv_nxt == tp->copied_seq ? 0 : ret == THIRD_OF(regs) ? c->arrival : now;
	if (c->arrived != arrived)
		c->arrived = arrived;
	on_read(c, SECOND_OF(regs), ret, now, now);
	return 0;
}

SEC("tp_btf/sock_send_length")
int BPF_PROG(kflex_send, struct sock *sk, int ret, int flags)
{
	struct pt_regs *regs;
	struct tcp_sock *tp;
	struct conn *c;
	__u64 now, began, addr;
	__u32 count;

	if (!is_ours(sk->__sk_common.skc_family, sk->__sk_common.skc_num) || ret <= 0)
		return 0;
	c = conn_of(sk, false);
	if (!c)
		return 0;
	if (sample > 1) {
		c->flags |= C_WROTE;
		if (!(c->flags & C_SYNCED)) {
			turn_unseen(c->server);
			return 0;
		}
	}
	regs = (struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf());
	addr = SECOND_OF(regs);
	if (!written(NUMBER_OF(regs), &addr, THIRD_OF(regs), &count))
		return 0;
	now = began = bpf_ktime_get_ns();
	/* When TCP took the data to send it, if it did so at once: about when the call began. */
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp && tp->tcp_wstamp_ns > c->read && tp->tcp_wstamp_ns < now)
		began = tp->tcp_wstamp_ns;
	turn(c->server, began);
	on_write(c, addr, ret, count, now);
	return 0;
}

/* In the context of whoever sends, or of the network's softirq. */
SEC("tp_btf/sk_data_ready")
int BPF_PROG(kflex_ready, struct sock *sk)
{
	struct tcp_sock *tp;
	struct conn *c;

	if (!is_ours(sk->__sk_common.skc_family, sk->__sk_common.skc_num) ||
	    sk->__sk_common.skc_state != TCP_ESTABLISHED)
		return 0;
	/* Whose a unix socket is only its owner can tell. */
	c = conn_of(sk, sk->__sk_common.skc_family != AF_UNIX);
	if (!c || c->arrived || (sample > 1 && c->blind))
		return 0;
	/* TCP has just looked at the clock itself. */
	tp = bpf_skc_to_tcp_sock(sk);
	c->arrived = tp ? tp->tcp_clock_cache : bpf_ktime_get_ns();
	return 0;
}

/* --- by system calls ------------------------------------------------------------------------------------------------ */

/* Connections by their socket's address, emptied when it becomes another connection's. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); /* set by the loader */
	__type(key, __u64);
	__type(value, struct conn);
} conns_by_address SEC(".maps");

struct call {
	__u64 sk;
	__u64 addr;
	__u64 third;
	__u64 began;
	__u64 arrival;
	__u32 nr;
	__u32 server;
};

/* System calls under way, by thread. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct call);
} calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct conn);
} blank SEC(".maps");

/* The socket behind a descriptor of the current process, NULL if it is none of ours. */
static __always_inline struct sock *socket_behind(__u64 fd)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **fds = BPF_CORE_READ(table, fd), *file = NULL;
	struct socket *socket;
	struct sock *sk;

	if (fd >= BPF_CORE_READ(table, max_fds) || bpf_probe_read_kernel(&file, sizeof(file), &fds[fd]) || !file)
		return NULL;
	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return NULL;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	if (!sk || !is_ours(BPF_CORE_READ(sk, __sk_common.skc_family), BPF_CORE_READ(sk, __sk_common.skc_num)))
		return NULL;
	return sk;
}

SEC("tp_btf/sys_enter")
int BPF_PROG(kflex_enter, struct pt_regs *regs, long nr)
{
	struct call call = {};
	struct tcp_sock *tp;
	struct sock *sk;
	__u32 tid;
	__u64 key;

	if (nr != SYS_READ && nr != SYS_WRITE && nr != SYS_WRITEV && nr != SYS_SENDTO && nr != SYS_RECVFROM &&
	    nr != SYS_SENDMSG && nr != SYS_CLOSE)
		return 0;
	sk = socket_behind(FIRST_OF(regs));
	if (!sk)
		return 0;
	if (nr == SYS_CLOSE) {
		key = (__u64)sk;
		bpf_map_delete_elem(&conns_by_address, &key);
		return 0;
	}
	call.server = BPF_CORE_READ(sk, __sk_common.skc_family) == AF_UNIX
			      ? server_of_process()
			      : server_of_port(BPF_CORE_READ(sk, __sk_common.skc_num),
					       BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum));
	if (call.server == SERVER_NONE)
		return 0;
	call.sk = (__u64)sk;
	call.addr = SECOND_OF(regs);
	call.third = THIRD_OF(regs);
	call.nr = nr;
	call.began = call.arrival = bpf_ktime_get_ns();
	tp = (struct tcp_sock *)sk;
	if (BPF_CORE_READ(sk, __sk_common.skc_family) != AF_UNIX)
		call.arrival = tcp_arrival(BPF_CORE_READ(tp, tcp_clock_cache),
					   BPF_CORE_READ(tp, inet_conn.icsk_ack.lrcvtime), call.began);
	tid = bpf_get_current_pid_tgid();
	bpf_map_update_elem(&calls, &tid, &call, BPF_ANY);
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(kflex_leave, struct pt_regs *regs, long ret)
{
	__u32 tid = bpf_get_current_pid_tgid(), zero = 0, count;
	__u64 now, nr = NUMBER_OF(regs), key;
	struct conn *c, *fresh;
	struct call *call;
	struct sock *sk;

	if (nr == SYS_ACCEPT || nr == SYS_ACCEPT4) {
		/* Its address may have been another connection's. */
		sk = ret >= 0 ? socket_behind(ret) : NULL;
		key = (__u64)sk;
		if (sk)
			bpf_map_delete_elem(&conns_by_address, &key);
		return 0;
	}
	call = bpf_map_lookup_elem(&calls, &tid);
	if (!call)
		return 0;
	key = call->sk;
	c = ret > 0 ? bpf_map_lookup_elem(&conns_by_address, &key) : NULL;
	if (ret > 0 && !c && (call->nr == SYS_READ || call->nr == SYS_RECVFROM)) {
		fresh = bpf_map_lookup_elem(&blank, &zero);
		if (fresh && !bpf_map_update_elem(&conns_by_address, &key, fresh, BPF_NOEXIST))
			c = bpf_map_lookup_elem(&conns_by_address, &key);
		if (c)
			conn_begin(c, call->server);
		else
			COUNT(no_room);
	}
	if (!c)
		goto out;
	now = bpf_ktime_get_ns();
	if (call->nr == SYS_READ || call->nr == SYS_RECVFROM) {
		if (sample > 1 && leaves_out(c))
			goto out;
		c->arrival = call->arrival;
		on_read(c, call->addr, ret, call->began, now);
	} else {
		turn(c->server, call->began);
		if (sample > 1)
			c->flags |= C_WROTE;
		if (written(call->nr, &call->addr, call->third, &count))
			on_write(c, call->addr, ret, count, now);
	}
out:
	bpf_map_delete_elem(&calls, &tid);
	return 0;
}

char _license[] SEC("license")
= "GPL";
