/* SPDX-License-Identifier: MIT
 *
 * Copies of whole lines, one function an instruction set, all with one promise that recovery rests on:
 *
 *   lines go in ascending order, none is stored to before it is loaded from, and *copied (bytes) is
 *   advanced after a line is stored and before the next is touched.
 *
 * Processor faults are precise, so at a fault *copied is exact, streaming stores included.
 */
#ifndef PYKHUGE_COPY_PAGE_H
#define PYKHUGE_COPY_PAGE_H

#include <stddef.h>

/* Any alignment of @to, which stays in the cache. */
typedef void copy_lines_fn(char *to, const char *from, size_t nr_lines, volatile size_t *copied);

/* @to is aligned to a line and goes around the cache; needs copy_lines_fence. @next is what will be read
 * after this: as many lines of it are fetched meanwhile (prefetches never fault). */
typedef void stream_lines_fn(char *to, const char *from, size_t nr_lines, const char *next,
			     volatile size_t *copied);

struct copy_lines {
	const char *name;
	copy_lines_fn *cached;
	stream_lines_fn *streamed;
};

/* The one in use. */
const struct copy_lines *copy_lines(void);

/* Streaming stores are weakly ordered: no copy may return, nor fail, before this. */
void copy_lines_fence(void);

#endif
