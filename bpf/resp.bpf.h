/* SPDX-License-Identifier: GPL-2.0 */
/*
 * RESP framing (https://redis.io/docs/latest/develop/reference/protocol-spec/), resumable at any byte.
 *
 * Requests are counted where they pass and replies where they leave, so that a reply of ours never overtakes one of
 * Redis's. Nothing here changes a message.
 */
#ifndef KFLEX_RESP_BPF_H
#define KFLEX_RESP_BPF_H

#include "maps.bpf.h"

enum { RESP_TYPE, RESP_NUM, RESP_LF, RESP_TEXT };
enum { ROLE_REQUEST, ROLE_REPLY };

#define RESP_BAD    (-1)
#define RESP_WINDOW 64

/* Between two frames. */
static __always_inline int is_whole(struct kflex_parser *p)
{
	return !p->skip && !p->remaining && p->st == RESP_TYPE;
}

struct feed {
	struct kflex_conn *c;
	__u64 addr;
	__u32 len;
	__u32 pos;
	__u32 base; /* of the window; pos - RESP_WINDOW: none yet */
	int bad;
};

/* Upper-cases eight ASCII letters at once; other bytes stay as they are (those >= 0x80 make the name unknown). */
static __always_inline __u64 upper8(__u64 w)
{
	__u64 lower = (w + 0x1f1f1f1f1f1f1f1full) & ~(w + 0x0505050505050505ull) & 0x8080808080808080ull;

	return w - (lower >> 2);
}

/* Looks up c->name, zero-padded. Returns its flags, 0 if it is not on the list. */
__noinline int command_flags(struct kflex_conn *c)
{
	struct kflex_command name;
	__u64 *from, *to = (__u64 *)name.name;
	__u32 *flags;

	if (!c)
		return 0;
	from = (__u64 *)c->name;
	to[0] = upper8(from[0]);
	to[1] = upper8(from[1]);
	to[2] = upper8(from[2]);
	to[3] = upper8(from[3]);
	flags = bpf_map_lookup_elem(&commands, &name);
	return flags ? *flags : 0;
}

/* The slot of the user whose name is in c->key, zero-padded. */
__noinline int find_user(struct kflex_conn *c)
{
	struct kflex_ctl *k = get_ctl();
	__u64 *name;
	__u32 i;

	if (!c || !k)
		return KFLEX_USER_NONE;
	for (i = 0; i < KFLEX_USER_OPEN; i++) {
		if (i >= READ_ONCE(k->users))
			break;
		name = (__u64 *)k->user[i];
		if (!((name[0] ^ c->key[0]) | (name[1] ^ c->key[1]) | (name[2] ^ c->key[2]) | (name[3] ^ c->key[3]) |
		      (name[4] ^ c->key[4]) | (name[5] ^ c->key[5]) | (name[6] ^ c->key[6]) | (name[7] ^ c->key[7])))
			return i;
	}
	return KFLEX_USER_NONE;
}

/* What the request at hand changes is for its reply to tell. Returns 0, or RESP_BAD to demote. */
static __always_inline int await_reply(struct kflex_conn *c, struct kflex_parser *p, __u32 user)
{
	__u32 ordinal = p->frames + 1, waiting = READ_ONCE(c->auth_at);

	/* Two at a time are more than we keep. */
	if ((waiting && waiting != ordinal) || !ordinal)
		return RESP_BAD;
	c->auth_user = user;
	WRITE_ONCE(c->auth_at, ordinal);
	return 0;
}

/* The request at hand asks for another user. In a transaction its reply is one of EXEC's. */
static __always_inline int auth_begin(struct kflex_conn *c, struct kflex_parser *p, __u32 user)
{
	return c->cflags & KFLEX_C_MULTI ? RESP_BAD : await_reply(c, p, user);
}

/* "AUTH [user] password" or "HELLO [version [AUTH user password] [SETNAME name]]" begins: its name has num bytes. */
static __always_inline int auth_command(struct kflex_conn *c, struct kflex_parser *p, __u32 num)
{
	if (num == 5) {
		p->opt_arg = 3;
		return p->argc > 16 ? RESP_BAD : 0;
	}
	if (p->argc == 2)
		return auth_begin(c, p, 0 | KFLEX_AUTH_KEEPS);
	/* Other numbers of arguments are errors. */
	if (p->argc != 3)
		return 0;
	p->user_arg = 2;
	return auth_begin(c, p, KFLEX_USER_NONE | KFLEX_AUTH_KEEPS);
}

