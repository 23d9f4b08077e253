/* A wall clock that jumps: preloaded, CLOCK_REALTIME goes an hour back, then two forth, and so on, every half second.

     cc -shared -fPIC -o jumping_clock.so jumping_clock.c && LD_PRELOAD=./jumping_clock.so program

   Monotonic clocks are as they are. The program's children see the true time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

__attribute__((constructor)) static void only_here(void) { unsetenv("LD_PRELOAD"); }

static long offset(void) {
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    long half_seconds = now.tv_sec * 2 + (now.tv_nsec >= 500000000);
    return half_seconds % 2 ? -3600 : 3600;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += offset();
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
