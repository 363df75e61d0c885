/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * When not to: SET is offloaded only where a drained SET can neither be refused nor break a promise, GET only where
 * Redis would answer it. Each rule reads Redis's own state; the bits' names are enum kflex_rule.
 */
#include "kflex.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const uint32_t SET_RULES = ~((1u << KFLEX_RULE_APPENDFSYNC) - 1);

static void publish(uint32_t rules)
{
	uint32_t allow = KFLEX_ALLOW_GET | KFLEX_ALLOW_SET;

	if (rules & SET_RULES)
		allow &= ~(uint32_t)KFLEX_ALLOW_SET;
	if (rules & ~SET_RULES)
		allow = 0;
	STORE(K.ctl->rules, rules);
	STORE(K.ctl->allow, allow);
}

void kflex_rules_add(unsigned rule)
{
	/* The command that is about to run may be one that sets or removes the default user's password. */
	if (rule == KFLEX_RULE_RECHECK)
		STORE(K.ctl->default_open, K.ctl->default_open + 2);
	publish(K.ctl->rules | 1u << rule);
}

void kflex_rules_remove(unsigned rule)
{
	publish(K.ctl->rules & ~(1u << rule));
}

/* CONFIG GET name as a string of its own (free it), NULL when CONFIG does not answer. */
static char *config(RedisModuleCtx *ctx, const char *name)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "CONFIG", "cc", "GET", name), *value;
	const char *text;
	char *copy = NULL;
	size_t len;

	if (reply && RedisModule_CallReplyType(reply) == REDISMODULE_REPLY_ARRAY &&
	    RedisModule_CallReplyLength(reply) == 2) {
		value = RedisModule_CallReplyArrayElement(reply, 1);
		text = RedisModule_CallReplyStringPtr(value, &len);
		if (text) {
			copy = malloc(len + 1);
			memcpy(copy, text, len);
			copy[len] = 0;
		}
	}
	if (reply)
		RedisModule_FreeCallReply(reply);
	return copy;
}

static int config_is(RedisModuleCtx *ctx, const char *name, const char *want, int *unknown)
{
	char *value = config(ctx, name);
	int same;

	if (!value) {
		*unknown = 1;
		return 0;
	}
	same = !strcmp(value, want);
	free(value);
	return same;
}

static int other_module_loaded(RedisModuleCtx *ctx)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "MODULE", "c", "LIST");
	int other = !reply || RedisModule_CallReplyType(reply) != REDISMODULE_REPLY_ARRAY ||
		    RedisModule_CallReplyLength(reply) > 1;

	if (reply)
		RedisModule_FreeCallReply(reply);
	return other;
}

/* COMMAND INFO knows a command only under its present name. */
static int command_missing(RedisModuleCtx *ctx, const char *name)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "COMMAND", "cc", "INFO", name), *first;
	int missing = 1;

	if (reply && RedisModule_CallReplyType(reply) == REDISMODULE_REPLY_ARRAY &&
	    RedisModule_CallReplyLength(reply) == 1) {
		first = RedisModule_CallReplyArrayElement(reply, 0);
		missing = !first || RedisModule_CallReplyType(first) != REDISMODULE_REPLY_ARRAY;
	}
	if (reply)
		RedisModule_FreeCallReply(reply);
	return missing;
}

/* Is there a client with this flag in CLIENT LIST: O in MONITOR, x in MULTI? */
static int client_with(RedisModuleCtx *ctx, char flag)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "CLIENT", "c", "LIST");
	const char *text, *at, *end;
	int found = !reply;
	size_t len;

	text = reply ? RedisModule_CallReplyStringPtr(reply, &len) : NULL;
	for (at = text, end = text ? text + len : NULL; at && !found;) {
		at = memmem(at, (size_t)(end - at), " flags=", 7);
		if (!at)
			break;
		for (at += 7; at < end && *at != ' '; at++)
			found |= *at == flag;
	}
	if (reply)
		RedisModule_FreeCallReply(reply);
	return found;
}

static int info_is(RedisModuleServerInfoData *info, const char *field, const char *want)
{
	const char *value = RedisModule_ServerInfoGetFieldC(info, field);

	return value && !strcmp(value, want);
}

/* What cannot change while the server runs, and what cannot be known of the time before. */
void kflex_rules_attach(RedisModuleCtx *ctx)
{
	K.queued_admin = 1;
	K.queued_checked_ns = 0;
	K.monitor_possible = 1;
	K.renamed = command_missing(ctx, "get") || command_missing(ctx, "set");
}