/* A user's name of num bytes. One that is split over messages, too long or not known is nobody's that is served. */
static __always_inline void auth_name(struct feed *f, __u64 num)
{
	struct kflex_conn *c = f->c;

	if (!num || num > KFLEX_USER_NAME || f->pos + num > f->len)
		return;
	__builtin_memset(c->key, 0, KFLEX_USER_NAME);
	BOUND(num, 127);
	if (!bpf_probe_read_kernel(c->key, num, (void *)(f->addr + f->pos)))
		c->auth_user = (c->auth_user & KFLEX_AUTH_KEEPS) | find_user(c);
}

/* "AUTH" and "SETNAME" as little-endian words. */
#define WORD_AUTH    0x48545541ull
#define WORD_SETNAME 0x454d414e544553ull

/* An option of HELLO. Anything odd demotes: Redis compares up to a NUL only. */
static __always_inline int hello_option(struct feed *f, struct kflex_parser *p, __u64 num)
{
	__u64 word = 0;

	if (num > 7 || f->pos + num > f->len)
		return RESP_BAD;
	BOUND(num, 7);
	if (bpf_probe_read_kernel(&word, num, (void *)(f->addr + f->pos)))
		return RESP_BAD;
	word = upper8(word);
	if (num == 4 && word == WORD_AUTH && p->argc >= p->argn + 2) {
		p->user_arg = p->argn + 1;
		p->opt_arg = p->argn + 3;
		return auth_begin(f->c, p, KFLEX_USER_NONE);
	}
	if (num == 7 && word == WORD_SETNAME && p->argc > p->argn) {
		p->opt_arg = p->argn + 2;
		return 0;
	}
	return RESP_BAD;
}

/* A bulk string of a request starts at f->pos and is num bytes long. Returns 0, or RESP_BAD to demote. */
static __always_inline int request_bulk(struct feed *f, struct kflex_parser *p)
{
	struct kflex_conn *c = f->c;
	__u64 num = p->num;
	__u32 at = 0;

	p->argn++;
	if (p->argn == 1) {
		if (num == 0 || num >= 24 || f->pos + num > f->len)
			return RESP_BAD;
		__builtin_memset(c->name, 0, sizeof(c->name));
		BOUND(num, 31);
		if (bpf_probe_read_kernel(c->name, num, (void *)(f->addr + f->pos)))
			return RESP_BAD;
		p->cmd = command_flags(c);
		if (!p->cmd)
			return RESP_BAD;
		if (p->cmd & KFLEX_CMD_TABLE)
			c->idle = 0;
		p->user_arg = p->opt_arg = 0;
		if (p->cmd & KFLEX_CMD_SECRET)
			c->cflags |= KFLEX_C_SECRET;
		if (p->cmd & KFLEX_CMD_AUTH)
			return auth_command(c, p, num);
		if ((p->cmd & KFLEX_CMD_ZERO) && p->argc != 2)
			return RESP_BAD;
		if ((p->cmd & KFLEX_CMD_SUB) && p->argc < 2)
			return RESP_BAD;
		if (p->cmd & KFLEX_CMD_MULTI)
			c->cflags |= KFLEX_C_MULTI;
		/* With arguments EXEC and DISCARD are errors, and DISCARD's leaves the transaction open. */
		if ((p->cmd & KFLEX_CMD_END) && p->argc == 1 && (c->cflags & KFLEX_C_MULTI)) {
			c->cflags &= ~KFLEX_C_MULTI;
			/* So does a DISCARD that its user may not run; an EXEC always ends it. */
			if (num == 7)
				return await_reply(c, p, KFLEX_AUTH_DISCARD);
		}
		return 0;
	}
	if (p->argn == p->user_arg) {
		auth_name(f, num);
		return 0;
	}
	if (p->argn == p->opt_arg)
		return hello_option(f, p, num);
	if (p->argn != 2 || !(p->cmd & (KFLEX_CMD_SUB | KFLEX_CMD_ZERO)))
		return 0;
	if (num == 0 || num > 20 || f->pos + num > f->len)
		return RESP_BAD;
	if (p->cmd & KFLEX_CMD_ZERO) {
		__u8 digit = 0;

		if (num != 1 || bpf_probe_read_kernel(&digit, 1, (void *)(f->addr + f->pos)) || digit != '0')
			return RESP_BAD;
		return 0;
	}
	/* "CLIENT" + "|" + subcommand: both fit, the containers on the list have at most 8 letters. */
	for (at = 0; at < 9; at++)
		if (!c->name[at])
			break;
	if (at > 8)
		return RESP_BAD;
	c->name[at & 15] = '|';
	at = (at + 1) & 15;
	BOUND(num, 31);
	if (bpf_probe_read_kernel(&c->name[at], num, (void *)(f->addr + f->pos)))
		return RESP_BAD;
	return command_flags(c) ? 0 : RESP_BAD;
}

