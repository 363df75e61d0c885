/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A program that uses libbpf as others do, linked with the distribution's:
 *   create NAME TYPE KEY VALUE ENTRIES FLAGS   one map: "fd" or "errno N"
 *   load OBJECT [MAP ENTRIES [EXTRA]]          an object's maps: "loaded" or "errno N", and where they are mapped
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

static int create(char **argument)
{
	LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = strtoul(argument[5], NULL, 0));
	int fd = bpf_map_create(strtoul(argument[1], NULL, 0), argument[0], strtoul(argument[2], NULL, 0),
				strtoul(argument[3], NULL, 0), strtoul(argument[4], NULL, 0), &opts);

	if (fd < 0)
		printf("errno %d\n", -fd);
	else
		puts("fd");
	return 0;
}

static int load(int count, char **argument)
{
	struct bpf_object *object = bpf_object__open_file(argument[0], NULL);
	struct bpf_map *map;
	int error;

	if (!object)
		return 1;
	if (count > 2) {
		map = bpf_object__find_map_by_name(object, argument[1]);
		if (!map || bpf_map__set_max_entries(map, strtoul(argument[2], NULL, 0)))
			return 1;
		if (count > 3 && bpf_map__set_map_extra(map, strtoull(argument[3], NULL, 0)))
			return 1;
	}
	error = bpf_object__load(object);
	if (error) {
		printf("errno %d\n", -error);
		return 0;
	}
	puts("loaded");
	bpf_object__for_each_map(map, object)
	{
		size_t size = 0;
		const void *address = bpf_map__initial_value(map, &size);

		if (address)
			printf("%s %p\n", bpf_map__name(map), address);
	}
	bpf_object__close(object);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 8 && !strcmp(argv[1], "create"))
		return create(argv + 2);
	if (argc >= 3 && !strcmp(argv[1], "load"))
		return load(argc - 2, argv + 2);
	return 2;
}
