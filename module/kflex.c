/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * kflex.so - what Redis tells the table, and when.
 *
 *   loadmodule kflex.so [SETTING value]...      (settings.c has them)
 *
 * The event loop's callbacks close the gate and drain (AFTER_SLEEP) and populate and arm (BEFORE_SLEEP); keyspace
 * events forget what a command changed; flushes, swaps and loads forget everything. Why each is where it is:
 * docs/offload.md.
 */
#include "kflex.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

struct kflex_module K;

/* Copies the keys that GETs have just missed: strings without a TTL, in database 0. */
static void populate(RedisModuleCtx *ctx)
{
	for (int i = 0; i < K.nremembered; i++) {
		const char *name = K.remembered[i].key;
		size_t len = K.remembered[i].len, vlen;
		RedisModuleString *key = RedisModule_CreateString(ctx, name, len);
		RedisModuleKey *k = RedisModule_OpenKey(ctx, key, REDISMODULE_READ | REDISMODULE_OPEN_KEY_NOTOUCH);
		RedisModuleCallReply *reply;
		const char *value;
		int fits = k && RedisModule_KeyType(k) == REDISMODULE_KEYTYPE_STRING &&
			   RedisModule_GetExpire(k) == REDISMODULE_NO_EXPIRE &&
			   RedisModule_ValueLength(k) <= KFLEX_MAX_VALUE;

		if (k)
			RedisModule_CloseKey(k);
		if (fits) {
			/* Not StringDMA: that would turn int and embstr encodings into raw for good. */
			reply = RedisModule_Call(ctx, "GET", "s", key);
			value = reply ? RedisModule_CallReplyStringPtr(reply, &vlen) : NULL;
			/* PFCOUNT changes a HyperLogLog's bytes without an event. */
			if (value && !(vlen >= 4 && !memcmp(value, "HYLL", 4)))
				K.ctl->populated += (uint64_t)kflex_insert_clean(name, len, value, vlen);
			if (reply)
				RedisModule_FreeCallReply(reply);
		}
		RedisModule_FreeString(ctx, key);
	}
	K.nremembered = 0;
}

static void before_sleep(RedisModuleCtx *ctx)
{
	if (K.recheck) {
		K.recheck = 0;
		kflex_rules_check(ctx);
	}
	if (K.mark_due) {
		K.mark_due = 0;
		if (K.ctl->durable)
			kflex_journal_mark(ctx);
	}
	/* With AOF only what is written may be read: a crash must not take back what somebody has seen. */
	if (K.nremembered && !K.ctl->durable)
		populate(ctx);
	if (K.sample_ns)
		K.armed_ns = now_ns();
	K.slept = 1;
#ifdef KFLEX_BREAK_EARLY_GATE
	STORE(K.ctl->gate, K.ctl->allow ? 1 : 0);
#elif defined(KFLEX_BREAK_OPEN_WHILE_POSTPONED)
	STORE(K.ctl->armed, 1);
#else
	if (!kflex_journal_behind(ctx))
		STORE(K.ctl->armed, 1);
#endif
}

static void after_sleep(RedisModuleCtx *ctx)
{
	/* Clocks are dear on this path: every sixteenth iteration stands for all. */
	int sampled = !(K.ctl->sleeps++ & 15);

	if (K.sample_ns || sampled) {
		uint64_t now = now_ns();

		if (K.sample_ns) {
			K.ctl->total_ns += now - K.sample_ns;
			if (K.ctl->gate && K.armed_ns)
				K.ctl->open_ns += now - K.armed_ns;
		}
		K.sample_ns = sampled ? now : 0;
		K.armed_ns = 0;
	}
	kflex_close_gate();
	kflex_journal_check(ctx);
#ifdef KFLEX_BREAK_NO_DRAIN
	(void)ctx;
#else
	kflex_drain(ctx, 0);
#endif
	if (K.nremembered && K.ctl->durable)
		populate(ctx);
}

static void on_event_loop(RedisModuleCtx *ctx, RedisModuleEvent e, uint64_t sub, void *data)
{
	(void)e;
	(void)data;
	/* Before the first command of any client. */
	if (!R.done && sub == REDISMODULE_SUBEVENT_EVENTLOOP_BEFORE_SLEEP)
		kflex_recover(ctx);
	if (R.waiting && sub == REDISMODULE_SUBEVENT_EVENTLOOP_AFTER_SLEEP)
		kflex_recover_written(ctx);
	if (!K.attached)
		return;
	if (sub == REDISMODULE_SUBEVENT_EVENTLOOP_BEFORE_SLEEP)
		before_sleep(ctx);
	else
		after_sleep(ctx);
}