/*
 * The reply that begins with this byte may say who the connection's user is. Whoever has not said AUTH is the default
 * user; whether it may do anything, when a password is needed by now, shows in how Redis answers it.
 */
__noinline int settle_user(struct kflex_conn *c, __u32 lead)
{
	struct kflex_ctl *k = get_ctl();
	__u32 ordinal;

	if (!c || !k)
		return -1;
	ordinal = c->rep.frames + 1;
	if (!ordinal)
		return 0;
	if (READ_ONCE(c->auth_at) == ordinal) {
		if (c->auth_user == KFLEX_AUTH_DISCARD) {
			if (lead == '-') {
				c->sflags |= KFLEX_S_DEMOTED;
				count(k, KFLEX_STAT_DEMOTED);
			}
		} else if (lead == '+' || lead == '%' || lead == '*')
			WRITE_ONCE(c->user, c->auth_user & (KFLEX_MAX_USERS - 1));
		else if (!(c->auth_user & KFLEX_AUTH_KEEPS))
			WRITE_ONCE(c->user, KFLEX_USER_NONE);
		WRITE_ONCE(c->auth_at, 0);
	}
	if (READ_ONCE(c->proof_at) == ordinal) {
		if (lead != '-' && c->user == KFLEX_USER_OPEN && READ_ONCE(k->default_open) == c->proof_gen)
			WRITE_ONCE(c->user, 0);
		WRITE_ONCE(c->proof_at, 0);
	}
	return 0;
}

static __always_inline void reply_begins(struct kflex_conn *c, __u8 lead)
{
	if (READ_ONCE(c->auth_at) | READ_ONCE(c->proof_at))
		settle_user(c, lead);
}

static __always_inline void frame_end(struct kflex_parser *p)
{
	if (!p->push)
		p->frames++;
	p->push = 0;
}

/* One byte, or one skip. Returns 1 to stop. */
static __always_inline long feed_step(struct feed *f, struct kflex_parser *p, __u8 *win, int role)
{
	__u32 n, left;
	__u64 bytes;
	__u8 ch;

	if (f->pos >= f->len)
		return 1;
	if (p->skip) {
		left = f->len - f->pos;
		n = p->skip < left ? p->skip : left;
		p->skip -= n;
		f->pos += n;
		if (!p->skip && !--p->remaining)
			frame_end(p);
		return 0;
	}
	n = f->pos - f->base;
	if (n >= RESP_WINDOW) {
		bytes = f->len - f->pos;
		if (bytes > RESP_WINDOW)
			bytes = RESP_WINDOW;
		BOUND(bytes, 0x7f);
		if (bpf_probe_read_kernel(win, bytes, (void *)(f->addr + f->pos)))
			goto bad;
		f->base = f->pos;
		n = 0;
	}
	ch = win[n & (RESP_WINDOW - 1)];
	f->pos++;
	switch (p->st) {
	case RESP_TYPE:
		if (role == ROLE_REQUEST) {
			if (ch != (p->remaining ? '$' : '*'))
				goto bad;
		}
		p->type = ch;
		p->num = 0;
		p->neg = 0;
		if (!p->remaining) {
			p->remaining = 1;
			p->push = ch == '>';
			if (role == ROLE_REPLY && !p->push)
				reply_begins(f->c, ch);
		}
		if (ch == '$' || ch == '*' || ch == '%' || ch == '~' || ch == '>' || ch == '|' || ch == '=' ||
		    ch == '!')
			p->st = RESP_NUM;
		else if (ch == '+' || ch == '-' || ch == ':' || ch == ',' || ch == '#' || ch == '(' || ch == '_')
			p->st = RESP_TEXT;
		else
			goto bad;
		return 0;
	case RESP_NUM:
		if (ch >= '0' && ch <= '9') {
			if (p->num > (1u << 26))
				goto bad;
			p->num = p->num * 10 + (ch - '0');
		} else if (ch == '\r') {
			p->st = RESP_LF;
		} else if (ch == '-' && !p->num && role == ROLE_REPLY) {
			p->neg = 1;
		} else {
			goto bad;
		}
		return 0;
	case RESP_TEXT:
		if (ch != '\n')
			return 0;
		p->st = RESP_TYPE;
		if (!--p->remaining)
			frame_end(p);
		return 0;
	default:
		break;
	}
	if (ch != '\n')
		goto bad;
	p->st = RESP_TYPE;
	if (role == ROLE_REQUEST) {
		if (p->type == '*') {
			/* Redis ignores empty requests without a reply, and refuses more than 2^20 arguments. */
			if (!p->num || p->num > (1 << 20))
				goto bad;
			p->remaining = p->num;
			p->argc = p->num;
			p->argn = 0;
			return 0;
		}
		if (p->num > (512u << 20) || request_bulk(f, p))
			goto bad;
		p->skip = p->num + 2;
		return 0;
	}
	if (p->type == '$' || p->type == '=' || p->type == '!') {
		if (!p->neg) {
			p->skip = p->num + 2;
			return 0;
		}
	} else if (!p->neg) {
		p->remaining += (p->type == '%' || p->type == '|') ? 2 * p->num : p->num;
		if (p->type == '|') /* the value that it describes is still to come */
			return 0;
	}
	if (!--p->remaining)
		frame_end(p);
	return 0;
bad:
	f->bad = 1;
	return 1;
}

