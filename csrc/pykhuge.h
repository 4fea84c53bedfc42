/* SPDX-License-Identifier: MIT
 *
 * pykhuge's copy core: copies that survive memory errors in their source.
 *
 * A copy meets a machine check as a SIGBUS: one the kernel raises (poisoned memory, a file truncated
 * under its mapping, UFFDIO_POISON), or one this core sends to its own thread where the caller marked a
 * line of the source as bad. Both leave by the same way: the handler jumps to the recovery point of the
 * copy that this thread is in. A SIGBUS that belongs to no copy goes to whoever had it before.
 *
 * Rules. Any thread, any number at once; nothing is allocated. Lines are 64 bytes, aligned in the
 * source's address space. A line is read before any of it is written, and the next line is not touched
 * before it is counted: so the count is the copy's own progress, whatever address the signal carried.
 * A thread that blocks SIGBUS dies of a genuine fault, as it would without us (the kernel forces it).
 *
 * The lines between the two cdef marks are also the declarations that cffi compiles.
 */
#ifndef PYKHUGE_H
#define PYKHUGE_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */
#define PYKHUGE_PAGE_SIZE 4096
#define PYKHUGE_LINE_SIZE 64
enum { PYKHUGE_HOLE = -1, PYKHUGE_DESTINATION_FAULT = -1 };

/* What the last copy of this thread that did not finish has met. The last three are the signal's si_addr,
 * si_code and si_addr_lsb, which are macros in C. */
struct pykhuge_machine_check {
	int64_t index;      /* which frame of the call; 0 for a page or a run of bytes */
	int64_t not_copied; /* of that frame, page or run; bytes */
	uint64_t address;   /* as the signal had it: may be coarse */
	int code;           /* BUS_MCEERR_AR for memory errors, BUS_ADRERR past the end of a file */
	int address_lsb;    /* 1 << this is the size of what is lost at address; 0 if not said */
};

/* Copy one page. Returns 0, or the bytes not copied (1..PAGE_SIZE): all before the first unreadable line
 * is in @to, nothing after it was written. Bit i of @bad_lines declares line i of @from unreadable.
 * PYKHUGE_DESTINATION_FAULT if @to could not be written; what is in @to is undefined then. */
int64_t pykhuge_copy_mc_page(void *to, const void *from, uint64_t bad_lines);

/* The same for @nr_bytes at any alignment. Bit i of @bad_lines[p] declares the 64 bytes at
 * @from + 4096 * p + 64 * i unreadable; NULL: none. */
int64_t pykhuge_copy_mc_bytes(void *to, const void *from, size_t nr_bytes, const uint64_t *bad_lines);

/* Copy @nr frames to consecutive pages at @to, page aligned: frame number @frames[i], counted in pages
 * from @base, any order; any negative number is a hole, cleared. @bad_lines has one word by frame number.
 * Stops at the first failure: returns as above, for the one frame whose index the record names. */
int64_t pykhuge_copy_mc_frames(void *to, const void *base, const int64_t *frames, size_t nr,
			       const uint64_t *bad_lines);

/* The same copies before they could recover: a fault is delivered as if this core did not exist. */
void pykhuge_copy_page(void *to, const void *from);
void pykhuge_copy_frames(void *to, const void *base, const int64_t *frames, size_t nr);

/* The calling thread's record. Never NULL, and all zero before the first failure. */
const struct pykhuge_machine_check *pykhuge_last_machine_check(void);

/* Names of the instruction sets this processor can copy with, best first; NULL past the end. "portable"
 * is always the last. Choosing is for tests and measurements: it is process-wide. */
const char *pykhuge_instruction_set(size_t i);
const char *pykhuge_current_instruction_set(void);
int pykhuge_use_instruction_set(const char *name); /* 0, or -1 if this processor cannot */

/* What a benchmark compares with: a loop of libc's memcpy, one page at a time. */
void pykhuge_baseline_memcpy_frames(void *to, const void *base, const int64_t *frames, size_t nr);
/* cdef: end */

#endif