static void on_filter(RedisModuleCommandFilterCtx *f)
{
	const char *name, *arg = "";
	size_t len, arglen = 0;
	int argc;

	if (!K.attached)
		return;
#ifndef KFLEX_BREAK_EARLY_GATE
	STORE(K.ctl->armed, 0);
	if (K.ctl->gate) {
		/* Must not be: a command is about to run while SETs are accepted. */
		K.ctl->open_commands++;
		kflex_close_gate();
	}
#endif
	argc = RedisModule_CommandFilterArgsCount(f);
	name = RedisModule_StringPtrLen(RedisModule_CommandFilterArgGet(f, 0), &len);
	if (argc > 1)
		arg = RedisModule_StringPtrLen(RedisModule_CommandFilterArgGet(f, 1), &arglen);
	if (len == 3 && argc == 2 && !strncasecmp(name, "get", 3)) {
		if (K.ctl->allow && K.nremembered < KFLEX_MAX_REMEMBERED && arglen <= KFLEX_MAX_KEY) {
			K.remembered[K.nremembered].len = (uint16_t)arglen;
			memcpy(K.remembered[K.nremembered++].key, arg, arglen);
		}
		return;
	}
	if (K.queued_admin && len == 4 && !strncasecmp(name, "exec", 4)) {
		K.recheck = 1;
		kflex_rules_add(KFLEX_RULE_RECHECK);
		return;
	}
	/* Only names that begin like an administrative one are worth the comparison. */
	if (len < 3 || !memchr("acrsdfmbpACRSDFMBP", name[0], 18) || !kflex_is_admin(name, len, arg, arglen))
		return;
	if (!strncasecmp(name, "monitor", len))
		K.monitor_possible = 1;
	K.queued_admin = 1;
	K.recheck = 1;
	kflex_rules_add(KFLEX_RULE_RECHECK);
}

/* A command has changed something. After BEFORE_SLEEP too: serving blocked clients passes no filter. */
static void note_change(void)
{
	K.changed = 1;
	if (K.ctl->durable && K.ctl->armed)
		STORE(K.ctl->armed, 0);
}

static int on_keyspace(RedisModuleCtx *ctx, int type, const char *event, RedisModuleString *key)
{
	const char *name;
	size_t len;

	(void)type;
	if (!R.done)
		kflex_recover_marker(ctx, event, key);
	if (!K.attached)
		return REDISMODULE_OK;
#ifndef KFLEX_BREAK_NO_INVALIDATE
	if (K.mset && kflex_own_event(key, K.mset, K.mset_argc, &K.mset_at))
		return REDISMODULE_OK;
	if (!K.applying)
		note_change();
	name = RedisModule_StringPtrLen(key, &len);
	kflex_invalidate(name, len);
#else
	(void)name;
	(void)len;
	(void)key;
#endif
	return REDISMODULE_OK;
}

/* FLUSHALL, FLUSHDB, SWAPDB, DEBUG RELOAD, a replica's full synchronisation: no event for each key. */
static void on_epoch(RedisModuleCtx *ctx, RedisModuleEvent e, uint64_t sub, void *data)
{
	(void)ctx;
	(void)e;
	(void)sub;
	(void)data;
	if (!K.attached)
		return;
	__atomic_fetch_add(&K.ctl->epoch, 1, __ATOMIC_SEQ_CST);
	K.ctl->epoch_bumps++;
	K.nremembered = 0;
	note_change();
}

/* Role, replicas, configuration, modules: the rules may have changed. */
static void on_change(RedisModuleCtx *ctx, RedisModuleEvent e, uint64_t sub, void *data)
{
	if (!K.attached)
		return;
	/* Another module writes without events that name the key: what was read before it came is not to be believed. */
	if (e.id == REDISMODULE_EVENT_REPLICATION_ROLE_CHANGED || e.id == REDISMODULE_EVENT_MODULE_CHANGE)
		on_epoch(ctx, e, sub, data);
	K.recheck = 1;
	kflex_rules_add(KFLEX_RULE_RECHECK);
}

static void on_cron(RedisModuleCtx *ctx, RedisModuleEvent e, uint64_t sub, void *data)
{
	uint64_t used;

	(void)ctx;
	(void)e;
	(void)sub;
	(void)data;
	if (!K.attached)
		return;
	/* Some rules change without a command: a save fails, a pause ends, a tracking client leaves. */
	K.recheck = 1;
	used = LOAD(K.ctl->bump) * 8 / KFLEX_CHUNK_CELLS;
	if (used >= 7ull * K.ctl->chunks)
		kflex_sweep(K.ctl->buckets < 4096 ? K.ctl->buckets : 4096);
}

