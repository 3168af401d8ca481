/* What a test in the same process can do with the model, through ctypes. Times are nanoseconds since the Unix epoch. */
#include "shim.h"

#include <math.h>

/* Stops the clock at an instant: from here on, time is what the test says. */
SHIM_EXPORT void shim_set_time_ns(int64_t now_ns) {
  clock_set_ns(now_ns);
}

SHIM_EXPORT void shim_advance_ns(int64_t delta_ns) {
  clock_advance_ns(delta_ns);
}

SHIM_EXPORT void shim_use_real_time(void) {
  clock_use_real_time();
}

SHIM_EXPORT int64_t shim_time_ns(void) {
  return clock_now_ns();
}

/* The instant that scenario times count from; -1 before the first initialisation. */
SHIM_EXPORT int64_t shim_epoch_ns(void) {
  return gate_epoch_ns();
}

/* The wall clock jumps: time stamps that the driver makes from now on are shifted, those made before are not. The
 * model, and the instants of the functions here, run on as if nothing had happened. */
SHIM_EXPORT void shim_step_clock_ns(int64_t delta_ns) {
  clock_step_ns(delta_ns);
}

static const struct device *device_at(int gpu) {
  return gate_epoch_ns() >= 0 && gpu >= 0 && gpu < scenario.device_count ? &scenario.devices[gpu] : NULL;
}

/* The energy that a perfect meter would have seen over (from_ns, to_ns], joules. NaN: no such GPU. */
SHIM_EXPORT double shim_true_energy_joules(int gpu, int64_t from_ns, int64_t to_ns) {
  const struct device *device = device_at(gpu);
  if (device == NULL)
    return NAN;
  return truth_energy_j(&device->truth, to_ns - gate_epoch_ns()) -
         truth_energy_j(&device->truth, from_ns - gate_epoch_ns());
}

SHIM_EXPORT double shim_true_watts(int gpu, int64_t at_ns) {
  const struct device *device = device_at(gpu);
  return device == NULL ? NAN : truth_watts(&device->truth, at_ns - gate_epoch_ns());
}

/* Integral of a GPM metric over (from_ns, to_ns]: percent seconds, or MiB for the links. */
SHIM_EXPORT double shim_true_gpm_integral(int gpu, unsigned metric, int64_t from_ns, int64_t to_ns) {
  const struct device *device = device_at(gpu);
  if (device == NULL || metric >= GPM_METRIC_MAX)
    return NAN;
  return level_integral(device, device->gpm_metrics[metric], from_ns - gate_epoch_ns(), to_ns - gate_epoch_ns());
}

/* How often a call was made, failed ones included; gpu -1: on all GPUs and without one. */
SHIM_EXPORT uint64_t shim_call_count(const char *name, int gpu) {
  return gate_call_count(call_by_name(name), gpu);
}

/* Reads the control file now instead of within 20 ms. */
SHIM_EXPORT void shim_poll_control(void) {
  gate_poll_control();
}

/* Back to the state of a library just loaded: no scenario, real time, counts at zero, every handle invalid. The next
 * initialisation reads the file that the environment names then. No other thread may be inside a call. */
SHIM_EXPORT void shim_reset(void) {
  gate_reset();
}
