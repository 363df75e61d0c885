/* The artifact's two ENOMEMs, made for real: `create GB [TYPE]` asks the kernel for a map of that size, `search GB`
 * maps a memfd where the artifact's libbpf looks for its heap: 1024 tries from 2^48 downwards. `limit BYTES` before
 * either sets RLIMIT_AS. Nothing is touched, and what is granted is given back by the exit. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* With the runtime of the traced libbpf, as the artifact's libbpf has it after its recipe. */
#ifdef WITH_TRACE
#include "kflex_trace.h"
#define MMAP(...) kflex_trace_mmap("heap", __VA_ARGS__)
#else
#define MMAP(...) mmap(__VA_ARGS__)
#endif

static int create(unsigned long size, unsigned int type)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.map_type = type;
	attr.key_size = 4;
	attr.value_size = 4096;
	attr.max_entries = size / 4096;
	attr.map_flags = BPF_F_MMAPABLE;
	strcpy(attr.map_name, "heap");
	return syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof(attr)) < 0 ? -1 : 0;
}

static int search(unsigned long size)
{
	unsigned long address = ((1UL << 48) + size - 1) / size * size;
	int fd = memfd_create("heap", 0);

	if (fd < 0 || ftruncate(fd, size))
		return -1;
	for (int tries = 0; address && tries < 1024; tries++, address -= size)
		if (MMAP((void *)address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0) !=
		    MAP_FAILED)
			return 0;
	return -1;
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "limit")) {
		struct rlimit limit = {strtoul(argv[2], NULL, 0), RLIM_INFINITY};

		if (setrlimit(RLIMIT_AS, &limit)) {
			perror("setrlimit");
			return 2;
		}
		argc -= 2, argv += 2;
	}
	if (argc < 3)
		return 2;
	unsigned long size = strtoul(argv[2], NULL, 0) << 30;
	unsigned int type = argc > 3 ? strtoul(argv[3], NULL, 0) : BPF_MAP_TYPE_ARRAY;

	if (!strcmp(argv[1], "create") ? create(size, type) : search(size)) {
		fprintf(stderr, "%s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	return 0;
}
