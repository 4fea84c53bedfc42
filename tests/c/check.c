/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux 6.6; older headers do not have it. */
struct poison_request {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
#define POISON _IOWR(UFFDIO, 0x08, struct poison_request)

void fill(char *at, size_t nr_bytes)
{
	uint64_t word = 0x9e3779b97f4a7c15;
	for (size_t i = 0; i < nr_bytes; i += sizeof(word), word += 0x9e3779b97f4a7c15)
		memcpy(at + i, &word, nr_bytes - i < sizeof(word) ? nr_bytes - i : sizeof(word));
}

int all_untouched(const char *at, size_t nr_bytes)
{
	for (size_t i = 0; i < nr_bytes; i++)
		if ((unsigned char)at[i] != UNTOUCHED)
			return 0;
	return 1;
}

char *truncated_mapping(void)
{
	int fd = memfd_create("truncated", 0);
	char *at;
	CHECK(fd >= 0 && ftruncate(fd, 3 * PAGE) == 0);
	at = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(at != MAP_FAILED);
	fill(at, PAGE);
	CHECK(ftruncate(fd, PAGE) == 0);
	return at;
}

char *poisoned_mapping(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register area = {.mode = UFFDIO_REGISTER_MODE_MISSING};
	struct poison_request poison = {0};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	char *at = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	fill(at, PAGE);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) != 0)
		return NULL;
	area.range.start = (uintptr_t)at + PAGE;
	area.range.len = PAGE;
	CHECK(ioctl(uffd, UFFDIO_REGISTER, &area) == 0);
	poison.range = area.range;
	return ioctl(uffd, POISON, &poison) == 0 ? at : NULL;
}
