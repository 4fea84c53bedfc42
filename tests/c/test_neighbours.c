/* SPDX-License-Identifier: MIT
 *
 * Others who handle SIGBUS in the same process, each scenario in a child of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "pykhuge.h"

#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1U << 31)
#endif

static char page[PAGE] __attribute__((aligned(4096)));
static char target[PAGE] __attribute__((aligned(4096)));
static char *bad; /* cannot be read */

static volatile sig_atomic_t calls;
static volatile int last_code;
static void *volatile last_address;
static volatile uintptr_t last_frame;
static sigset_t last_mask;
static struct sigaction saved;
static sigjmp_buf way_out;

static void survives(void)
{
	CHECK(pykhuge_copy_mc_page(target, page, 8) == PAGE - 3 * LINE);
	CHECK(pykhuge_copy_mc_page(target, bad, 0) == PAGE);
	CHECK(pykhuge_copy_mc_page(target, page, 0) == 0);
}

static void touch_bad_memory(void)
{
	*(volatile char *)bad;
}

static void remember(const siginfo_t *info)
{
	calls++;
	last_code = info->si_code;
	last_address = info->si_addr;
	last_frame = (uintptr_t)__builtin_frame_address(0);
	pthread_sigmask(SIG_BLOCK, NULL, &last_mask);
}

static void returning(int signo, siginfo_t *info, void *context)
{
	(void)signo, (void)context;
	remember(info);
}

static void jumping(int signo, siginfo_t *info, void *context)
{
	(void)signo, (void)context;
	remember(info);
	siglongjmp(way_out, 1);
}

static void plain(int signo)
{
	(void)signo;
	calls++;
	siglongjmp(way_out, 1);
}

/* Hands on what it does not know, by calling whom it found. */
static void chaining(int signo, siginfo_t *info, void *context)
{
	remember(info);
	if (saved.sa_flags & SA_SIGINFO)
		saved.sa_sigaction(signo, info, context);
	else if (saved.sa_handler != SIG_DFL && saved.sa_handler != SIG_IGN)
		saved.sa_handler(signo);
	else
		_exit(77);
}

/* Steps aside, as crash reporters do: puts back whom it found and lets the fault happen again. */
static void restoring(int signo, siginfo_t *info, void *context)
{
	(void)signo, (void)context;
	remember(info);
	if (calls > 3)
		_exit(78); /* asked again and again */
	sigaction(SIGBUS, &saved, NULL);
}

static void set(void (*handler)(int, siginfo_t *, void *), int flags, struct sigaction *before)
{
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
	sigaction(SIGBUS, &action, before);
}

static void set_plain(void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler};
	sigaction(SIGBUS, &action, NULL);
}

/* ---- scenarios: each ends by returning, or by the signal it announces ---- */

static void earlier_handler_gets_what_is_not_ours(void)
{
	set(jumping, 0, NULL);
	survives();
	CHECK(calls == 0);
	if (sigsetjmp(way_out, 1) == 0)
		touch_bad_memory();
	CHECK(calls == 1 && last_code > 0 && last_address == bad);
	survives();
}

static void earlier_plain_handler_is_called_as_one(void)
{
	set_plain(plain);
	survives();
	if (sigsetjmp(way_out, 1) == 0)
		touch_bad_memory();
	CHECK(calls == 1);
}

static void handler_that_jumps_out_may_be_called_any_number_of_times(void)
{
	set(jumping, 0, NULL);
	survives();
	for (volatile int i = 0; i < 100; i++)
		if (sigsetjmp(way_out, 1) == 0)
			touch_bad_memory();
	CHECK(calls == 100);
}

static void signal_sent_by_kill_goes_to_the_earlier_handler(void)
{
	set(returning, 0, NULL);
	survives();
	kill(getpid(), SIGBUS);
	CHECK(calls == 1 && last_code == SI_USER);
	survives();
}

static void earlier_handlers_signal_mask_is_honoured(void)
{
	struct sigaction action = {.sa_sigaction = returning, .sa_flags = SA_SIGINFO};
	sigset_t now;
	sigaddset(&action.sa_mask, SIGUSR1);
	sigaction(SIGBUS, &action, NULL);
	survives();
	kill(getpid(), SIGBUS);
	CHECK(calls == 1 && sigismember(&last_mask, SIGBUS) && sigismember(&last_mask, SIGUSR1));
	pthread_sigmask(SIG_BLOCK, NULL, &now);
	CHECK(!sigismember(&now, SIGBUS) && !sigismember(&now, SIGUSR1));
}

static void later_handler_is_found_and_chained_to(void)
{
	survives();
	set(jumping, 0, NULL);
	survives();
	CHECK(calls == 0);
	if (sigsetjmp(way_out, 1) == 0)
		touch_bad_memory();
	CHECK(calls == 1);
}

static void later_handler_that_chains_to_us_ends_in_the_default(void) /* SIGBUS */
{
	survives();
	set(chaining, SA_NODEFER, &saved);
	survives();
	touch_bad_memory();
}

