/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Framing of requests and replies for latency.bpf.c: where each begins and ends, resumable at any byte.
 *
 * Not resp.bpf.h's: that one decides what may be served and looks at every byte in kernel memory; this one only watches,
 * in the server's own buffers, and hops from header to header, because it runs on each read and write of a saturated
 * server.
 */
#ifndef KFLEX_LATENCY_RESP_BPF_H
#define KFLEX_LATENCY_RESP_BPF_H

#include "latency_account.bpf.h"

enum { RQ_START, RQ_COUNT, RQ_DOLLAR, RQ_LENGTH, RQ_ARGUMENT, RQ_INLINE };
enum { RP_TYPE, RP_NUM, RP_TEXT, RP_SKIP };

#define WINDOW 128
#define LINE   32 /* a header line, and as much of a text line as one step looks at */

struct run {
	struct conn *c;
	struct feed *f;
};

/* Makes LINE bytes from f->pos on, as far as there are, visible in the window. Returns their index in it. */
static __always_inline __u32 look(struct feed *f)
{
	__u32 at = f->pos - f->base;
	__u64 bytes;

	if (at < f->have && (at + LINE <= f->have || f->base + f->have >= f->len))
		return at;
	bytes = f->len - f->pos;
	if (bytes > WINDOW)
		bytes = WINDOW;
	f->base = f->pos;
	f->have = bytes;
	BOUND(bytes, WINDOW * 2 - 1);
	if (bytes > WINDOW || bpf_probe_read_user(f->window, bytes, (void *)(f->addr + f->pos)))
		f->bad = 1;
	return 0;
}

/*
 * Digits up to the end of the line, added to *num. Returns 1 at the line's end, 0 if the data ended first, -1 for
 * anything else.
 */
static __always_inline int number(struct feed *f, __u64 *num, __u8 *neg)
{
	__u32 at = look(f), i, left = f->len - f->pos;
	__u64 n = *num;
	__u8 ch;

	for (i = 0; i < LINE - 8; i++) {
		if (i >= left)
			break;
		ch = f->window[(at + i) & (WINDOW - 1)];
		if (ch >= '0' && ch <= '9') {
			n = n * 10 + (ch - '0');
			continue;
		}
		if (ch == '\n') {
			f->pos += i + 1;
			*num = n;
			return n > (1ull << 40) ? -1 : 1;
		}
		if (ch == '-')
			*neg = 1;
		else if (ch != '\r')
			return -1;
	}
	f->pos += i;
	*num = n;
	return i < left ? -1 : 0;
}

/* --- requests ------------------------------------------------------------------------------------------------------- */

static __always_inline void request_start(struct conn *c, struct feed *f)
{
	c->rq.bytes = 0;
	c->rq.argn = 0;
	c->rq.args = 0;
	c->rq.name_len = 0;
	c->rq.num = 0;
	c->rq.neg = 0;
	c->rq.in_word = 0;
	c->rq.hidden = 0;
	c->rq.unwanted = 0;
	c->rq.reply_word = 0;
	c->name[0] = c->name[1] = c->name[2] = 0;
	f->start = f->from = f->pos;
	c->rq.text = events ? text_new() : 0;
}

/* Adds what lies before `to` and is not in it yet to the text of the request at hand. */
static __always_inline void request_text(struct conn *c, struct feed *f, __u32 to)
{
	if (events && c->rq.text && !c->rq.hidden && to > f->from)
		text_add(c->rq.text, f->addr + f->from, to - f->from);
	f->from = to;
}

static __always_inline void hide(struct conn *c, struct feed *f, __u32 to)
{
	request_text(c, f, to);
	c->rq.hidden = 1;
}

/* CLIENT REPLY ON|OFF|SKIP: the first two letters tell. */
__noinline int client_reply(struct conn *c, __u64 addr, __u32 argn)
{
	__u64 word = 0;

	if (!c || bpf_probe_read_user(&word, argn == 2 ? 5 : 2, (void *)addr))
		return 0;
	word = upper(word);
	if (argn == 2)
		c->rq.reply_word = word == 0x594c504552ull; /* "REPLY" */
	else if (c->rq.reply_word && word == 0x4e4f)	    /* "ON" */
		c->flags &= ~C_MUTE;
	else if (c->rq.reply_word)
		c->flags |= C_MUTE;
	return 0;
}

/* The header of an argument is behind us, its bytes begin at f->pos. Argument 1 is the name. */
static __always_inline void argument(struct conn *c, struct feed *f)
{
	c->rq.skip = c->rq.num + 2;
	c->rq.argn++;
	c->rq.st = RQ_ARGUMENT;
	if (c->rq.argn > 3)
		return;
	if (c->rq.argn == 2) {
		if (redact && !(c->last_flags & KFLEX_LAT_F_KEY))
			hide(c, f, f->pos);
		if (prefix_len)
			c->rq.unwanted = !key_wanted(f->addr + f->pos, c->rq.num, f->len - f->pos);
	} else if (c->rq.argn == 3 && redact) {
		hide(c, f, f->pos);
	}
	if (c->rq.argn > 1 && (c->last_flags & KFLEX_LAT_F_CLIENT) && (c->rq.argn == 3 || c->rq.num == 5) &&
	    f->len - f->pos >= c->rq.num)
		client_reply(c, f->addr + f->pos, c->rq.argn);
}