static long feed_request_step(__u32 i, struct feed *f)
{
	return feed_step(f, &f->c->req, f->c->win[0], ROLE_REQUEST);
}

static long feed_reply_step(__u32 i, struct feed *f)
{
	return feed_step(f, &f->c->rep, f->c->win[1], ROLE_REPLY);
}

/* Reads "<digits>\r\n", at most four digits, at c->hdr[at]. Returns the number and its text's length in *used, or -1. */
static __always_inline int read_length(struct kflex_conn *c, __u32 at, __u32 *used)
{
	__u32 i, n = 0, d;

	for (i = 0; i < 4; i++) {
		d = (__u32)c->hdr[(at + i) & 0x1ff] - '0';
		if (d > 9)
			break;
		n = n * 10 + d;
	}
	/* Redis refuses numbers with leading zeros: leave those to it. */
	if (!i || (i > 1 && c->hdr[at & 0x1ff] == '0'))
		return -1;
	if (c->hdr[(at + i) & 0x1ff] != '\r' || c->hdr[(at + i + 1) & 0x1ff] != '\n')
		return -1;
	*used = i + 2;
	return n;
}

/* Bytes of a word that belong to a name or key of which `left` bytes are still to come. */
static __always_inline __u64 head_of(__u64 word, __u32 left)
{
	return left >= 8 ? word : word & (~0ull >> (64 - 8 * (left & 7)));
}

#define FAST_WINDOW 256

/*
 * The length of the bulk string at c->hdr[at], with what is around it; 0: there is none. A function of its own because
 * 6.1's verifier would follow every way through nine of them.
 */
__noinline __u32 bulk_length(struct kflex_conn *c, __u32 at)
{
	__u32 used = 0;
	int n;

	if (!c || c->hdr[at & 0xff] != '$')
		return 0;
	n = read_length(c, at + 1, &used);
	return n < 0 ? 0 : 1 + used + n + 2;
}

/*
 * The common request - whole, few arguments, a command that needs no second look - without going byte by byte.
 * Returns its length, or 0 to leave it to the parser.
 */
