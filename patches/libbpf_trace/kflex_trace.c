/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Runs inside somebody else's program, at any moment of it, so: no allocation, no stdio, no locks; signals
 * held back while a line is written (a reader that went away must not kill the program with SIGPIPE); the
 * descriptor is kept out of the program's way, never trusted to be ours still, and never inherited by exec.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kflex_trace.h"

#if defined(__has_include)
#if __has_include("libbpf_version.h")
#include "libbpf_version.h"
#endif
#endif

/* Numbers of linux/bpf.h, whose version here may not know all of them. */
enum {
	KT_HASH = 1,
	KT_ARRAY = 2,
	KT_PERCPU_HASH = 5,
	KT_LRU_HASH = 9,
	KT_LRU_PERCPU_HASH = 10,
	KT_LPM_TRIE = 11,
	KT_HASH_OF_MAPS = 13,
	KT_SOCKHASH = 18,
	KT_DEVMAP_HASH = 25,
	KT_RINGBUF = 27,
	KT_USER_RINGBUF = 31,
	KT_ARENA = 33,
	KT_F_MMAPABLE = 1 << 10,
};

/* A string is cut here; escaped, one of a line still leaves room for all its numbers. */
#define KT_LONGEST_STRING 255
/* Below PIPE_BUF: lines of several processes do not mix. */
#define KT_LONGEST_LINE 2560
/* Where programs do not count on a free descriptor. */
#define KT_HIGH_FD	    512
#define KT_WRITE_TIMEOUT_MS 1000

struct kt_line {
	size_t used;
	char text[KT_LONGEST_LINE];
};

int kflex_trace_state;

/* A descriptor and the file it was for; programs close what they do not know, and numbers come again. */
struct kt_file {
	int fd;
	dev_t device;
	ino_t inode;
};

static char kt_path[PATH_MAX];
static struct kt_file kt_trace = {.fd = -1};
static struct kt_file kt_stderr = {.fd = -1};

/*
 * The last mmap of this thread, if it failed: the next one with the same file and length is another try. In a
 * library loaded late, the dynamic linker allocates it at a thread's first traced mapping, and not before.
 */
static __thread struct {
	int fd;
	size_t length;
	unsigned int tries;
} kt_search;

static void kt_char(struct kt_line *line, char c)
{
	if (line->used < sizeof(line->text))
		line->text[line->used++] = c;
}

static void kt_text(struct kt_line *line, const char *text)
{
	while (*text)
		kt_char(line, *text++);
}

static void kt_digits(struct kt_line *line, uint64_t value, unsigned int base)
{
	char digits[20];
	int count = 0;

	do
		digits[count++] = "0123456789abcdef"[value % base];
	while (value /= base);
	while (count)
		kt_char(line, digits[--count]);
}

static void kt_key(struct kt_line *line, const char *key)
{
	kt_text(line, ",\"");
	kt_text(line, key);
	kt_text(line, "\":");
}

static void kt_number(struct kt_line *line, const char *key, int64_t value)
{
	kt_key(line, key);
	if (value < 0)
		kt_char(line, '-');
	kt_digits(line, value < 0 ? -(uint64_t)value : (uint64_t)value, 10);
}

static void kt_unsigned(struct kt_line *line, const char *key, uint64_t value)
{
	kt_key(line, key);
	kt_digits(line, value, 10);
}

/* JSON numbers are doubles to many readers: addresses are strings. */
static void kt_address(struct kt_line *line, const char *key, uint64_t value)
{
	kt_key(line, key);
	kt_text(line, "\"0x");
	kt_digits(line, value, 16);
	kt_char(line, '"');
}

/* Bytes beyond ASCII become the code points of the same number: a name need not be UTF-8, a line must be. */
static void kt_string(struct kt_line *line, const char *key, const char *value)
{
	int left = KT_LONGEST_STRING;

	kt_key(line, key);
	kt_char(line, '"');
	for (; value && *value && left--; value++) {
		unsigned char c = *value;

		if (c == '"' || c == '\\') {
			kt_char(line, '\\');
			kt_char(line, c);
		} else if (c < 0x20 || c >= 0x7f) {
			kt_text(line, "\\u00");
			kt_char(line, "0123456789abcdef"[c >> 4]);
			kt_char(line, "0123456789abcdef"[c & 15]);
		} else {
			kt_char(line, c);
		}
	}
	kt_char(line, '"');
}

