#include "shim.h"

#include <math.h>

int64_t last_update_ns(int64_t t_ns, int64_t period_ns, int64_t phase_ns) {
  return floor_div(t_ns - phase_ns, period_ns) * period_ns + phase_ns;
}

double level_at(const struct device *device, struct pair level, int64_t t_ns) {
  return truth_is_active(&device->truth, t_ns) ? level.on : level.off;
}

double level_integral(const struct device *device, struct pair level, int64_t from_ns, int64_t to_ns) {
  double seconds = (double)(to_ns - from_ns) * 1e-9;
  if (level.on == level.off)
    return level.on * seconds;
  double active_s = truth_active_s(&device->truth, to_ns) - truth_active_s(&device->truth, from_ns);
  return level.off * seconds + (level.on - level.off) * active_s;
}

/* What a power sensor makes of a true power: its gain and offset, then whole quanta. */
static unsigned reading_mw(const struct device *device, double watts) {
  double mw = (device->gain * watts + device->offset_w) * 1e3;
  if (mw <= 0)
    return 0;
  double quantum = device->quantum_mw;
  return (unsigned)(floor(mw / quantum + 0.5) * quantum);
}

static unsigned boxcar_mw(const struct device *device, const struct sensor *sensor, int64_t t_ns) {
  int64_t end_ns = last_update_ns(t_ns, sensor->period_ns, sensor->phase_ns) - sensor->lag_ns;
  return reading_mw(device, truth_mean_w(&device->truth, end_ns - sensor->window_ns, end_ns));
}

unsigned sensor_instant_mw(const struct device *device, int64_t t_ns) {
  return boxcar_mw(device, &device->instant, t_ns);
}

unsigned sensor_average_mw(const struct device *device, int64_t t_ns) {
  return boxcar_mw(device, &device->average, t_ns);
}

unsigned sensor_memory_mw(const struct device *device, int64_t t_ns) {
  int64_t end_ns = last_update_ns(t_ns, device->average.period_ns, device->average.phase_ns);
  double joules = level_integral(device, device->memory_w, end_ns - device->average.window_ns, end_ns);
  return (unsigned)llround(joules / ((double)device->average.window_ns * 1e-9) * 1e3);
}

uint64_t sensor_energy_mj(const struct device *device, int64_t t_ns) {
  int64_t tick_ns = last_update_ns(t_ns, device->counter_period_ns, device->counter_phase_ns);
  int64_t since_ns = 0; /* the counter's own start */
  double start_mj = device->counter_start_mj;
  int resets = atomic_load(&((struct device *)device)->reset_count);
  bool reset = false;
  for (int i = 0; i < resets; i++)
    if (device->resets_ns[i] <= t_ns && (!reset || device->resets_ns[i] > since_ns)) {
      since_ns = device->resets_ns[i];
      start_mj = 0;
      reset = true;
    }
  if (reset && tick_ns < since_ns)
    return 0; /* no tick since the reset */
  double joules = truth_energy_j(&device->truth, tick_ns) - truth_energy_j(&device->truth, since_ns);
  double mj = start_mj + device->counter_gain * joules * 1e3;
  return mj <= 0 ? 0 : (uint64_t)mj;
}

/* ---- rings ---- */

/* The H200's ring: 20.0 ms median spacing, 20.14 ms mean, 6 to 48 ms between single samples. Modelled as a 20 ms grid
 * on which 0.7 % of the slots are dropped and 6 % of the samples come up to 6 ms early or 8 ms late; the rest jitters
 * by 0.1 ms. Everything scales with the period. */
static bool slot_dropped(const struct device *device, int64_t slot) {
  return hash64(device->seed, 10, (uint64_t)slot) % 1000 < 7 &&
         hash64(device->seed, 10, (uint64_t)(slot - 1)) % 1000 >= 7; /* never two in a row */
}

static int64_t slot_end_ns(const struct device *device, const struct ring *ring, int64_t slot) {
  int64_t end_ns = slot * ring->period_ns + ring->phase_ns;
  if (!ring->jitter)
    return end_ns;
  uint64_t random = hash64(device->seed, 11, (uint64_t)slot);
  bool outlier = random % 100 < 6;
  double unit = (double)(random >> 40) / (double)(1 << 24); /* [0, 1) */
  double shift = outlier ? -0.3 + 0.7 * unit : 0.01 * (unit - 0.5);
  return end_ns + (int64_t)(shift * (double)ring->period_ns) / 1000 * 1000;
}