__noinline __u32 fast_request(struct kflex_conn *c, __u64 addr, __u32 len)
{
	__u64 have = len < FAST_WINDOW ? len : FAST_WINDOW, *name;
	__u32 used = 0, pos, argc, i, flags;
	int n;

	if (!c || have < 14)
		return 0;
	BOUND(have, 0x1ff);
	if (bpf_probe_read_kernel(c->hdr, have, (void *)addr))
		return 0;
	if (c->hdr[0] != '*' || c->hdr[2] != '\r' || c->hdr[3] != '\n' || c->hdr[4] != '$')
		return 0;
	argc = (__u32)c->hdr[1] - '0';
	if (argc < 1 || argc > 9)
		return 0;
	n = read_length(c, 5, &used);
	if (n < 1 || n >= 24)
		return 0;
	pos = 5 + used;
	if (pos + n + 2 > have)
		return 0;
	name = (__u64 *)c->name;
	name[0] = head_of(word_at(&c->hdr[pos & 15]), n);
	name[1] = n > 8 ? head_of(word_at(&c->hdr[(pos & 15) + 8]), n - 8) : 0;
	name[2] = n > 16 ? head_of(word_at(&c->hdr[(pos & 15) + 16]), n - 16) : 0;
	name[3] = 0;
	flags = command_flags(c);
	if (flags & KFLEX_CMD_TABLE)
		c->idle = 0;
	if ((flags & ~KFLEX_CMD_TABLE) != KFLEX_CMD_OK)
		return 0;
	pos += n + 2;
	for (i = 1; i < 9; i++) {
		if (i >= argc)
			break;
		if (pos + 4 > have)
			return 0;
		n = bulk_length(c, pos);
		if (!n)
			return 0;
		pos += n;
	}
	if (pos > len)
		return 0;
	c->req.frames++;
	return pos;
}

/* The common reply, likewise. */
__noinline __u32 fast_reply(struct kflex_conn *c, __u64 addr, __u32 len)
{
	__u64 have = len < RESP_WINDOW ? len : RESP_WINDOW;
	__u32 i, n = 0, d;
	__u8 *w;

	if (!c || have < 4)
		return 0;
	BOUND(have, 0x7f);
	if (bpf_probe_read_kernel(c->win[1], have, (void *)addr))
		return 0;
	w = c->win[1];
	if (w[0] == '$') {
		if (w[1] == '-') {
			if (have < 5 || w[4] != '\n')
				return 0;
			reply_begins(c, '$');
			c->rep.frames++;
			return 5;
		}
		for (i = 1; i < 6; i++) {
			d = (__u32)w[i] - '0';
			if (d > 9)
				break;
			n = n * 10 + d;
		}
		if (i > 5 || i + 2 > have || w[i & 7] != '\r')
			return 0;
		n += i + 4;
		if (n > len)
			return 0;
		reply_begins(c, '$');
		c->rep.frames++;
		return n;
	}
	if (w[0] != '+' && w[0] != '-' && w[0] != ':')
		return 0;
	for (i = 1; i < RESP_WINDOW; i++) {
		if (i >= have)
			break;
		if (w[i] == '\n') {
			reply_begins(c, w[0]);
			c->rep.frames++;
			return i + 1;
		}
	}
	return 0;
}

/*
 * Feeds len contiguous bytes at kernel address addr to the connection's request parser.
 * Returns 0, or RESP_BAD when the framing or a command is not one that can be followed.
 */
__noinline int feed_request(struct kflex_conn *c, __u64 addr, __u32 len)
{
	struct feed f = {.c = c, .addr = addr, .len = len};
	__u32 i, n;

	if (!c)
		return RESP_BAD;
	for (i = 0; i < KFLEX_MAX_PIPELINE && is_whole(&c->req); i++) {
		n = fast_request(c, addr + f.pos, len - f.pos);
		if (!n)
			break;
		f.pos += n;
		if (f.pos >= len)
			return 0;
	}
	f.base = f.pos - RESP_WINDOW;
	bpf_loop(3 * len + 3, feed_request_step, &f, 0);
	return f.bad ? RESP_BAD : 0;
}

/* The same for the server's replies. */
__noinline int feed_reply(struct kflex_conn *c, __u64 addr, __u32 len)
{
	struct feed f = {.c = c, .addr = addr, .len = len};

	__u32 i, n;

	if (!c)
		return RESP_BAD;
	for (i = 0; i < KFLEX_MAX_PIPELINE && is_whole(&c->rep); i++) {
		n = fast_reply(c, addr + f.pos, len - f.pos);
		if (!n)
			break;
		f.pos += n;
		if (f.pos >= len)
			return 0;
	}
	f.base = f.pos - RESP_WINDOW;
	bpf_loop(3 * len + 3, feed_reply_step, &f, 0);
	return f.bad ? RESP_BAD : 0;
}

#endif
