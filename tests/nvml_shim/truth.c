#include "truth.h"

#define NS 1e-9

int64_t floor_div(int64_t numerator, int64_t denominator) {
  int64_t quotient = numerator / denominator;
  return quotient - (numerator % denominator < 0);
}

static const struct truth_step *step_at(const struct truth *truth, int64_t t_ns) {
  int low = 0, high = truth->step_count; /* the answer is in [low, high) */
  while (high - low > 1) {
    int middle = low + (high - low) / 2;
    if (truth->steps[middle].start_ns <= t_ns)
      low = middle;
    else
      high = middle;
  }
  return &truth->steps[low];
}

/* Splits a time into whole periods and the rest; both relative to the function's own phase. */
static int64_t split(const struct truth *truth, int64_t t_ns, int64_t *rest_ns) {
  int64_t periods = floor_div(t_ns - truth->phase_ns, truth->period_ns);
  *rest_ns = t_ns - truth->phase_ns - periods * truth->period_ns;
  return periods;
}

static int64_t into_cycle(const struct truth *truth, int64_t t_ns, int64_t *periods) {
  *periods = 0;
  if (truth->kind != TRUTH_STEPS || truth->period_ns == 0)
    return t_ns;
  *periods = floor_div(t_ns, truth->period_ns);
  return t_ns - *periods * truth->period_ns;
}

static double step_energy_j(const struct truth *truth, int64_t t_ns) {
  const struct truth_step *step = step_at(truth, t_ns);
  return step->energy_j + step->watts * (double)(t_ns - step->start_ns) * NS;
}

static int64_t step_active_ns(const struct truth *truth, int64_t t_ns) {
  const struct truth_step *step = step_at(truth, t_ns);
  return step->active_ns + (step->watts > truth->active_above_w ? t_ns - step->start_ns : 0);
}

/* The antiderivative without a fixed origin; truth_energy_j pins it to zero at the epoch. */
static double raw_energy_j(const struct truth *truth, int64_t t_ns) {
  int64_t rest_ns, periods;
  switch (truth->kind) {
  case TRUTH_CONSTANT:
    return truth->low_w * (double)t_ns * NS;
  case TRUTH_SQUARE: {
    periods = split(truth, t_ns, &rest_ns);
    int64_t high_ns = periods * truth->high_ns + (rest_ns < truth->high_ns ? rest_ns : truth->high_ns);
    return truth->low_w * (double)(t_ns - truth->phase_ns) * NS + (truth->high_w - truth->low_w) * (double)high_ns * NS;
  }
  case TRUTH_RAMP: {
    periods = split(truth, t_ns, &rest_ns);
    double period_s = (double)truth->period_ns * NS, rest_s = (double)rest_ns * NS;
    return (double)periods * period_s * (truth->low_w + truth->high_w) / 2 + truth->low_w * rest_s +
           (truth->high_w - truth->low_w) * rest_s * rest_s / (2 * period_s);
  }
  case TRUTH_STEPS:
    rest_ns = into_cycle(truth, t_ns, &periods);
    if (periods == 0)
      return step_energy_j(truth, rest_ns);
    return (double)periods * (step_energy_j(truth, truth->period_ns) - step_energy_j(truth, 0)) +
           step_energy_j(truth, rest_ns);
  }
  return 0;
}

static double raw_active_s(const struct truth *truth, int64_t t_ns) {
  int64_t rest_ns, periods;
  switch (truth->kind) {
  case TRUTH_CONSTANT:
  case TRUTH_RAMP:
    break;
  case TRUTH_SQUARE:
    periods = split(truth, t_ns, &rest_ns);
    return (double)(periods * truth->high_ns + (rest_ns < truth->high_ns ? rest_ns : truth->high_ns)) * NS;
  case TRUTH_STEPS:
    rest_ns = into_cycle(truth, t_ns, &periods);
    return (double)(periods * (step_active_ns(truth, truth->period_ns) - step_active_ns(truth, 0)) +
                    step_active_ns(truth, rest_ns)) *
           NS;
  }
  return (double)t_ns * NS;
}

double truth_energy_j(const struct truth *truth, int64_t t_ns) {
  return raw_energy_j(truth, t_ns) - raw_energy_j(truth, 0);
}

double truth_active_s(const struct truth *truth, int64_t t_ns) {
  return raw_active_s(truth, t_ns) - raw_active_s(truth, 0);
}

double truth_watts(const struct truth *truth, int64_t t_ns) {
  int64_t rest_ns, periods;
  switch (truth->kind) {
  case TRUTH_CONSTANT:
    break;
  case TRUTH_SQUARE:
    split(truth, t_ns, &rest_ns);
    return rest_ns < truth->high_ns ? truth->high_w : truth->low_w;
  case TRUTH_RAMP:
    split(truth, t_ns, &rest_ns);
    return truth->low_w + (truth->high_w - truth->low_w) * (double)rest_ns / (double)truth->period_ns;
  case TRUTH_STEPS:
    return step_at(truth, into_cycle(truth, t_ns, &periods))->watts;
  }
  return truth->low_w;
}

bool truth_is_active(const struct truth *truth, int64_t t_ns) {
  switch (truth->kind) {
  case TRUTH_CONSTANT:
  case TRUTH_RAMP:
    break;
  case TRUTH_SQUARE: {
    int64_t rest_ns;
    split(truth, t_ns, &rest_ns);
    return rest_ns < truth->high_ns;
  }
  case TRUTH_STEPS:
    return truth_watts(truth, t_ns) > truth->active_above_w;
  }
  return true;
}

double truth_mean_w(const struct truth *truth, int64_t from_ns, int64_t to_ns) {
  if (to_ns <= from_ns)
    return truth_watts(truth, to_ns);
  return (raw_energy_j(truth, to_ns) - raw_energy_j(truth, from_ns)) / ((double)(to_ns - from_ns) * NS);
}

void truth_prepare_steps(struct truth *truth) {
  for (int i = 0; i < truth->step_count; i++) {
    struct truth_step *step = &truth->steps[i];
    if (i == 0) {
      step->energy_j = 0;
      step->active_ns = 0;
      continue;
    }
    const struct truth_step *before = &truth->steps[i - 1];
    int64_t length_ns = step->start_ns - before->start_ns;
    step->energy_j = before->energy_j + before->watts * (double)length_ns * NS;
    step->active_ns = before->active_ns + (before->watts > truth->active_above_w ? length_ns : 0);
  }
}