static const struct ring *ring_of(const struct device *device, int type) {
  const struct ring *ring = NULL;
  if (type == SAMPLES_TOTAL_POWER)
    ring = &device->power_ring;
  else if ((type == SAMPLES_GPU_UTIL || type == SAMPLES_MEMORY_UTIL) && device->mig != MIG_ON)
    ring = &device->utilization_ring;
  return ring != NULL && ring->depth > 0 ? ring : NULL;
}

int sensor_ring_depth(const struct device *device, int type) {
  const struct ring *ring = ring_of(device, type);
  return ring == NULL ? 0 : ring->depth;
}

static unsigned ring_value(const struct device *device, int type, int64_t from_ns, int64_t to_ns) {
  if (type == SAMPLES_TOTAL_POWER)
    return reading_mw(device, truth_mean_w(&device->truth, from_ns, to_ns));
  struct pair level = type == SAMPLES_GPU_UTIL ? device->utilization : device->memory_utilization;
  return (unsigned)llround(level_integral(device, level, from_ns, to_ns) / ((double)(to_ns - from_ns) * 1e-9));
}

/* Newest slot that has ended by `t_ns`. */
static int64_t newest_slot(const struct device *device, const struct ring *ring, int64_t t_ns) {
  int64_t slot = floor_div(t_ns - ring->phase_ns, ring->period_ns) + 1; /* may have come early */
  while (slot_end_ns(device, ring, slot) > t_ns || (ring->jitter && slot_dropped(device, slot)))
    slot--;
  return slot;
}

static int64_t slot_before(const struct device *device, const struct ring *ring, int64_t slot) {
  do
    slot--;
  while (ring->jitter && slot_dropped(device, slot));
  return slot;
}

int sensor_ring(const struct device *device, int type, int64_t t_ns, uint64_t since_us, nvmlSample_t *samples,
                int capacity) {
  const struct ring *ring = ring_of(device, type);
  if (ring == NULL)
    return -1;
  /* Walk from the newest sample back to the first that the caller has seen: a reader that comes often pays for the
   * new samples only. After a step of the clock the stamps are no longer in order, so look at the whole ring. */
  bool ordered = !clock_was_stepped();
  int64_t slot = newest_slot(device, ring, t_ns);
  int64_t end_ns = slot_end_ns(device, ring, slot);
  int oldest = 0;
  int64_t first_slot = slot;
  for (int64_t scan = slot; oldest < ring->depth; oldest++) {
    int64_t scan_end_ns = scan == slot ? end_ns : slot_end_ns(device, ring, scan);
    if (ordered && clock_stamp_us(scan_end_ns) <= since_us)
      break;
    first_slot = scan;
    scan = slot_before(device, ring, scan);
  }
  /* Then forward, so that a small buffer gets the oldest ones and its reader can come back for the rest. */
  int filled = 0;
  int64_t before_ns = slot_end_ns(device, ring, slot_before(device, ring, first_slot));
  for (int64_t scan = first_slot; oldest > 0 && filled < capacity; oldest--) {
    int64_t scan_end_ns = slot_end_ns(device, ring, scan);
    uint64_t stamp_us = clock_stamp_us(scan_end_ns);
    if (stamp_us > since_us) {
      samples[filled].timeStamp = stamp_us;
      samples[filled].sampleValue.ullVal = 0;
      samples[filled++].sampleValue.uiVal = ring_value(device, type, before_ns, scan_end_ns);
    }
    before_ns = scan_end_ns;
    do
      scan++;
    while (ring->jitter && slot_dropped(device, scan));
  }
  return filled;
}

int64_t sensor_utilization_slot_ns(const struct device *device, int64_t t_ns) {
  int64_t period_ns = device->utilization_ring.period_ns > 0 ? device->utilization_ring.period_ns : 200 * NS_PER_MS;
  return last_update_ns(t_ns, period_ns, device->utilization_ring.phase_ns);
}

void sensor_utilization(const struct device *device, int64_t t_ns, nvmlUtilization_t *utilization) {
  int64_t end_ns = sensor_utilization_slot_ns(device, t_ns);
  int64_t period_ns = device->utilization_ring.period_ns > 0 ? device->utilization_ring.period_ns : 200 * NS_PER_MS;
  utilization->gpu = ring_value(device, SAMPLES_GPU_UTIL, end_ns - period_ns, end_ns);
  utilization->memory = ring_value(device, SAMPLES_MEMORY_UTIL, end_ns - period_ns, end_ns);
}