/* As much of the command's name as is there. */
static __always_inline void name_bytes(struct conn *c, struct feed *f, __u32 bytes)
{
	__u64 at = c->rq.name_len, n = c->rq.num > at ? c->rq.num - at : 0;

	if (n > bytes)
		n = bytes;
	if (at < KFLEX_LAT_NAME) {
		__u64 room = KFLEX_LAT_NAME - at, take = n < room ? n : room;

		BOUND(at, 31);
		BOUND(take, 31);
		/* Names of more than KFLEX_LAT_NAME bytes are nobody's: what is cut off does not matter. */
		if (!at && take == n && n < 8 && f->pos - f->base + 8 <= f->have)
			c->name[0] =
				*(__u64 *)(f->window + ((f->pos - f->base) & (WINDOW - 1))) & ((1ull << (8 * n)) - 1);
		else if (at + take <= KFLEX_LAT_NAME &&
			 bpf_probe_read_user((__u8 *)c->name + at, take, (void *)(f->addr + f->pos)))
			f->bad = 1;
	}
	c->rq.name_len += n;
}

static __always_inline void request_whole(struct conn *c, struct feed *f)
{
	request_text(c, f, f->pos);
	request_done(c, f);
	c->rq.st = RQ_START;
}

/* A byte of an inline request: words between blanks, up to the end of the line. */
__noinline int inline_step(struct conn *c, struct feed *f)
{
	__u8 ch;

	if (!c || !f)
		return 0;
	ch = f->window[look(f) & (WINDOW - 1)];
	if (ch == '\n') {
		f->pos++;
		c->rq.args = c->rq.argn;
		if (c->rq.argn == 1)
			command_known(c);
		/* Redis ignores an empty line. */
		if (c->rq.argn)
			request_whole(c, f);
		c->rq.st = RQ_START;
		return 0;
	}
	if (ch == ' ' || ch == '\t' || ch == '\r') {
		c->rq.in_word = 0;
		f->pos++;
		return 0;
	}
	if (!c->rq.in_word) {
		c->rq.in_word = 1;
		c->rq.argn++;
		if (c->rq.argn == 2) {
			command_known(c);
			if (prefix_len)
				c->rq.unwanted = !key_wanted(f->addr + f->pos, prefix_len, f->len - f->pos);
		}
		if (redact && (c->rq.argn == 3 || (c->rq.argn == 2 && !(c->last_flags & KFLEX_LAT_F_KEY))))
			hide(c, f, f->pos);
	}
	if (c->rq.argn == 1) {
		if (c->rq.name_len < KFLEX_LAT_NAME)
			((__u8 *)c->name)[c->rq.name_len & 31] = ch;
		c->rq.name_len++;
	}
	f->pos++;
	return 0;
}

static long request_step(__u32 step, struct run *r)
{
	struct feed *f = r->f;
	struct conn *c = r->c;
	__u32 left, st;
	__u64 n;
	__u8 ch;
	int end;

	if (f->pos >= f->len || f->bad || c->flags & C_DEAF)
		return 1;
	st = c->rq.st;
	if (st == RQ_INLINE) {
		inline_step(c, f);
		return 0;
	}
	if (st == RQ_START) {
		ch = f->window[look(f) & (WINDOW - 1)];
		request_start(c, f);
		if (ch != '*') {
			c->rq.st = RQ_INLINE;
			return 0;
		}
		f->pos++;
		c->rq.st = st = RQ_COUNT;
		if (f->pos >= f->len)
			return 1;
	}
	if (st == RQ_COUNT) {
		end = number(f, &c->rq.num, &c->rq.neg);
		if (end < 0)
			goto bad;
		if (!end)
			return 1;
		c->rq.args = c->rq.num;
		/* Redis ignores these, too. */
		c->rq.st = c->rq.neg || !c->rq.num ? RQ_START : RQ_DOLLAR;
		return 0;
	}
	if (st == RQ_DOLLAR) {
		if (f->window[look(f) & (WINDOW - 1)] != '$')
			goto bad;
		f->pos++;
		c->rq.num = 0;
		c->rq.st = st = RQ_LENGTH;
		if (f->pos >= f->len)
			return 1;
	}
	if (st == RQ_LENGTH) {
		end = number(f, &c->rq.num, &c->rq.neg);
		if (end < 0 || c->rq.neg)
			goto bad;
		if (!end)
			return 1;
		argument(c, f);
	}
	left = f->len - f->pos;
	n = c->rq.skip < left ? c->rq.skip : left;
	if (c->rq.argn == 1)
		name_bytes(c, f, n);
	f->pos += n;
	c->rq.skip -= n;
	if (c->rq.skip)
		return 1;
	if (c->rq.argn == 1)
		command_known(c);
	if (c->rq.argn >= c->rq.args)
		request_whole(c, f);
	else
		c->rq.st = RQ_DOLLAR;
	return 0;
bad:
	f->bad = 1;
	return 1;
}

