/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The list of clients for the toolkit, in batches: Redis stands still for each batch only, not for all of CLIENT LIST
 * (milliseconds with thousands of clients). So the ids must be known: they are collected as clients come and go.
 */
#include "kflex.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MAX_BATCH 1024

static RedisModuleDict *ids; /* big-endian, so that it is in the order in which clients came */
static int all_known;

static void on_client(RedisModuleCtx *ctx, RedisModuleEvent e, uint64_t sub, void *data)
{
	uint64_t id = __builtin_bswap64(((RedisModuleClientInfo *)data)->id);

	(void)ctx;
	(void)e;
	if (sub == REDISMODULE_SUBEVENT_CLIENT_CHANGE_CONNECTED)
		RedisModule_DictSetC(ids, &id, sizeof(id), NULL);
	else
		RedisModule_DictDelC(ids, &id, sizeof(id), NULL);
}

/* When the module is loaded into a running server, there are clients that no event has told of: one long list. */
static int learn_all(RedisModuleCtx *ctx)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "CLIENT", "c", "LIST");
	size_t len = 0;
	const char *at = reply ? RedisModule_CallReplyStringPtr(reply, &len) : NULL, *end = at ? at + len : NULL;

	all_known = at != NULL;
	for (; at && at < end; at = memchr(at, '\n', (size_t)(end - at)), at = at ? at + 1 : NULL) {
		uint64_t id = 0;

		if (end - at < 4 || memcmp(at, "id=", 3))
			continue;
		for (at += 3; at < end && *at >= '0' && *at <= '9'; at++)
			id = id * 10 + (uint64_t)(*at - '0');
		id = __builtin_bswap64(id);
		RedisModule_DictSetC(ids, &id, sizeof(id), NULL);
	}
	if (reply)
		RedisModule_FreeCallReply(reply);
	return all_known;
}

static int write_all(int fd, const char *text, size_t len)
{
	for (size_t at = 0; at < len;) {
		ssize_t n = write(fd, text + at, len - at);

		if (n < 0)
			return -errno;
		at += (size_t)n;
	}
	return 0;
}

/*
 * GIL held. Writes CLIENT LIST of the next m->count (at most 1024) clients above m->cursor to fd, a memfd of the
 * toolkit. Returns 0 or a negative errno.
 */
int kflex_clients(RedisModuleCtx *ctx, struct kflex_msg *m, int fd)
{
	RedisModuleString *argv[MAX_BATCH];
	uint64_t began = now_ns(), cursor = __builtin_bswap64(m->cursor), id;
	RedisModuleCallReply *reply = NULL;
	RedisModuleDictIter *it;
	const char *text = NULL;
	size_t limit = m->count && m->count < MAX_BATCH ? m->count : MAX_BATCH, n = 0, keylen, len = 0;
	void *key;
	int result = 0;

	m->cursor = 0;
	if (!all_known && !learn_all(ctx)) {
		snprintf(m->text, sizeof(m->text), "the server does not answer CLIENT LIST (renamed?)");
		return -ENOENT;
	}
	it = RedisModule_DictIteratorStartC(ids, ">", &cursor, sizeof(cursor));
	while (n < limit && (key = RedisModule_DictNextC(it, &keylen, NULL))) {
		memcpy(&id, key, sizeof(id));
		id = __builtin_bswap64(id);
		argv[n++] = RedisModule_CreateStringFromLongLong(ctx, (long long)id);
		m->cursor = id;
	}
	RedisModule_DictIteratorStop(it);
	if (n) {
		reply = RedisModule_Call(ctx, "CLIENT", "ccv", "LIST", "ID", argv, n);
		text = reply ? RedisModule_CallReplyStringPtr(reply, &len) : NULL;
		if (text) {
			result = write_all(fd, text, len);
		} else {
			result = -ENOENT;
			snprintf(m->text, sizeof(m->text), "the server does not answer CLIENT LIST ID (renamed?)");
		}
	}
	for (size_t i = 0; i < n; i++)
		RedisModule_FreeString(ctx, argv[i]);
	if (reply)
		RedisModule_FreeCallReply(reply);
	m->gil_ns = now_ns() - began;
	return result;
}

void kflex_clients_start(RedisModuleCtx *ctx)
{
	RedisModuleServerInfoData *info = RedisModule_GetServerInfo(ctx, "clients");
	int err = 0;

	ids = RedisModule_CreateDict(NULL);
	/* Loaded by redis.conf: nobody is there yet. */
	all_known = !RedisModule_ServerInfoGetFieldUnsigned(info, "connected_clients", &err) && !err;
	RedisModule_FreeServerInfo(ctx, info);
	RedisModule_SubscribeToServerEvent(ctx, RedisModuleEvent_ClientChange, on_client);
}

void kflex_clients_stop(RedisModuleCtx *ctx)
{
	RedisModule_SubscribeToServerEvent(ctx, RedisModuleEvent_ClientChange, NULL);
	RedisModule_FreeDict(NULL, ids);
	ids = NULL;
}
