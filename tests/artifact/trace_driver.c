/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A program with the traced libbpf's runtime in it: each argument is a step, done in order. What it prints
 * and its exit code are its result, which must be the same whatever becomes of its trace.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kflex_trace.h"

static long argument;
static int data = -1;
static volatile sig_atomic_t ticks;

static void tick(int signal)
{
	(void)signal;
	ticks++;
}

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

/* One mapping that works and one that cannot, errno as the program would see it. */
static void map_once(void)
{
	int fd = memfd_create("map", MFD_CLOEXEC);
	void *address;

	if (fd < 0 || ftruncate(fd, 4096))
		fail("memfd");
	errno = EDOM;
	address = kflex_trace_mmap("good", NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
	if (address == MAP_FAILED || errno != EDOM)
		fail("mmap");
	munmap(address, 4096);
	errno = 0;
	address = kflex_trace_mmap("bad", (void *)4096, 0, PROT_READ, MAP_SHARED, fd, 0);
	if (address != MAP_FAILED || errno != EINVAL)
		fail("mmap that must fail");
	close(fd);
}

static void *many(void *name)
{
	char map[32];
	long i;

	for (i = 0; i < argument; i++) {
		snprintf(map, sizeof(map), "%s-%ld", (const char *)name, i);
		if (kflex_trace_mmap(map, NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED)
			fail("mmap");
	}
	return NULL;
}

static void threads(void)
{
	static const char *const names[] = {"a", "b", "c", "d"};
	pthread_t thread[4];
	int i;

	for (i = 0; i < 4; i++)
		if (pthread_create(&thread[i], NULL, many, (void *)names[i]))
			fail("pthread_create");
	for (i = 0; i < 4; i++)
		pthread_join(thread[i], NULL);
}

/* A mapping in a child that has no exec, and one in a child that is this program again. */
static void children(const char *self)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		map_once();
		_exit(7);
	}
	if (waitpid(pid, &status, 0) != pid || status != 7 << 8)
		fail("the forked child");
	pid = fork();
	if (!pid) {
		execl("/proc/self/exe", self, "map", "quietly", NULL);
		_exit(1);
	}
	if (waitpid(pid, &status, 0) != pid || status)
		fail("the executed child");
}

/* As daemons do it, from `argument` on; then a file of its own, under whatever number comes. */
static void close_all(const char *path)
{
	int fd;

	for (fd = argument; fd < 1024; fd++)
		close(fd);
	data = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	while (data >= 0 && data < 900) {
		data = dup(data);
		if (write(data, "x", 1) != 1)
			fail("the program's own file");
	}
}

static void create(const char *name, int code)
{
	errno = code;
	if (kflex_trace_create(code ? -1 : 9, name, "array", 2, 4, argument, 1000, 1024, 0x100000000) !=
		    (code ? -1 : 9) ||
	    errno != code)
		fail("kflex_trace_create");
}

/* A timer that interrupts everything that can be, all the time. */
static void interruptions(void)
{
	struct sigaction action = {.sa_handler = tick};
	struct itimerval often = {{0, 50}, {0, 50}};

	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
}

static void small_files(void)
{
	struct rlimit limit = {argument, argument};

	if (setrlimit(RLIMIT_FSIZE, &limit))
		fail("setrlimit");
}

static void no_descriptors(void)
{
	while (open("/dev/null", O_RDONLY) >= 0)
		;
}

/* Signals that came while a line was written still arrive, and the mask is what it was. */
static void signals_survive(void)
{
	sigset_t mask;

	sigprocmask(SIG_SETMASK, NULL, &mask);
	if (sigismember(&mask, SIGPIPE) || sigismember(&mask, SIGTERM))
		fail("the signal mask");
	signal(SIGPIPE, tick);
	ticks = 0;
	raise(SIGPIPE);
	if (ticks != 1)
		fail("SIGPIPE");
	signal(SIGPIPE, SIG_DFL);
}

int main(int argc, char **argv)
{
	int i;

	for (i = 1; i < argc; i++) {
		const char *step = argv[i], *value = strchr(step, '=');

		if (value)
			argument = strtol(++value, NULL, 0);
		if (!strcmp(step, "map"))
			map_once();
		else if (!strncmp(step, "many=", 5))
			many("many");
		else if (!strncmp(step, "threads=", 8))
			threads();
		else if (!strcmp(step, "children"))
			children(argv[0]);
		else if (!strncmp(step, "close=", 6) && i + 1 < argc)
			close_all(argv[++i]);
		else if (!strncmp(step, "create=", 7) && i + 2 < argc) {
			create(argv[i + 1], atoi(argv[i + 2]));
			i += 2;
		} else if (!strcmp(step, "interrupted"))
			interruptions();
		else if (!strncmp(step, "fsize=", 6))
			small_files();
		else if (!strcmp(step, "no-descriptors"))
			no_descriptors();
		else if (!strcmp(step, "signals"))
			signals_survive();
		else if (!strncmp(step, "chdir=", 6))
			(void)!chdir(value);
		else if (!strcmp(step, "stop"))
			raise(SIGSTOP);
		else if (!strcmp(step, "quietly"))
			return 0;
		else
			return 2;
	}
	puts("done");
	return 0;
}
