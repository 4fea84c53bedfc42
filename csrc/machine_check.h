/* SPDX-License-Identifier: MIT
 *
 * The way out of a copy whose source cannot be read: a recovery point on the copy's stack, known to the
 * SIGBUS handler through a thread-local pointer.
 *
 *	struct recovery here;
 *	machine_check_watch();
 *	if (sigsetjmp(here.env, 0) == 0) {
 *		recovery_enter(&here);
 *		recovery_range(&here, to, from, nr_bytes);    (as often as the range changes)
 *		... copy ...
 *		recovery_leave(&here);
 *	} else {
 *		recovery_land(&here);                         (here.fault says what happened)
 *	}
 *
 * The signal mask is not saved by sigsetjmp (160 ns); the handler has SA_NODEFER instead.
 */
#ifndef PYKHUGE_MACHINE_CHECK_H
#define PYKHUGE_MACHINE_CHECK_H

#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>

enum fault { NO_FAULT, SOURCE_FAULT, DESTINATION_FAULT };

/* Written by the copy, read by the handler between any two of its instructions: hence volatile. */
struct recovery {
	sigjmp_buf env;
	struct recovery *outer;        /* a copy this one interrupted, from a signal handler */
	volatile uintptr_t to, from;   /* what is being copied now */
	volatile size_t nr_bytes;
	volatile size_t copied;        /* of nr_bytes; the copy's own progress */
	volatile int was_blocked;      /* SIGBUS, when machine_check_raise unblocked it */
	volatile int autodisarmed;     /* the kernel disabled the signal stack on entry */
	stack_t stack;                 /* to be put back if so */
	enum fault fault;
	int code, address_lsb; /* si_code and the rest are macros */
	uintptr_t address;
};

/* See that the handler is in place, at first use or because someone installed another later. */
void machine_check_watch(void);

void recovery_enter(struct recovery *here);
void recovery_leave(struct recovery *here);
void recovery_land(struct recovery *here);

static inline void recovery_range(struct recovery *here, const void *to, const void *from, size_t nr_bytes)
{
	here->nr_bytes = 0; /* the range is never half old, half new */
	here->to = (uintptr_t)to;
	here->from = (uintptr_t)from;
	here->copied = 0;
	here->nr_bytes = nr_bytes;
}

/* A load of the bad line at @line, as the hardware and the kernel would report it. Does not return. */
_Noreturn void machine_check_raise(struct recovery *here, const void *line);

#endif
