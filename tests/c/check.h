/* SPDX-License-Identifier: MIT
 *
 * What the C tests share: a check that names itself, and memory that fails on demand.
 */
#ifndef PYKHUGE_CHECK_H
#define PYKHUGE_CHECK_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                             \
	do {                                                                                         \
		if (!(condition)) {                                                                  \
			fprintf(stderr, "%s:%d: %s: not %s\n", __FILE__, __LINE__, __func__,         \
				#condition);                                                         \
			exit(1);                                                                     \
		}                                                                                    \
	} while (0)

#if defined(__has_feature) /* clang's way to say what gcc defines */
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

enum { PAGE = 4096, LINE = 64, UNTOUCHED = 0xa5 };

/* Three pages of which the middle one cannot be accessed; the first is readable and writable. */
char *truncated_mapping(void);
char *poisoned_mapping(void); /* NULL where the kernel has no UFFDIO_POISON */

/* Every 8-byte word differs from every other in reach. */
void fill(char *at, size_t nr_bytes);

int all_untouched(const char *at, size_t nr_bytes);

#endif