static void later_handler_that_steps_aside_ends_in_the_default(void) /* SIGBUS */
{
	survives();
	set(restoring, 0, &saved);
	survives();
	touch_bad_memory();
}

static void circle_ends_in_the_default(void) /* SIGBUS */
{
	survives();
	set(chaining, SA_NODEFER, &saved);
	survives();
	set(chaining, SA_NODEFER, &saved); /* now it saved the layer that leads to itself */
	survives();
	touch_bad_memory();
}

static void default_action_kills_as_without_us(void) /* SIGBUS */
{
	set_plain(SIG_DFL);
	survives();
	touch_bad_memory();
}

static void default_action_kills_by_kill_too(void) /* SIGBUS */
{
	set_plain(SIG_DFL);
	survives();
	kill(getpid(), SIGBUS);
	pause();
}

static void ignored_fault_kills_as_the_kernel_would(void) /* SIGBUS */
{
	set_plain(SIG_IGN);
	survives();
	touch_bad_memory();
}

static void ignored_kill_stays_ignored(void)
{
	set_plain(SIG_IGN);
	survives();
	kill(getpid(), SIGBUS);
	survives();
}

static void many_later_handlers(void)
{
	static void (*const others[])(int, siginfo_t *, void *) = {returning, jumping, restoring};
	for (int i = 0; i < 100; i++) {
		set(others[i % 3], 0, NULL);
		survives();
	}
	set(jumping, 0, NULL);
	survives();
	if (sigsetjmp(way_out, 1) == 0)
		touch_bad_memory();
	CHECK(calls == 1);
}

/* Linked with --wrap=syscall: other signals arrive in the middle of a copy, from where it sends its own. */
static siginfo_t *in_between;
long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);

