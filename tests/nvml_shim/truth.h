/* The true power of a simulated GPU as a function of time, with its exact integral.
 *
 * Times are nanoseconds since the scenario's epoch; they may be negative, because a driver's ring already holds
 * history when a client arrives. */
#ifndef TRUTH_H
#define TRUTH_H

#include <stdbool.h>
#include <stdint.h>

enum truth_kind { TRUTH_CONSTANT, TRUTH_SQUARE, TRUTH_RAMP, TRUTH_STEPS };

struct truth_step {
  int64_t start_ns;
  double watts;
  double energy_j; /* integral from the first step's start to this step's start */
  int64_t active_ns; /* time above `active_above_w` over the same stretch */
};

struct truth {
  enum truth_kind kind;
  double low_w, high_w; /* constant: low_w alone */
  int64_t period_ns;    /* square, ramp, repeated steps; 0 = steps do not repeat */
  int64_t high_ns;      /* square: how long each period stays high */
  int64_t phase_ns;     /* square, ramp: when a period starts */
  double active_above_w; /* steps: the GPU counts as active above this power */
  struct truth_step *steps;
  int step_count;
};

/* Integral of power from the epoch to `t_ns`, joules; negative before the epoch. */
double truth_energy_j(const struct truth *truth, int64_t t_ns);
/* Seconds of activity from the epoch to `t_ns`: the high phase of a square wave, all of a constant or a ramp,
 * the steps above `active_above_w`. */
double truth_active_s(const struct truth *truth, int64_t t_ns);
bool truth_is_active(const struct truth *truth, int64_t t_ns);
double truth_watts(const struct truth *truth, int64_t t_ns);
/* Mean power over (from_ns, to_ns], watts. */
double truth_mean_w(const struct truth *truth, int64_t from_ns, int64_t to_ns);
/* Fills the prefix sums; the steps must be in order of time. */
void truth_prepare_steps(struct truth *truth);

/* Division rounding towards minus infinity, for times before the epoch. */
int64_t floor_div(int64_t numerator, int64_t denominator);

#endif