/* Reads everything anew and publishes what may be served. Main thread or GIL held, no command running. */
void kflex_rules_check(RedisModuleCtx *ctx)
{
	RedisModuleServerInfoData *server = RedisModule_GetServerInfo(ctx, "server");
	RedisModuleServerInfoData *replication = RedisModule_GetServerInfo(ctx, "replication");
	RedisModuleServerInfoData *persistence = RedisModule_GetServerInfo(ctx, "persistence");
	RedisModuleServerInfoData *clients = RedisModule_GetServerInfo(ctx, "clients");
	const char *version = RedisModule_ServerInfoGetFieldC(server, "redis_version");
	uint32_t rules = 0;
	int unknown = 0, err;

#define RULE(name, condition) (rules |= (condition) ? 1u << KFLEX_RULE_##name : 0)
	/* The gate relies on the order of beforeSleep(), which was read in Redis 7.0 only. */
	RULE(VERSION,
	     !version || strncmp(version, "7.0.", 4) || RedisModule_ServerInfoGetFieldC(server, "valkey_version"));
	RULE(MODULE, other_module_loaded(ctx));
	RULE(CLUSTER, info_is(server, "redis_mode", "cluster"));
	RULE(REPLICA, !info_is(replication, "role", "master"));
	/* What was queued has run, or never will, when nobody is in a transaction. */
	if (K.queued_admin && now_ns() - K.queued_checked_ns > 1000000000u) {
		K.queued_checked_ns = now_ns();
		K.queued_admin = client_with(ctx, 'x');
	}
	/* Nothing but a command changes users. */
	if (K.ctl->rules & 1u << KFLEX_RULE_RECHECK || !K.ctl->users)
		K.served_users = kflex_users_check(ctx);
	RULE(AUTH, !K.served_users);
	RULE(RENAMED, K.renamed);
	RULE(TIMEOUT, !config_is(ctx, "timeout", "0", &unknown));
	if (K.monitor_possible)
		K.monitor_possible = client_with(ctx, 'O');
	RULE(MONITOR, K.monitor_possible);
	RULE(PAUSED, RedisModule_AvoidReplicaTraffic());
	RULE(LOADING, !info_is(persistence, "loading", "0"));
	RULE(APPENDFSYNC,
	     !config_is(ctx, "appendonly", "no", &unknown) && config_is(ctx, "appendfsync", "always", &unknown));
	RULE(MAXMEMORY, !config_is(ctx, "maxmemory", "0", &unknown));
	RULE(MIN_REPLICAS, !config_is(ctx, "min-replicas-to-write", "0", &unknown));
	RULE(NOTIFY, !config_is(ctx, "notify-keyspace-events", "", &unknown));
	RULE(REPLICAS, !K.settings.set_with_replicas &&
			       RedisModule_ServerInfoGetFieldUnsigned(replication, "connected_slaves", &err) > 0);
	RULE(DISK, !info_is(persistence, "rdb_last_bgsave_status", "ok") &&
			   config_is(ctx, "stop-writes-on-bgsave-error", "yes", &unknown) &&
			   !config_is(ctx, "save", "", &unknown));
	RULE(AOF_ERROR, !info_is(persistence, "aof_last_write_status", "ok"));
	RULE(TRACKING, RedisModule_ServerInfoGetFieldUnsigned(clients, "tracking_clients", &err) > 0);
	RULE(SET_SETTING, !K.settings.set_offload);
	kflex_journal_durable(ctx, !info_is(persistence, "aof_enabled", "0"));
	RULE(JOURNAL, K.unmarked);
	RULE(RENAMED, unknown); /* CONFIG itself is out of reach: nothing can be known */
#undef RULE
	RedisModule_FreeServerInfo(ctx, server);
	RedisModule_FreeServerInfo(ctx, replication);
	RedisModule_FreeServerInfo(ctx, persistence);
	RedisModule_FreeServerInfo(ctx, clients);
	publish(rules);
}

/* Can this command change what the rules read? */
int kflex_is_admin(const char *name, size_t len, const char *sub, size_t sublen)
{
	static const char *const admin[] = {"config",	"acl",	    "replicaof", "slaveof", "debug",
					    "failover", "monitor",  "module",	 "cluster", "psync",
					    "sync",	"replconf", "bgsave",	 "save"};
	static const char *const client[] = {"pause", "unpause", "tracking", "no-evict"};

	if (len == 6 && !strncasecmp(name, "client", 6)) {
		for (size_t i = 0; i < sizeof(client) / sizeof(*client); i++)
			if (sublen == strlen(client[i]) && !strncasecmp(sub, client[i], sublen))
				return 1;
		return 0;
	}
	for (size_t i = 0; i < sizeof(admin) / sizeof(*admin); i++)
		if (len == strlen(admin[i]) && !strncasecmp(name, admin[i], len))
			return 1;
	return 0;
}
