/* SPDX-License-Identifier: BSD-3-Clause */
/* A heap of as many GB, as far as user space sees one: a file of that size, for the tree's libbpf to map. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "libbpf.h"

int main(int argc, char **argv)
{
	long gb = argc == 2 ? atol(argv[1]) : 0;
	struct bpf_map map = {.name = "heap", .type = BPF_MAP_TYPE_HEAP, .max_entries = gb * 262144};
	struct bpf_object object = {&map, 1};
	int error;

	map.fd = memfd_create("heap", MFD_CLOEXEC);
	if (gb <= 0 || map.fd < 0 || ftruncate(map.fd, gb << 30))
		return 1;
	error = bpf_object__load(&object);
	if (error)
		printf("errno %d\n", -error);
	else
		printf("mapped %p\n", bpf_map__heap_address(&map));
	return 0;
}
