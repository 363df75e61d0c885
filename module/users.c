/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Who is served: the users (ACL) that may GET, or SET, every key. The kernel's programs learn a connection's user from
 * its AUTH and HELLO AUTH and look here for what that one may do; others' requests pass.
 */
#include "kflex.h"

#include <string.h>

/* A reply's text equals s. */
static int text_is(RedisModuleCallReply *r, const char *s)
{
	size_t len;
	const char *text = RedisModule_CallReplyStringPtr(r, &len);

	return text && len == strlen(s) && !memcmp(text, s, len);
}

static int holds(RedisModuleCallReply *array, const char *s)
{
	for (size_t i = 0; i < RedisModule_CallReplyLength(array); i++)
		if (text_is(RedisModule_CallReplyArrayElement(array, i), s))
			return 1;
	return 0;
}

/* Key patterns, separated by spaces (patterns have none), that mean every key. Returns what is allowed on every key. */
static uint32_t every_key(RedisModuleCallReply *patterns)
{
	size_t len, n;
	const char *at = RedisModule_CallReplyStringPtr(patterns, &len), *end = at + len;
	uint32_t allow = 0;

	for (; at && at < end; at += n + 1) {
		const char *space = memchr(at, ' ', (size_t)(end - at));

		n = (size_t)((space ? space : end) - at);
		if (n == 2 && !memcmp(at, "~*", 2))
			allow |= KFLEX_ALLOW_GET | KFLEX_ALLOW_SET;
		else if (n == 4 && !memcmp(at, "%R~*", 4))
			allow |= KFLEX_ALLOW_GET;
		else if (n == 4 && !memcmp(at, "%W~*", 4))
			allow |= KFLEX_ALLOW_SET;
	}
	return allow;
}

/*
 * May the user run this command? The key must be one that nobody can have foreseen: "+get|KEY" allows a GET of that
 * key only.
 */
static int may_run(RedisModuleCtx *ctx, RedisModuleUser *user, const char *command, int argc)
{
	char key[33] = "";
	RedisModuleString *argv[3];
	int may;

	RedisModule_GetRandomHexChars(key, 32);
	argv[0] = RedisModule_CreateString(ctx, command, strlen(command));
	argv[1] = argv[2] = RedisModule_CreateString(ctx, key, 32);
	may = RedisModule_ACLCheckCommandPermissions(user, argv, argc) == REDISMODULE_OK;
	RedisModule_FreeString(ctx, argv[0]);
	RedisModule_FreeString(ctx, argv[1]);
	return may;
}

/*
 * What the user may do on every key: enum kflex_allow bits. *open: no password is needed to be that user. Whether the
 * user is on does not matter: connections that have authenticated go on.
 */
static uint32_t permitted(RedisModuleCtx *ctx, const char *name, size_t len, int *open)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "ACL", "cb", "GETUSER", name, len), *field, *value;
	RedisModuleString *string = RedisModule_CreateString(ctx, name, len);
	RedisModuleUser *user = RedisModule_GetModuleUserFromUserName(string);
	int all_commands = 0, selectors = 1;
	uint32_t allow = 0;

	*open = 0;
	if (!user || !reply || RedisModule_CallReplyType(reply) != REDISMODULE_REPLY_ARRAY)
		goto out;
	for (size_t i = 0; i + 1 < RedisModule_CallReplyLength(reply); i += 2) {
		field = RedisModule_CallReplyArrayElement(reply, i);
		value = RedisModule_CallReplyArrayElement(reply, i + 1);
		if (text_is(field, "flags"))
			*open = holds(value, "on") && holds(value, "nopass");
		else if (text_is(field, "commands"))
			all_commands = text_is(value, "+@all");
		else if (text_is(field, "keys"))
			allow = every_key(value);
		else if (text_is(field, "selectors"))
			selectors = RedisModule_CallReplyLength(value) > 0;
	}
	/* Selectors only add. But then a command that is allowed may be so on some keys only. */
	if (selectors && !all_commands)
		allow = 0;
	if ((allow & KFLEX_ALLOW_GET) && !may_run(ctx, user, "GET", 2))
		allow &= ~(uint32_t)KFLEX_ALLOW_GET;
	if ((allow & KFLEX_ALLOW_SET) && !may_run(ctx, user, "SET", 3))
		allow &= ~(uint32_t)KFLEX_ALLOW_SET;
out:
	if (user)
		RedisModule_FreeModuleUser(user);
	RedisModule_FreeString(ctx, string);
	if (reply)
		RedisModule_FreeCallReply(reply);
	return allow;
}

/* The slot of a name, a new one if it has none, -1 if it cannot get one. */
static int slot_of(const char *name, size_t len)
{
	uint32_t i, n = K.ctl->users;
	char padded[KFLEX_USER_NAME] = "";

	if (!len || len > KFLEX_USER_NAME)
		return -1;
	memcpy(padded, name, len);
	for (i = 0; i < n; i++)
		if (!memcmp(K.ctl->user[i], padded, sizeof(padded)))
			return (int)i;
	/* Never given to another name: a connection may still believe to be the old one's. */
	if (n >= KFLEX_USER_OPEN)
		return -1;
	memcpy(K.ctl->user[n], padded, sizeof(padded));
	STORE(K.ctl->users, n + 1);
	return (int)n;
}

/*
 * Reads the users anew and publishes what they may do. ctl.allow is 0 meanwhile, or nothing is attached yet. Returns
 * how many users may do something.
 */
int kflex_users_check(RedisModuleCtx *ctx)
{
	RedisModuleCallReply *reply = RedisModule_Call(ctx, "ACL", "c", "USERS");
	uint32_t allow[KFLEX_MAX_USERS] = {0};
	int served = 0, open = 0, unused, slot;

	/* The slot of those who did not say who they are. */
	slot_of("default", strlen("default"));
	if (reply && RedisModule_CallReplyType(reply) == REDISMODULE_REPLY_ARRAY) {
		for (size_t i = 0; i < RedisModule_CallReplyLength(reply); i++) {
			size_t len;
			const char *name =
				RedisModule_CallReplyStringPtr(RedisModule_CallReplyArrayElement(reply, i), &len);

			slot = name ? slot_of(name, len) : -1;
			if (slot >= 0)
				allow[slot] = permitted(ctx, name, len, slot ? &unused : &open);
		}
	}
	if (reply)
		RedisModule_FreeCallReply(reply);
	allow[KFLEX_USER_OPEN] = open ? allow[0] : 0;
	for (uint32_t i = 0; i < KFLEX_MAX_USERS; i++) {
		served += i < KFLEX_USER_OPEN && allow[i];
		STORE(K.ctl->user_allow[i], allow[i]);
	}
	if ((K.ctl->default_open & 1) != (uint32_t)open)
		STORE(K.ctl->default_open, K.ctl->default_open + 1);
	return served;
}
