/* SPDX-License-Identifier: MIT
 *
 * The SIGBUS handler and its neighbours.
 *
 * Others in the process have handlers for SIGBUS too (faulthandler, crash reporters, other libraries),
 * set before ours or after. Each time ours is found displaced it is put on top again as a new layer: an
 * entry point of its own that remembers which disposition it displaced. Whoever was displaced may have
 * saved an older entry point of ours and call or restore it; that one leads to what was there before
 * *it*, so that the chain only ever goes back in time. Where a neighbour closes a circle all the same,
 * the nesting is noticed and the default action ends it.
 *
 * In the handler: no allocation, no locks, no lazily allocated thread-local storage.
 */
#define _GNU_SOURCE
#include "machine_check.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SS_AUTODISARM /* linux/signal.h has it but clashes with signal.h */
#define SS_AUTODISARM (1U << 31)
#endif

/* The default model for a shared object may allocate at first use, inside the handler. */
#define SIGNAL_SAFE_TLS static __thread __attribute__((tls_model("initial-exec")))

SIGNAL_SAFE_TLS struct recovery *volatile innermost;

enum { NR_LAYERS = 8 };

static struct sigaction displaced[NR_LAYERS]; /* [i] is set before layer i is first installed */
static atomic_int nr_layers;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- faults that are ours ---- */

/* Codes of an access that failed. Not BUS_MCEERR_AO (a warning about memory nobody was reading), not
 * BUS_ADRALN, and nothing sent by kill, tgkill or sigqueue (all zero or less). */
static int is_failed_access(const siginfo_t *info)
{
	return info->si_code == BUS_ADRERR || info->si_code == BUS_OBJERR || info->si_code == BUS_MCEERR_AR;
}

/* si_addr_lsb is defined for memory errors only. */
static int lsb_of(const siginfo_t *info)
{
	return info->si_code == BUS_MCEERR_AR ? info->si_addr_lsb : 0;
}

/* A memory error is reported for a whole block, by its start or any address in it: does one of its
 * bytes lie in the range? */
static int touches(const siginfo_t *info, uintptr_t start, size_t nr_bytes)
{
	uintptr_t block = (uintptr_t)1 << (lsb_of(info) & 63);
	uintptr_t first = (uintptr_t)info->si_addr & ~(block - 1);
	return nr_bytes && first < start + nr_bytes && start < first + block;
}

/* The source first: where both share a block, it is read before the other is written. */
static enum fault classify(const struct recovery *here, const siginfo_t *info)
{
	if (!here || !is_failed_access(info))
		return NO_FAULT;
	if (touches(info, here->from, here->nr_bytes))
		return SOURCE_FAULT;
	if (touches(info, here->to, here->nr_bytes))
		return DESTINATION_FAULT;
	return NO_FAULT;
}

_Noreturn static void take_off(struct recovery *here, enum fault fault, const siginfo_t *info,
			       const ucontext_t *context)
{
	here->fault = fault;
	here->code = info->si_code;
	here->address = (uintptr_t)info->si_addr;
	here->address_lsb = lsb_of(info);
	here->stack = context->uc_stack;
	here->autodisarmed = ((unsigned)context->uc_stack.ss_flags & SS_AUTODISARM) != 0;
	innermost = here->outer;
	siglongjmp(here->env, 1);
}

/* ---- faults that are not ---- */

/* A chain that leads back here grows the stack at every turn; one left by longjmp does not. */
struct chain {
	uintptr_t frame;
	int depth;
};
SIGNAL_SAFE_TLS struct chain chain;

_Noreturn static void die_of(siginfo_t *info)
{
	struct sigaction default_action = {.sa_handler = SIG_DFL};
	sigset_t sigbus;
	sigaction(SIGBUS, &default_action, NULL);
	sigemptyset(&sigbus);
	sigaddset(&sigbus, SIGBUS);
	/* Sent again with all it said, so that a core dump and the parent see the original. */
	syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGBUS, info);
	pthread_sigmask(SIG_UNBLOCK, &sigbus, NULL);
	_exit(128 + SIGBUS);
}

/* As the kernel would have called it, had we not been there. */
static void call_handler(const struct sigaction *action, int signo, siginfo_t *info, void *context)
{
	sigset_t blocked = action->sa_mask;
	int saved_errno = errno;
	if (!(action->sa_flags & SA_NODEFER))
		sigaddset(&blocked, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL); /* undone by the return from the signal */
	if (action->sa_flags & SA_SIGINFO)
		action->sa_sigaction(signo, info, context);
	else
		action->sa_handler(signo);
	errno = saved_errno;
}

static void forward(int layer, int signo, siginfo_t *info, void *context)
{
	const struct sigaction *action = &displaced[layer];
	uintptr_t frame = (uintptr_t)__builtin_frame_address(0);
	struct chain outer = chain;

	chain.depth = frame < outer.frame ? outer.depth + 1 : 0;
	chain.frame = frame;
	if (chain.depth > 2 * NR_LAYERS)
		die_of(info);
	if (!(action->sa_flags & SA_SIGINFO) && action->sa_handler == SIG_DFL)
		die_of(info);
	if (!(action->sa_flags & SA_SIGINFO) && action->sa_handler == SIG_IGN) {
		if (info->si_code > 0) /* the kernel does not let a fault be ignored */
			die_of(info);
	} else {
		call_handler(action, signo, info, context);
	}
	chain = outer;
}