/* --- replies -------------------------------------------------------------------------------------------------------- */

/* Adds what lies before `to` to the reply's head, as far as it may be seen. */
static __always_inline void reply_text(struct conn *c, struct feed *f, __u32 to)
{
	__u64 at = c->rp.head_len, n = to - f->from, room = (redact ? KFLEX_LAT_LINE : KFLEX_LAT_HEAD);

	if (!events || c->rp.hidden || to <= f->from || at >= room)
		return;
	if (n > room - at)
		n = room - at;
	BOUND(at, 127);
	BOUND(n, 127);
	if (at + n <= KFLEX_LAT_HEAD && n <= KFLEX_LAT_HEAD &&
	    !bpf_probe_read_user(&c->head[at], n, (void *)(f->addr + f->from)))
		c->rp.head_len = at + n;
	f->from = to;
}

static __always_inline void reply_start(struct conn *c, struct feed *f, __u8 type)
{
	c->rp.left = 1;
	c->rp.top = type;
	c->rp.bytes = 0;
	c->rp.head_len = 0;
	c->rp.nested = 0;
	c->rp.hidden = 0;
	c->rp.sub = 0;
	f->start = f->from = f->pos;
}

/* In RESP2 a published message looks like a reply, and each name of a SUBSCRIBE is confirmed by itself. */
__noinline int subscription(struct conn *c, __u64 addr)
{
	__u8 t[4] = {};

	/* $7 message, $8 pmessage or smessage; $9 subscribe, $10 psubscribe, ... $12 sunsubscribe */
	if (!c || bpf_probe_read_user(t, 3, (void *)addr) || t[0] != '$')
		return 0;
	if ((t[1] == '7' || t[1] == '8') && t[2] == '\r')
		c->rp.sub = 1;
	else if ((t[1] == '9' && t[2] == '\r') || (t[1] == '1' && t[2] >= '0' && t[2] <= '2'))
		c->rp.sub = 2;
	return 0;
}

/* One element less to come. */
static __always_inline void element_end(struct conn *c, struct feed *f)
{
	c->rp.st = RP_TYPE;
	if (c->rp.left)
		c->rp.left--;
	if (c->rp.left)
		return;
	reply_text(c, f, f->pos);
	reply_done(c, f);
}

static __always_inline bool is_line(__u8 t)
{
	return t == '+' || t == '-' || t == ':' || t == '_' || t == ',' || t == '#' || t == '(';
}

static long reply_step(__u32 step, struct run *r)
{
	struct feed *f = r->f;
	struct conn *c = r->c;
	__u32 left, st, at, i;
	__u8 type;
	__u64 n;
	int end;

	if (f->pos >= f->len || f->bad || c->flags & C_DEAF)
		return 1;
	st = c->rp.st;
	if (st == RP_TYPE) {
		type = f->window[look(f) & (WINDOW - 1)];
		if (!c->rp.left)
			reply_start(c, f, type);
		c->rp.type = type;
		f->pos++;
		if (is_line(type)) {
			c->rp.st = st = RP_TEXT;
		} else if (type == '$' || type == '*' || type == '%' || type == '~' || type == '>' || type == '=' ||
			   type == '!' || type == '|') {
			c->rp.num = 0;
			c->rp.neg = 0;
			c->rp.st = st = RP_NUM;
		} else {
			goto bad;
		}
		if (f->pos >= f->len)
			return 1;
	}
	if (st == RP_TEXT) {
		at = look(f);
		left = f->len - f->pos;
		for (i = 0; i < LINE; i++) {
			if (i >= left)
				break;
			if (f->window[(at + i) & (WINDOW - 1)] == '\n') {
				f->pos += i + 1;
				element_end(c, f);
				return 0;
			}
		}
		f->pos += i;
		return 0;
	}
	if (st == RP_NUM) {
		end = number(f, &c->rp.num, &c->rp.neg);
		if (end < 0)
			goto bad;
		if (!end)
			return 1;
		type = c->rp.type;
		if (!c->rp.nested) {
			c->rp.nested = 1;
			if (redact) {
				reply_text(c, f, f->pos);
				c->rp.hidden = 1;
			}
			if (c->flags & C_SUBSCRIBED && (type == '*' || type == '>') && f->len - f->pos > 3)
				subscription(c, f->addr + f->pos);
		}
		if (c->rp.neg) {
			element_end(c, f);
			return 0;
		}
		n = c->rp.num;
		if (type == '$' || type == '=' || type == '!') {
			c->rp.skip = n + 2;
			c->rp.st = RP_SKIP;
		} else {
			if (type == '%' || type == '|')
				n *= 2;
			/* An attribute is no element itself. */
			c->rp.left += n + (type == '|');
			element_end(c, f);
			return 0;
		}
	}
	left = f->len - f->pos;
	n = c->rp.skip < left ? c->rp.skip : left;
	f->pos += n;
	c->rp.skip -= n;
	if (!c->rp.skip)
		element_end(c, f);
	return 0;
bad:
	f->bad = 1;
	return 1;
}

#endif