static void kt_begin(struct kt_line *line, const char *event)
{
	struct timespec now;

	line->used = 0;
	clock_gettime(CLOCK_MONOTONIC, &now);
	kt_text(line, "{\"v\":1");
	kt_unsigned(line, "t", (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec);
	kt_number(line, "pid", getpid());
	kt_number(line, "tid", syscall(SYS_gettid));
	kt_string(line, "event", event);
}

static int kt_open(void)
{
	int fd, high;

	/* Not blocking: a FIFO that nobody reads is refused, a full one times out. */
	do
		fd = open(kt_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0644);
	while (fd < 0 && errno == EINTR);
	if (fd < 0)
		return fd;
	high = fcntl(fd, F_DUPFD_CLOEXEC, KT_HIGH_FD);
	if (high < 0)
		return fd;
	close(fd);
	return high;
}

static int kt_keep(struct kt_file *file, int fd, struct stat *found)
{
	if (fstat(fd, found))
		return errno;
	file->fd = fd;
	file->device = found->st_dev;
	file->inode = found->st_ino;
	return 0;
}

static int kt_kept(const struct kt_file *file, struct stat *now)
{
	return !fstat(file->fd, now) && now->st_dev == file->device && now->st_ino == file->inode;
}

/* One line, in one write that waits a moment at most; 0 or an errno. */
static int kt_write(int fd, const struct kt_line *line, int timeout_ms)
{
	struct pollfd ready = {.fd = fd, .events = POLLOUT};
	ssize_t written;
	int count;

	do
		count = poll(&ready, 1, timeout_ms);
	while (count < 0 && errno == EINTR);
	if (count <= 0)
		return count ? errno : ETIMEDOUT;
	if (ready.revents & POLLNVAL)
		return EBADF;
	do
		written = write(fd, line->text, line->used);
	while (written < 0 && errno == EINTR);
	if (written < 0)
		return errno;
	return (size_t)written == line->used ? 0 : ENOSPC;
}

static int kt_deliver(const struct kt_line *line)
{
	struct stat now;
	int fd, error;

	/* Where somebody removed the file that was opened by name, its name has, or gets, another one. */
	if (kt_kept(&kt_trace, &now) && (!kt_path[0] || now.st_nlink))
		return kt_write(kt_trace.fd, line, KT_WRITE_TIMEOUT_MS);
	if (!kt_path[0])
		return EBADF;
	/* For this line only: nothing that other threads use changes. */
	fd = kt_open();
	if (fd < 0)
		return errno;
	error = kt_write(fd, line, KT_WRITE_TIMEOUT_MS);
	close(fd);
	return error;
}

/* The end of tracing, said once; to be called with signals held back. */
static void kt_stop(int error)
{
	struct kt_line line = {};
	struct stat now;

	if (!__atomic_exchange_n(&kflex_trace_state, 0, __ATOMIC_RELAXED) || !kt_kept(&kt_stderr, &now))
		return;
	kt_text(&line, "kflex-trace: no more is traced: errno ");
	kt_digits(&line, error, 10);
	kt_text(&line, " at what KFLEX_TRACE names\n");
	kt_write(kt_stderr.fd, &line, 0);
}

/* Take back the signal that our own write raised. */
static void kt_take(int number, const sigset_t *before)
{
	static const struct timespec at_once;
	sigset_t set;

	if (sigismember(before, number))
		return;
	sigemptyset(&set);
	sigaddset(&set, number);
	while (sigtimedwait(&set, NULL, &at_once) < 0 && errno == EINTR)
		;
}

static void kt_end(struct kt_line *line, int error)
{
	sigset_t all, mask, pending;
	int cancel;

	kt_text(line, "}\n");
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, &mask);
	sigpending(&pending);
	if (!error)
		error = kt_deliver(line);
	if (error)
		kt_stop(error);
	kt_take(SIGPIPE, &pending);
	kt_take(SIGXFSZ, &pending);
	sigprocmask(SIG_SETMASK, &mask, NULL);
	pthread_setcancelstate(cancel, &cancel);
}

static uint64_t kt_rounded(uint64_t size, uint64_t to)
{
	return (size + to - 1) / to * to;
}

/* What the map's entries take, of one CPU where each has its own; without what the kernel adds. */
static uint64_t kt_bytes(uint32_t type, uint32_t key_size, uint32_t value_size, uint32_t max_entries, uint32_t flags)
{
	uint64_t page = sysconf(_SC_PAGESIZE), entry = kt_rounded(value_size, 8), bytes;

	switch (type) {
	case KT_RINGBUF:
	case KT_USER_RINGBUF:
		return max_entries;
	case KT_ARENA:
		entry = page;
		break;
	case KT_HASH:
	case KT_PERCPU_HASH:
	case KT_LRU_HASH:
	case KT_LRU_PERCPU_HASH:
	case KT_LPM_TRIE:
	case KT_HASH_OF_MAPS:
	case KT_SOCKHASH:
	case KT_DEVMAP_HASH:
		entry += kt_rounded(key_size, 8);
		break;
	default:
		break;
	}
	if (__builtin_mul_overflow(entry, (uint64_t)max_entries, &bytes))
		return UINT64_MAX;
	return type == KT_ARRAY && flags & KT_F_MMAPABLE ? kt_rounded(bytes, page) : bytes;
}