static void on_sigbus(int layer, int signo, siginfo_t *info, void *context)
{
	struct recovery *here = innermost;
	enum fault fault = classify(here, info);
	if (fault != NO_FAULT)
		take_off(here, fault, info, context);
	forward(layer, signo, info, context);
}

#define LAYER(n)                                                                                     \
	static void on_sigbus_##n(int signo, siginfo_t *info, void *context)                         \
	{                                                                                            \
		on_sigbus(n, signo, info, context);                                                  \
	}
LAYER(0) LAYER(1) LAYER(2) LAYER(3) LAYER(4) LAYER(5) LAYER(6) LAYER(7)

static void (*const entries[NR_LAYERS])(int, siginfo_t *, void *) = {
	on_sigbus_0, on_sigbus_1, on_sigbus_2, on_sigbus_3,
	on_sigbus_4, on_sigbus_5, on_sigbus_6, on_sigbus_7,
};

/* ---- staying installed ---- */

static int is_ours(const struct sigaction *action)
{
	if (!(action->sa_flags & SA_SIGINFO))
		return 0;
	for (int i = 0; i < NR_LAYERS; i++)
		if (action->sa_sigaction == entries[i])
			return 1;
	return 0;
}

static int same_handler(const struct sigaction *a, const struct sigaction *b)
{
	return ((a->sa_flags ^ b->sa_flags) & SA_SIGINFO) == 0 && a->sa_handler == b->sa_handler;
}

/* A child of fork must not inherit the lock from a thread it does not have. */
static void lock_before_fork(void) { pthread_mutex_lock(&install_lock); }
static void unlock_after_fork(void) { pthread_mutex_unlock(&install_lock); }

/* The layer that displaced @action before, or a new one; the last is used again when all are. */
static int layer_over(const struct sigaction *action)
{
	int nr = atomic_load(&nr_layers);
	for (int i = 0; i < nr; i++)
		if (same_handler(&displaced[i], action))
			return i;
	if (nr == 0)
		pthread_atfork(lock_before_fork, unlock_after_fork, unlock_after_fork);
	if (nr < NR_LAYERS)
		atomic_store(&nr_layers, nr + 1);
	else
		nr = NR_LAYERS - 1;
	displaced[nr] = *action;
	return nr;
}

static void install(void)
{
	struct sigaction on_top, ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
	pthread_mutex_lock(&install_lock);
	sigaction(SIGBUS, NULL, &on_top);
	if (!is_ours(&on_top)) {
		ours.sa_sigaction = entries[layer_over(&on_top)];
		sigaction(SIGBUS, &ours, NULL);
	}
	pthread_mutex_unlock(&install_lock);
}

void machine_check_watch(void)
{
	struct sigaction on_top;
	sigaction(SIGBUS, NULL, &on_top);
	if (__builtin_expect(!is_ours(&on_top), 0))
		install();
}

/* ---- recovery points ---- */

void recovery_enter(struct recovery *here)
{
	here->nr_bytes = 0;
	here->was_blocked = 0;
	here->outer = innermost;
	atomic_signal_fence(memory_order_seq_cst);
	innermost = here;
	atomic_signal_fence(memory_order_seq_cst);
}

void recovery_leave(struct recovery *here)
{
	atomic_signal_fence(memory_order_seq_cst);
	innermost = here->outer;
}

/* The jump skipped the return from the signal: what that would have put back is put back here. */
void recovery_land(struct recovery *here)
{
	sigset_t sigbus;
	sigemptyset(&sigbus);
	sigaddset(&sigbus, SIGBUS);
	/* A handler installed on top of ours during the copy may have had it blocked. */
	pthread_sigmask(here->was_blocked ? SIG_BLOCK : SIG_UNBLOCK, &sigbus, NULL);
	if (here->autodisarmed)
		sigaltstack(&here->stack, NULL);
}

_Noreturn void machine_check_raise(struct recovery *here, const void *line)
{
	siginfo_t info;
	sigset_t sigbus, before;
	ucontext_t context = {0};

	memset(&info, 0, sizeof(info));
	info.si_signo = SIGBUS;
	info.si_code = BUS_MCEERR_AR;
	info.si_addr = (void *)(uintptr_t)line;
	info.si_addr_lsb = 6;

	sigemptyset(&sigbus);
	sigaddset(&sigbus, SIGBUS);
	pthread_sigmask(SIG_UNBLOCK, &sigbus, &before);
	here->was_blocked = sigismember(&before, SIGBUS) == 1;
	syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGBUS, &info);
	/* Only where the system call is forbidden (seccomp): the way out is the same. */
	take_off(here, SOURCE_FAULT, &info, &context);
}