static void on_shutdown(RedisModuleCtx *ctx, RedisModuleEvent e, uint64_t sub, void *data)
{
	(void)e;
	(void)sub;
	(void)data;
	/* The mapping stays: the link thread may be looking at it. */
	kflex_quiet(ctx, KFLEX_UNLOADED);
	/* Redis has written its AOF before it says so. */
	if (K.attached && K.ctl->durable && kflex_aof_written(ctx))
		kflex_journal_confirm();
}

static void on_fork(RedisModuleCtx *ctx, RedisModuleEvent e, uint64_t sub, void *data)
{
	(void)ctx;
	(void)e;
	(void)data;
	if (K.attached && sub == REDISMODULE_SUBEVENT_FORK_CHILD_BORN)
		kflex_journal_forked();
}

static int supported(void)
{
	return RedisModule_RegisterNumericConfig && RedisModule_RegisterBoolConfig && RedisModule_LoadConfigs &&
	       RedisModule_IsSubEventSupported &&
	       RedisModule_IsSubEventSupported(RedisModuleEvent_EventLoop, REDISMODULE_SUBEVENT_EVENTLOOP_BEFORE_SLEEP);
}

/* All that can fail comes first: Redis does not take back the subscriptions of a module that fails to load. */
int RedisModule_OnLoad(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
	static const RedisModuleEvent *const epoch[] = {&RedisModuleEvent_FlushDB, &RedisModuleEvent_SwapDB,
							&RedisModuleEvent_Loading, &RedisModuleEvent_ReplAsyncLoad};
	static const RedisModuleEvent *const change[] = {&RedisModuleEvent_ReplicationRoleChanged,
							 &RedisModuleEvent_ReplicaChange, &RedisModuleEvent_Config,
							 &RedisModuleEvent_ModuleChange};

	if (RedisModule_Init(ctx, "kflex", KFLEX_ABI, REDISMODULE_APIVER_1) == REDISMODULE_ERR)
		return REDISMODULE_ERR;
	K.pid = getpid();
	if (!supported()) {
		RedisModule_Log(ctx, "warning",
				"kflex: this server has no event loop events or no settings of modules (Redis 7.0 and "
				"newer have)");
		return REDISMODULE_ERR;
	}
	if (kflex_settings_load(ctx, argv, argc) || kflex_link_start(ctx))
		return REDISMODULE_ERR;
	/* Our own calls (drain, populate, rules) are no news to the filter. */
	if (!RedisModule_RegisterCommandFilter(ctx, on_filter, REDISMODULE_CMDFILTER_NOSELF)) {
		kflex_link_stop();
		return REDISMODULE_ERR;
	}
	RedisModule_SubscribeToServerEvent(ctx, RedisModuleEvent_EventLoop, on_event_loop);
	for (unsigned i = 0; i < sizeof(epoch) / sizeof(*epoch); i++)
		RedisModule_SubscribeToServerEvent(ctx, *epoch[i], on_epoch);
	for (unsigned i = 0; i < sizeof(change) / sizeof(*change); i++)
		RedisModule_SubscribeToServerEvent(ctx, *change[i], on_change);
	RedisModule_SubscribeToServerEvent(ctx, RedisModuleEvent_CronLoop, on_cron);
	RedisModule_SubscribeToServerEvent(ctx, RedisModuleEvent_ForkChild, on_fork);
	RedisModule_SubscribeToServerEvent(ctx, RedisModuleEvent_Shutdown, on_shutdown);
	RedisModule_SubscribeToKeyspaceEvents(
		ctx, REDISMODULE_NOTIFY_ALL | REDISMODULE_NOTIFY_NEW | REDISMODULE_NOTIFY_MODULE, on_keyspace);
	RedisModule_RegisterInfoFunc(ctx, kflex_info);
	/* A replica serves nothing, so what it shows while it loads is Redis's alone: repl-diskless-load swapdb may stay. */
	RedisModule_SetModuleOptions(ctx, REDISMODULE_OPTIONS_HANDLE_REPL_ASYNC_LOAD);
	kflex_clients_start(ctx);
	return REDISMODULE_OK;
}

int RedisModule_OnUnload(RedisModuleCtx *ctx)
{
	kflex_link_stop();
	kflex_clients_stop(ctx);
	kflex_detach(ctx, KFLEX_UNLOADED);
	kflex_recover_let_go();
	return REDISMODULE_OK;
}