void kflex_trace_created(int fd, const char *name, const char *type_name, uint32_t type, uint32_t key_size,
			 uint32_t value_size, uint32_t max_entries, uint32_t flags, uint64_t extra)
{
	int error = errno;
	struct kt_line line;

	kt_search.tries = 0;
	kt_begin(&line, "map_create");
	kt_string(&line, "name", name);
	kt_unsigned(&line, "type", type);
	kt_string(&line, "type_name", type_name);
	kt_unsigned(&line, "key_size", key_size);
	kt_unsigned(&line, "value_size", value_size);
	kt_unsigned(&line, "max_entries", max_entries);
	kt_unsigned(&line, "flags", flags);
	kt_address(&line, "map_extra", extra);
	kt_unsigned(&line, "bytes", kt_bytes(type, key_size, value_size, max_entries, flags));
	kt_number(&line, "fd", fd < 0 ? -1 : fd);
	kt_number(&line, "errno", fd < 0 ? error : 0);
	kt_end(&line, 0);
	errno = error;
}

void kflex_trace_mapped(void *address, const char *map, void *hint, size_t length, int prot, int flags, int fd)
{
	int error = errno, failed = address == MAP_FAILED;
	struct kt_line line;

	if (fd != kt_search.fd || length != kt_search.length)
		kt_search.tries = 0;
	kt_search.fd = fd;
	kt_search.length = length;
	kt_begin(&line, "mmap");
	kt_string(&line, "map", map);
	kt_address(&line, "hint", (uintptr_t)hint);
	kt_unsigned(&line, "length", length);
	kt_number(&line, "prot", prot);
	kt_number(&line, "flags", flags);
	kt_number(&line, "fd", fd);
	if (failed) {
		kt_key(&line, "address");
		kt_text(&line, "null");
	} else {
		kt_address(&line, "address", (uintptr_t)address);
	}
	kt_number(&line, "errno", failed ? error : 0);
	kt_unsigned(&line, "try", ++kt_search.tries);
	if (!failed)
		kt_search.tries = 0;
	kt_end(&line, 0);
	errno = error;
}

/* The descriptor number of "fd:N"; -1 if that is not what it says. */
static int kt_given(const char *value)
{
	int number = 0, digits = 0;

	for (value += strlen("fd:"); *value >= '0' && *value <= '9' && digits < 7; value++, digits++)
		number = number * 10 + *value - '0';
	return *value || !digits ? -1 : number;
}

/* Where lines go; 0 or an errno. */
static int kt_start(const char *value)
{
	struct stat found;
	size_t used = 0;
	int fd, flags;

	if (!strncmp(value, "fd:", 3)) {
		fd = kt_given(value);
		flags = fd < 0 ? -1 : fcntl(fd, F_GETFL);
		if (flags < 0 || kt_keep(&kt_trace, fd, &found))
			return EBADF;
		/* A number that was used again since: better no trace than lines in somebody's data. */
		if ((flags & O_ACCMODE) == O_RDONLY || (S_ISREG(found.st_mode) && !(flags & O_APPEND)))
			return EINVAL;
		return 0;
	}
	/* The program may change its directory. */
	if (value[0] != '/' && getcwd(kt_path, sizeof(kt_path) - 1)) {
		used = strlen(kt_path);
		kt_path[used++] = '/';
	}
	if (strlen(value) >= sizeof(kt_path) - used)
		return ENAMETOOLONG;
	memcpy(kt_path + used, value, strlen(value) + 1);
	fd = kt_open();
	return fd < 0 ? errno : kt_keep(&kt_trace, fd, &found);
}

static void kt_limit(struct kt_line *line, const char *key, int resource)
{
	struct rlimit limit;

	if (!getrlimit(resource, &limit))
		kt_number(line, key, limit.rlim_cur == RLIM_INFINITY ? -1 : (int64_t)limit.rlim_cur);
}

/* At load, so that a trace tells a program that made no map from one that never loaded this library. */
__attribute__((constructor)) static void kt_load(void)
{
	const char *value = secure_getenv("KFLEX_TRACE");
	char program[KT_LONGEST_STRING + 1];
	struct kt_line line;
	struct stat found;
	ssize_t length;
	int error = errno;

	if (!value || !*value)
		return;
	length = readlink("/proc/self/exe", program, sizeof(program) - 1);
	program[length < 0 ? 0 : length] = 0;
	kt_begin(&line, "start");
#ifdef LIBBPF_MAJOR_VERSION
	kt_key(&line, "libbpf");
	kt_char(&line, '"');
	kt_digits(&line, LIBBPF_MAJOR_VERSION, 10);
	kt_char(&line, '.');
	kt_digits(&line, LIBBPF_MINOR_VERSION, 10);
	kt_char(&line, '"');
#endif
	kt_string(&line, "program", program);
	kt_limit(&line, "rlimit_as", RLIMIT_AS);
	kt_limit(&line, "rlimit_memlock", RLIMIT_MEMLOCK);
	kt_keep(&kt_stderr, STDERR_FILENO, &found);
	kflex_trace_state = 1;
	kt_end(&line, kt_start(value));
	errno = error;
}