long __wrap_syscall(long number, ...)
{
	long a[4];
	va_list list;
	va_start(list, number);
	for (int i = 0; i < 4; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (in_between && number == SYS_rt_tgsigqueueinfo)
		__real_syscall(number, a[0], a[1], a[2], in_between);
	return __real_syscall(number, a[0], a[1], a[2], a[3]);
}

static void arrives_during_a_copy(int code)
{
	siginfo_t info = {.si_signo = SIGBUS, .si_code = code};
	info.si_addr = page + LINE;
	set(returning, 0, NULL);
	survives();
	in_between = &info;
	CHECK(pykhuge_copy_mc_page(target, page, 2) == PAGE - LINE);
	CHECK(calls == 1 && last_code == code);
	CHECK(pykhuge_last_machine_check()->code == BUS_MCEERR_AR);
}

static void signal_sent_by_sigqueue_during_a_copy_is_not_ours(void)
{
	arrives_during_a_copy(SI_QUEUE);
}

static void signal_sent_by_tgkill_during_a_copy_is_not_ours(void)
{
	arrives_during_a_copy(SI_TKILL);
}

static void warning_about_memory_nobody_reads_is_not_ours(void)
{
	arrives_during_a_copy(BUS_MCEERR_AO);
}

static void fault_elsewhere_during_a_copy_is_not_ours(void)
{
	siginfo_t info = {.si_signo = SIGBUS, .si_code = BUS_ADRERR};
	info.si_addr = bad;
	set(returning, 0, NULL);
	survives();
	in_between = &info;
	CHECK(pykhuge_copy_mc_page(target, page, 2) == PAGE - LINE);
	CHECK(calls == 1 && last_address == bad);
}

static void blocked_signal_does_not_stop_a_simulated_machine_check(void)
{
	sigset_t sigbus, now;
	sigemptyset(&sigbus);
	sigaddset(&sigbus, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &sigbus, NULL);
	for (int i = 0; i < 3; i++)
		CHECK(pykhuge_copy_mc_page(target, page, 1) == PAGE);
	pthread_sigmask(SIG_BLOCK, NULL, &now);
	CHECK(sigismember(&now, SIGBUS));
	pthread_sigmask(SIG_UNBLOCK, &sigbus, NULL); /* none is left waiting to kill us */
}

static void signal_is_not_left_blocked(void)
{
	sigset_t now;
	survives();
	pthread_sigmask(SIG_BLOCK, NULL, &now);
	CHECK(!sigismember(&now, SIGBUS));
}

static void alternate_stack_is_used_and_kept(void)
{
#ifdef __SANITIZE_ADDRESS__ /* does not know jumps off such a stack (google/sanitizers#189) */
	return;
#endif
	for (int autodisarm = 0; autodisarm < 2; autodisarm++) {
		stack_t now, ours = {.ss_size = 1 << 16, .ss_sp = malloc(1 << 16)};
		ours.ss_flags = autodisarm ? (int)SS_AUTODISARM : 0;
		CHECK(sigaltstack(&ours, NULL) == 0);
		set(returning, SA_ONSTACK, NULL);
		survives();
		survives();
		kill(getpid(), SIGBUS);
		CHECK(last_frame - (uintptr_t)ours.ss_sp < ours.ss_size);
		CHECK(sigaltstack(NULL, &now) == 0);
		CHECK(now.ss_sp == ours.ss_sp && now.ss_size == ours.ss_size && !(now.ss_flags & SS_DISABLE));
		ours.ss_flags = SS_DISABLE;
		CHECK(sigaltstack(&ours, NULL) == 0);
		free(ours.ss_sp);
	}
}

static void fork_in_mid_use(void)
{
	for (int i = 0; i < 20; i++) {
		int status;
		pid_t child;
		survives();
		child = fork();
		if (child == 0) {
			survives();
			set(jumping, 0, NULL);
			survives();
			_exit(0);
		}
		CHECK(waitpid(child, &status, 0) == child && status == 0);
	}
}

static atomic_int stop;

static void *copy_for_ever(void *unused)
{
	static char mine[PAGE] __attribute__((aligned(4096)));
	(void)unused;
	while (!stop)
		CHECK(pykhuge_copy_mc_page(mine, page, 2) == PAGE - LINE);
	return NULL;
}

static void other_threads_fault_is_not_ours(void)
{
	pthread_t thread;
	set(jumping, SA_NODEFER, NULL);
	survives();
	CHECK(pthread_create(&thread, NULL, copy_for_ever, NULL) == 0);
	for (volatile int i = 0; i < 1000; i++)
		if (sigsetjmp(way_out, 0) == 0)
			touch_bad_memory();
	CHECK(calls == 1000);
	stop = 1;
	CHECK(pthread_join(thread, NULL) == 0);
}

static void *copy_10000_times(void *seed)
{
	char *mine = aligned_alloc(PAGE, PAGE);
	uint64_t random = (uintptr_t)seed;
	for (int i = 0; i < 10000; i++) {
		random = random * 6364136223846793005 + 1442695040888963407;
		size_t line = random >> 57; /* 64..127: none */
		uint64_t bad_lines = line < 64 ? (uint64_t)1 << line : 0;
		int64_t expected = line < 64 ? (int64_t)(PAGE - line * LINE) : 0;
		CHECK(pykhuge_copy_mc_page(mine, page, bad_lines) == expected);
		CHECK(memcmp(mine, page, PAGE - (size_t)expected) == 0);
	}
	free(mine);
	return NULL;
}

static void eight_threads(void)
{
	pthread_t threads[8];
	for (size_t i = 0; i < 8; i++)
		CHECK(pthread_create(&threads[i], NULL, copy_10000_times, (void *)(i + 1)) == 0);
	for (size_t i = 0; i < 8; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

static void run(const char *name, void (*scenario)(void), int expected_signal)
{
	int status;
	pid_t child = fork();
	if (child == 0) {
		set_plain(SIG_DFL); /* the sanitizer's own handler is not a neighbour to test with */
		alarm(60);
		scenario();
		exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	if (expected_signal ? !(WIFSIGNALED(status) && WTERMSIG(status) == expected_signal) : status != 0) {
		fprintf(stderr, "%s: wait status %#x\n", name, (unsigned)status);
		exit(1);
	}
	printf("%s: ok\n", name);
}

#define RUN(scenario) run(#scenario, scenario, 0)
#define RUN_TO_DEATH(scenario) run(#scenario, scenario, SIGBUS)

int main(void)
{
	fill(page, sizeof(page));
	bad = truncated_mapping() + PAGE;
	setbuf(stdout, NULL);
	RUN(earlier_handler_gets_what_is_not_ours);
	RUN(earlier_plain_handler_is_called_as_one);
	RUN(handler_that_jumps_out_may_be_called_any_number_of_times);
	RUN(signal_sent_by_kill_goes_to_the_earlier_handler);
	RUN(earlier_handlers_signal_mask_is_honoured);
	RUN(later_handler_is_found_and_chained_to);
	RUN_TO_DEATH(later_handler_that_chains_to_us_ends_in_the_default);
	RUN_TO_DEATH(later_handler_that_steps_aside_ends_in_the_default);
	RUN_TO_DEATH(circle_ends_in_the_default);
	RUN_TO_DEATH(default_action_kills_as_without_us);
	RUN_TO_DEATH(default_action_kills_by_kill_too);
	RUN_TO_DEATH(ignored_fault_kills_as_the_kernel_would);
	RUN(ignored_kill_stays_ignored);
	RUN(many_later_handlers);
	RUN(signal_sent_by_sigqueue_during_a_copy_is_not_ours);
	RUN(signal_sent_by_tgkill_during_a_copy_is_not_ours);
	RUN(warning_about_memory_nobody_reads_is_not_ours);
	RUN(fault_elsewhere_during_a_copy_is_not_ours);
	RUN(blocked_signal_does_not_stop_a_simulated_machine_check);
	RUN(signal_is_not_left_blocked);
	RUN(alternate_stack_is_used_and_kept);
	RUN(fork_in_mid_use);
	RUN(other_threads_fault_is_not_ours);
	RUN(eight_threads);
	return 0;
}
