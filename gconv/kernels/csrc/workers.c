#include "workers.h"

typedef void parallel_region(void (*)(void *), void *, unsigned, unsigned);
typedef int query(void);

static parallel_region *parallel; /* GOMP_parallel */
static query *own_number, *team_size; /* omp_get_thread_num, omp_get_num_threads */
static double grain = 1; /* multiply-accumulates that a thread must have to do */

/* Three functions of an OpenMP library, or NULL three times: then all work is done by the calling thread. And how many
 * multiply-accumulates a thread must have to do, at least. */
EXPORT void gconv_use_threads(void *gomp_parallel, void *omp_get_thread_num, void *omp_get_num_threads, double least)
{
    grain = least;
    parallel = (parallel_region *)gomp_parallel;
    own_number = (query *)omp_get_thread_num;
    team_size = (query *)omp_get_num_threads;
}

struct team { worker *work; void *context; int workers; };

/* What each thread of a team does. There may be fewer of them than workers. */
static void take_part(void *given)
{
    const struct team *team = given;
    for (int number = own_number(); number < team->workers; number += team_size()) team->work(team->context, number);
}

void run_workers(int workers, worker *work, void *context)
{
    if (workers > 1 && parallel) {
        struct team team = {work, context, workers};
        parallel(take_part, &team, workers, 0);
        return;
    }
    for (int number = 0; number < workers; number++) work(context, number);
}

int workers_for(int threads, double macs)
{
    double worth = macs / grain;
    return worth >= threads ? threads : worth < 1 ? 1 : (int)worth;
}
