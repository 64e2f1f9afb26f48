/* Work on several threads, which are those of PyTorch. No OpenMP directive is used: compilers translate them into calls
 * of their own OpenMP library, and PyTorch may have loaded another one. Instead Python finds three functions in the
 * library that PyTorch has loaded and gives them to gconv_use_threads(). */

#ifndef GCONV_WORKERS_H
#define GCONV_WORKERS_H

#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

/* One share of some work; workers are numbered from 0. */
typedef void worker(void *context, int number);

/* Calls `work` once for each worker. Without OpenMP they run one after the other. */
void run_workers(int workers, worker *work, void *context);

/* How many of `threads` threads are worth waking for this many multiply-accumulates. */
int workers_for(int threads, double macs);

/* The first of `all` items that falls to a worker; the first of the next worker ends its share. */
static inline size_t share(size_t all, int worker, int workers) { return all / workers * worker + all % workers * worker / workers; }

#endif
