/* The scenario language: one directive a line, `directive word key=value ...`; README.md is its reference.
 *
 * The parser is strict, because a test that misspells a fault and passes is worse than no test: an unknown directive,
 * a setting that nothing consumed, or a number that is not one stops the load with a sentence. */
#define _GNU_SOURCE
#include "shim.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

struct scenario scenario;

#define MAX_WORDS 64

struct parser {
  const char *path;
  int line;
  bool failed;
  bool control;    /* a control file: faults and events only */
  int64_t base_ns; /* what `from=0` means */
  struct fault_list *faults;
  struct event events[MAX_EVENTS];
  int event_count;
  struct {
    int gpu;
    int64_t at_ns;
  } resets[MAX_RESETS];
  int reset_count;

  char *words[MAX_WORDS];
  bool used[MAX_WORDS];
  int word_count;
};

uint64_t hash64(uint64_t seed, uint64_t stream, uint64_t index) {
  /* splitmix64 over the three numbers: stateless, so that sample k has the same jitter whoever asks and when. */
  uint64_t x = seed + stream * UINT64_C(0x9E3779B97F4A7C15) + index * UINT64_C(0xD1B54A32D192ED03);
  for (int round = 0; round < 2; round++) {
    x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
    x ^= x >> 31;
  }
  return x;
}

__attribute__((format(printf, 2, 3))) static void fail(struct parser *p, const char *format, ...) {
  if (p->failed)
    return; /* the first sentence is the cause, the rest would be noise */
  p->failed = true;
  va_list arguments;
  va_start(arguments, format);
  char text[512];
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (p->line > 0)
    fprintf(stderr, "nvml shim: %s line %d: %s.\n", p->path, p->line, text);
  else
    fprintf(stderr, "nvml shim: %s: %s.\n", p->path, text);
}

/* ---- words and values ---- */

/* Cuts a line into words in place. Double quotes keep spaces inside a value; '#' outside quotes ends the line. */
static void split_words(struct parser *p, char *line) {
  p->word_count = 0;
  char *read = line;
  for (;;) {
    while (isspace((unsigned char)*read))
      read++;
    if (*read == 0 || *read == '#')
      return;
    if (p->word_count == MAX_WORDS) {
      fail(p, "more than %d words in one line", MAX_WORDS);
      return;
    }
    char *write = read;
    p->used[p->word_count] = false;
    p->words[p->word_count++] = write;
    bool quoted = false;
    while (*read != 0 && (quoted || !isspace((unsigned char)*read))) {
      if (*read == '"')
        quoted = !quoted;
      else
        *write++ = *read;
      read++;
    }
    if (quoted)
      fail(p, "a quote is not closed");
    bool end = *read == 0;
    *write = 0;
    if (end)
      return;
    read++;
  }
}

static const char *take(struct parser *p, const char *key) {
  size_t length = strlen(key);
  for (int i = 1; i < p->word_count; i++)
    if (!p->used[i] && strncmp(p->words[i], key, length) == 0 && p->words[i][length] == '=') {
      p->used[i] = true;
      return p->words[i] + length + 1;
    }
  return NULL;
}

static bool take_flag(struct parser *p, const char *word) {
  for (int i = 1; i < p->word_count; i++)
    if (!p->used[i] && strcmp(p->words[i], word) == 0)
      return p->used[i] = true;
  return false;
}

static void check_all_used(struct parser *p) {
  for (int i = 1; i < p->word_count; i++)
    if (!p->used[i])
      fail(p, "%s: unknown or repeated setting '%s'", p->words[0], p->words[i]);
}

static double parse_number(struct parser *p, const char *key, const char *text) {
  char *end;
  errno = 0;
  double value = strtod(text, &end);
  if (end == text || *end != 0 || errno != 0 || !isfinite(value))
    fail(p, "%s: '%s' is not a number for %s", p->words[0], text, key);
  return value;
}

static bool take_number(struct parser *p, const char *key, double *value) {
  const char *text = take(p, key);
  if (text == NULL)
    return false;
  *value = parse_number(p, key, text);
  return true;
}

static double require_number(struct parser *p, const char *key) {
  double value = 0;
  if (!take_number(p, key, &value))
    fail(p, "%s: needs %s=", p->words[0], key);
  return value;
}

static bool take_unsigned(struct parser *p, const char *key, uint64_t *value) {
  const char *text = take(p, key);
  if (text == NULL)
    return false;
  char *end;
  errno = 0;
  *value = strtoull(text, &end, 0);
  if (end == text || *end != 0 || errno != 0 || *text == '-')
    fail(p, "%s: '%s' is not a whole number for %s", p->words[0], text, key);
  return true;
}

static void take_u32(struct parser *p, const char *key, uint32_t *value) {
  uint64_t wide;
  if (!take_unsigned(p, key, &wide))
    return;
  if (wide > UINT32_MAX)
    fail(p, "%s: %s is too large", p->words[0], key);
  *value = (uint32_t)wide;
}

/* Seconds as nanoseconds; infinity stays far away without overflowing sums. */
static int64_t to_ns(double seconds) {
  const double far = 1e9;
  if (seconds > far)
    seconds = far;
  if (seconds < -far)
    seconds = -far;
  return (int64_t)llround(seconds * 1e9);
}

static int64_t take_ns(struct parser *p, const char *key, double otherwise_s) {
  double seconds = otherwise_s;
  take_number(p, key, &seconds);
  return to_ns(seconds);
}

/* `on` or `on/off`. */
static bool take_pair(struct parser *p, const char *key, struct pair *pair) {
  const char *text = take(p, key);
  if (text == NULL)
    return false;
  char on[64];
  const char *slash = strchr(text, '/');
  if (slash == NULL) {
    pair->on = pair->off = parse_number(p, key, text);
    return true;
  }
  snprintf(on, sizeof on, "%.*s", (int)(slash - text), text);
  pair->on = parse_number(p, key, on);
  pair->off = parse_number(p, key, slash + 1);
  return true;
}

/* The GPU that a line names: an index, or -1 for `*`. */
static int take_gpu(struct parser *p, bool required) {
  const char *text = take(p, "gpu");
  if (text == NULL) {
    if (required)
      fail(p, "%s: needs gpu=<index or *>", p->words[0]);
    return -1;
  }
  if (strcmp(text, "*") == 0)
    return -1;
  double number = parse_number(p, "gpu", text);
  if (number < 0 || number >= scenario.device_count || number != floor(number)) {
    fail(p, "%s: there is no gpu %s (device lines come first)", p->words[0], text);
    return -1;
  }
  return (int)number;
}

/* Runs over the devices that a `gpu=` names. */
#define FOR_DEVICES(device, gpu)                                                                                       \
  for (struct device *device = scenario.devices; device < scenario.devices + scenario.device_count; device++)          \
    if ((gpu) < 0 || device->index == (gpu))

/* ---- device features ---- */

/* Cuts `a:1,b:2` into its settings and hands each to `set`. */
static void each_setting(struct parser *p, const char *key, const char *text,
                         bool (*set)(void *target, const char *name, double value), void *target) {
  char copy[256];
  snprintf(copy, sizeof copy, "%s", text);
  char *rest = copy;
  for (char *part; (part = strsep(&rest, ",")) != NULL;) {
    char *colon = strchr(part, ':');
    if (colon == NULL) {
      fail(p, "%s: %s=%s: expected off or name:value,...", p->words[0], key, text);
      return;
    }
    *colon = 0;
    double value = parse_number(p, key, colon + 1);
    if (value < 0 || !set(target, part, value))
      fail(p, "%s: %s has no setting '%s', or its value is negative", p->words[0], key, part);
  }
}

static bool set_sensor(void *target, const char *name, double value) {
  struct sensor *sensor = target;
  int64_t ns = llround(value * 1e6);
  if (strcmp(name, "period_ms") == 0)
    sensor->period_ns = ns;
  else if (strcmp(name, "window_ms") == 0)
    sensor->window_ns = ns;
  else if (strcmp(name, "lag_ms") == 0)
    sensor->lag_ns = ns;
  else
    return false;
  return true;
}

static bool set_ring(void *target, const char *name, double value) {
  struct ring *ring = target;
  if (strcmp(name, "depth") == 0)
    ring->depth = (int)value;
  else if (strcmp(name, "period_ms") == 0)
    ring->period_ns = llround(value * 1e3) * 1000; /* whole microseconds, as the time stamps */
  else if (strcmp(name, "jitter") == 0)
    ring->jitter = value != 0;
  else
    return false;
  return true;
}

static void take_sensor(struct parser *p, const char *key, struct sensor *sensor, struct sensor otherwise) {
  const char *text = take(p, key);
  if (text == NULL)
    return;
  if (strcmp(text, "off") == 0) {
    sensor->period_ns = 0;
    return;
  }
  if (sensor->period_ns == 0)
    *sensor = otherwise;
  if (strcmp(text, "on") != 0)
    each_setting(p, key, text, set_sensor, sensor);
  if (sensor->period_ns <= 0)
    fail(p, "device: %s needs period_ms above 0", key);
}

static void take_ring(struct parser *p, const char *key, struct ring *ring, struct ring otherwise) {
  const char *text = take(p, key);
  if (text == NULL)
    return;
  if (strcmp(text, "off") == 0) {
    ring->depth = 0;
    return;
  }
  if (ring->depth == 0)
    *ring = otherwise;
  if (strcmp(text, "on") != 0)
    each_setting(p, key, text, set_ring, ring);
  if (ring->depth < 1 || ring->depth > 100000 || ring->period_ns < 1000)
    fail(p, "device: %s needs depth 1 to 100000 and period_ms of at least 0.001", key);
}

static int take_choice(struct parser *p, const char *key, const char *const *names, int count, int otherwise) {
  const char *text = take(p, key);
  if (text == NULL)
    return otherwise;
  for (int i = 0; i < count; i++)
    if (strcmp(text, names[i]) == 0)
      return i;
  fail(p, "%s: %s=%s is none of the choices", p->words[0], key, text);
  return otherwise;
}

/* Each sensor updates at its own phase, as on a card: otherwise every tick of every GPU would fall together. */
static int64_t random_phase_ns(const struct device *device, uint64_t stream, int64_t period_ns) {
  if (period_ns < 1000)
    return 0;
  return (int64_t)(hash64(device->seed, stream, 0) % (uint64_t)(period_ns / 1000)) * 1000;
}

static void set_phases(struct device *device) {
  device->seed = hash64(scenario.seed, 1, (uint64_t)device->index);
  device->instant.phase_ns = random_phase_ns(device, 2, device->instant.period_ns);
  device->average.phase_ns = random_phase_ns(device, 3, device->average.period_ns);
  device->counter_phase_ns = random_phase_ns(device, 4, device->counter_period_ns);
  device->power_ring.phase_ns = random_phase_ns(device, 5, device->power_ring.period_ns);
  device->utilization_ring.phase_ns = random_phase_ns(device, 6, device->utilization_ring.period_ns);
  device->gpm_phase_ns = random_phase_ns(device, 7, device->gpm_period_ns);
}

static void read_device(struct parser *p) {
  static const char *const off_on[] = {"off", "on"};
  static const char *const gpm_choices[] = {"off", "on", "no_permission"};
  if (scenario.device_count == MAX_DEVICES) {
    fail(p, "device: more than %d devices", MAX_DEVICES);
    return;
  }
  struct device *device = &scenario.devices[scenario.device_count];
  device->index = scenario.device_count++;
  const char *profile = take(p, "profile");
  if (profile == NULL || !profile_apply(device, profile)) {
    fail(p, "device: needs profile= one of %s", profile_names);
    return;
  }
  const char *text = take(p, "uuid");
  snprintf(device->uuid, sizeof device->uuid, "GPU-00000000-0000-4000-8000-%012x", device->index);
  if (text != NULL)
    snprintf(device->uuid, sizeof device->uuid, "%s", text);
  for (int i = 0; i < device->index; i++)
    if (strcmp(scenario.devices[i].uuid, device->uuid) == 0)
      fail(p, "device: uuid %s is already taken", device->uuid);
  if ((text = take(p, "name")) != NULL)
    snprintf(device->name, sizeof device->name, "%s", text);
  take_u32(p, "architecture", &device->architecture);

  const int64_t refresh_ns = 100 * NS_PER_MS;
  take_sensor(p, "instant", &device->instant, (struct sensor){.period_ns = refresh_ns, .window_ns = refresh_ns});
  take_sensor(p, "average", &device->average, (struct sensor){.period_ns = refresh_ns, .window_ns = NS_PER_S});
  struct sensor counter = {.period_ns = device->counter_period_ns};
  take_sensor(p, "counter", &counter, (struct sensor){.period_ns = refresh_ns});
  device->counter_period_ns = counter.period_ns;
  take_ring(p, "ring", &device->power_ring, (struct ring){.depth = 119, .period_ns = 20 * NS_PER_MS, .jitter = true});
  take_ring(p, "util_ring", &device->utilization_ring, (struct ring){.depth = 71, .period_ns = 200 * NS_PER_MS});
  device->gpm = (enum gpm_support)take_choice(p, "gpm", gpm_choices, 3, (int)device->gpm);
  int mig = take_choice(p, "mig", off_on, 2, -1);
  if (mig >= 0)
    device->mig = mig ? MIG_ON : MIG_OFF;
  int fields = take_choice(p, "power_fields", off_on, 2, -1);
  if (fields >= 0)
    device->power_fields = fields;
  set_phases(device);
}

static void read_sensor(struct parser *p) {
  int gpu = take_gpu(p, true);
  double gain = 0, offset = 0, quantum = 0, counter_gain = 0, start = 0;
  struct pair memory = {0, 0};
  bool has_gain = take_number(p, "gain", &gain), has_offset = take_number(p, "offset_w", &offset);
  bool has_quantum = take_number(p, "quantum_mw", &quantum);
  bool has_counter_gain = take_number(p, "counter_gain", &counter_gain);
  bool has_start = take_number(p, "energy_mj", &start), has_memory = take_pair(p, "memory_w", &memory);
  if (has_quantum && (quantum < 1 || quantum > 1e6))
    fail(p, "sensor: quantum_mw must be between 1 and 1000000");
  FOR_DEVICES(device, gpu) {
    device->gain = has_gain ? gain : device->gain;
    device->offset_w = has_offset ? offset : device->offset_w;
    device->quantum_mw = has_quantum ? (unsigned)quantum : device->quantum_mw;
    device->counter_gain = has_counter_gain ? counter_gain : device->counter_gain;
    device->counter_start_mj = has_start ? start : device->counter_start_mj;
    device->memory_w = has_memory ? memory : device->memory_w;
  }
}

/* ---- power functions ---- */

static struct truth_step *append_step(struct parser *p, struct truth *truth, int64_t start_ns, double watts) {
  if ((truth->step_count & (truth->step_count - 1)) == 0) { /* grow at powers of two */
    size_t capacity = truth->step_count ? (size_t)truth->step_count * 2 : 1;
    struct truth_step *grown = realloc(truth->steps, capacity * sizeof *grown);
    if (grown == NULL) {
      fail(p, "out of memory");
      return NULL;
    }
    truth->steps = grown;
  }
  if (truth->step_count > 0 && start_ns <= truth->steps[truth->step_count - 1].start_ns)
    fail(p, "power: the steps are not in order of time");
  truth->steps[truth->step_count] = (struct truth_step){.start_ns = start_ns, .watts = watts};
  return &truth->steps[truth->step_count++];
}

static void read_points(struct parser *p, struct truth *truth) {
  const char *points = take(p, "points");
  if (points == NULL) {
    fail(p, "power: steps needs points=seconds:watts,...");
    return;
  }
  char *copy = strdup(points), *rest = copy;
  for (char *point; copy != NULL && !p->failed && (point = strsep(&rest, ",")) != NULL;) {
    char *colon = strchr(point, ':');
    if (colon == NULL) {
      fail(p, "power: '%s' is not seconds:watts", point);
      break;
    }
    *colon = 0;
    append_step(p, truth, to_ns(parse_number(p, "points", point)), parse_number(p, "points", colon + 1));
  }
  free(copy);
}

static void read_power_file(struct parser *p, struct truth *truth) {
  const char *path = take(p, "path");
  FILE *file = path == NULL ? NULL : fopen(path, "r");
  if (file == NULL) {
    fail(p, "power: cannot open path=%s", path == NULL ? "" : path);
    return;
  }
  char *line = NULL;
  size_t size = 0;
  long long first_ns = 0, t_ns;
  double mw;
  while (!p->failed && getline(&line, &size, file) > 0) {
    char *text = line + strspn(line, " \t\r\n");
    if (*text == 0 || *text == '#')
      continue;
    if (sscanf(text, "%lld %lf", &t_ns, &mw) != 2) {
      fail(p, "power: a line of %s is not 't_ns mw'", path);
      break;
    }
    if (truth->step_count == 0)
      first_ns = t_ns;
    append_step(p, truth, t_ns - first_ns, mw / 1e3);
  }
  free(line);
  fclose(file);
}

static void read_power(struct parser *p) {
  struct truth truth = {.kind = TRUTH_CONSTANT};
  int gpu = take_gpu(p, true);
  bool square = false, file = false;
  if (take_flag(p, "constant")) {
    truth.low_w = require_number(p, "watts");
  } else if ((square = take_flag(p, "square")) || take_flag(p, "ramp")) {
    truth.kind = square ? TRUTH_SQUARE : TRUTH_RAMP;
    truth.low_w = require_number(p, "low_w");
    truth.high_w = require_number(p, "high_w");
    truth.period_ns = to_ns(require_number(p, "period_s"));
    truth.phase_ns = take_ns(p, "phase_s", 0);
    double duty = 0.5;
    if (truth.kind == TRUTH_SQUARE && take_number(p, "duty", &duty) && (duty < 0 || duty > 1))
      fail(p, "power: duty must be between 0 and 1");
    truth.high_ns = (int64_t)llround(duty * (double)truth.period_ns);
    if (!p->failed && truth.period_ns <= 0)
      fail(p, "power: period_s must be above 0");
  } else if ((file = take_flag(p, "file")) || take_flag(p, "steps")) {
    truth.kind = TRUTH_STEPS;
    truth.active_above_w = -1;
    take_number(p, "active_above_w", &truth.active_above_w);
    if (file)
      read_power_file(p, &truth);
    else
      read_points(p, &truth);
    double repeat_s = 0;
    if (take_number(p, "repeat_s", &repeat_s))
      truth.period_ns = to_ns(repeat_s);
    if (!p->failed && truth.step_count == 0)
      fail(p, "power: no steps");
    if (!p->failed && (truth.period_ns < 0 || (truth.period_ns > 0 && truth.steps[0].start_ns < 0)))
      fail(p, "power: repeat_s must be above 0, and repeated steps start at or after 0");
    truth_prepare_steps(&truth);
  } else {
    fail(p, "power: needs one of constant, square, ramp, steps, file");
  }
  bool first = true;
  FOR_DEVICES(device, gpu) {
    free(device->truth.steps);
    device->truth = truth;
    if (!first && truth.steps != NULL) { /* every device owns its steps */
      size_t bytes = (size_t)truth.step_count * sizeof *truth.steps;
      device->truth.steps = malloc(bytes);
      if (device->truth.steps == NULL) {
        fail(p, "out of memory");
        device->truth = (struct truth){.kind = TRUTH_CONSTANT};
        return;
      }
      memcpy(device->truth.steps, truth.steps, bytes);
    }
    first = false;
  }
  if (first)
    free(truth.steps);
}

/* ---- activity, state, health ---- */

static void read_gpm(struct parser *p) {
  int gpu = take_gpu(p, true);
  for (int i = 1; i < p->word_count && !p->failed; i++) {
    if (p->used[i])
      continue;
    char name[64];
    const char *equals = strchr(p->words[i], '=');
    if (equals == NULL)
      continue; /* check_all_used names it */
    snprintf(name, sizeof name, "%.*s", (int)(equals - p->words[i]), p->words[i]);
    int metric = gpm_metric_by_name(name);
    struct pair level;
    if (metric < 0 || !take_pair(p, name, &level))
      continue;
    FOR_DEVICES(device, gpu) device->gpm_metrics[metric] = level;
  }
}

static void read_state(struct parser *p) {
  int gpu = take_gpu(p, true);
  const struct {
    const char *key;
    size_t offset;
  } levels[] = {
      {"util_pct", offsetof(struct device, utilization)},
      {"memory_util_pct", offsetof(struct device, memory_utilization)},
      {"sm_mhz", offsetof(struct device, sm_mhz)},
      {"memory_mhz", offsetof(struct device, memory_mhz)},
      {"temperature_c", offsetof(struct device, temperature_c)},
      {"memory_temperature_c", offsetof(struct device, memory_temperature_c)},
      {"memory_used_mib", offsetof(struct device, memory_used_mib)},
      {"pstate", offsetof(struct device, pstate)},
  };
  for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
    struct pair level;
    if (take_pair(p, levels[i].key, &level))
      FOR_DEVICES(device, gpu) * (struct pair *)((char *)device + levels[i].offset) = level;
  }
  double value;
  if (take_number(p, "persistence", &value))
    FOR_DEVICES(device, gpu) device->persistence = value != 0;
  if (take_number(p, "limit_w", &value))
    FOR_DEVICES(device, gpu) device->limit_mw = (unsigned)llround(value * 1e3);
}

static void read_throttle(struct parser *p) {
  int gpu = take_gpu(p, true);
  for (int reason = 0; reason < THROTTLE_COUNT; reason++) {
    struct pair share;
    if (!take_pair(p, throttle_names[reason], &share))
      continue;
    if (share.on < 0 || share.on > 1 || share.off < 0 || share.off > 1)
      fail(p, "throttle: %s is a share of the time, 0 to 1", throttle_names[reason]);
    FOR_DEVICES(device, gpu) device->throttle[reason] = share;
  }
}

static void read_health(struct parser *p) {
  int gpu = take_gpu(p, true);
  const struct {
    const char *key;
    size_t offset;
    bool wide;
  } counters[] = {
      {"sbe_volatile", offsetof(struct device, ecc_volatile[0]), true},
      {"dbe_volatile", offsetof(struct device, ecc_volatile[1]), true},
      {"sbe_aggregate", offsetof(struct device, ecc_aggregate[0]), true},
      {"dbe_aggregate", offsetof(struct device, ecc_aggregate[1]), true},
      {"remapped_correctable", offsetof(struct device, remapped_correctable), false},
      {"remapped_uncorrectable", offsetof(struct device, remapped_uncorrectable), false},
      {"remap_pending", offsetof(struct device, remap_pending), false},
      {"remap_failed", offsetof(struct device, remap_failed), false},
      {"recovery_action", offsetof(struct device, recovery_action), false},
  };
  for (size_t i = 0; i < sizeof counters / sizeof *counters; i++) {
    uint64_t value;
    if (!take_unsigned(p, counters[i].key, &value))
      continue;
    FOR_DEVICES(device, gpu) {
      char *target = (char *)device + counters[i].offset;
      if (counters[i].wide)
        *(uint64_t *)target = value;
      else
        *(uint32_t *)target = (uint32_t)value;
    }
  }
}

static void read_process(struct parser *p) {
  int gpu = take_gpu(p, true);
  struct process process = {.memory_mib = 0};
  uint64_t pid = 0;
  if (!take_unsigned(p, "pid", &pid) || pid == 0)
    fail(p, "process: needs pid=");
  process.pid = (uint32_t)pid;
  process.memory_mib = require_number(p, "memory_mib");
  process.from_ns = take_ns(p, "from", -INFINITY);
  process.to_ns = take_ns(p, "to", INFINITY);
  take_pair(p, "sm", &process.sm_percent);
  FOR_DEVICES(device, gpu) {
    if (device->process_count == MAX_PROCESSES)
      fail(p, "process: more than %d on gpu %d", MAX_PROCESSES, device->index);
    else
      device->processes[device->process_count++] = process;
  }
}

/* ---- events, latency, faults ---- */

static void read_xid(struct parser *p) {
  struct event event = {.gpu = take_gpu(p, true)};
  if (event.gpu < 0)
    fail(p, "xid: needs one gpu");
  double at = 0;
  take_number(p, "at", &at);
  event.at_ns = p->base_ns + to_ns(at);
  if (!take_unsigned(p, "code", &event.code))
    fail(p, "xid: needs code=");
  if (p->event_count == MAX_EVENTS)
    fail(p, "xid: more than %d events", MAX_EVENTS);
  else
    p->events[p->event_count++] = event;
}

static enum call_id require_call(struct parser *p, const char *text) {
  enum call_id call = call_by_name(text);
  if (call == CALL_NONE)
    fail(p, "%s: there is no call '%s'", p->words[0], text);
  return call;
}

/* What one H200 took for spaced calls: p50 of a fresh process polling at 1 to 10 Hz, nearly all of it CPU time in the
 * driver; the PCIe reading sleeps its 20 ms window. */
static void apply_h200_latency(void) {
  static const struct {
    enum call_id call;
    double us;
    bool sleep;
  } costs[] = {
      {CALL_nvmlDeviceGetSamples, 850, false},
      {CALL_nvmlDeviceGetTotalEnergyConsumption, 3800, false},
      {CALL_nvmlGpmSampleGet, 240, false},
      {CALL_nvmlGpmMigSampleGet, 240, false},
      {CALL_nvmlGpmMetricsGet, 35, false}, /* GRAPHICS_UTIL costs more: below */
      {CALL_nvmlDeviceGetFieldValues, 9, false},
      {CALL_nvmlDeviceGetPowerUsage, 9, false},
      /* clocks (2), reasons, temperature and memory together took 0.13 ms */
      {CALL_nvmlDeviceGetClockInfo, 26, false},
      {CALL_nvmlDeviceGetCurrentClocksEventReasons, 26, false},
      {CALL_nvmlDeviceGetCurrentClocksThrottleReasons, 26, false},
      {CALL_nvmlDeviceGetTemperature, 26, false},
      {CALL_nvmlDeviceGetTemperatureV, 26, false},
      {CALL_nvmlDeviceGetMemoryInfo, 26, false},
      {CALL_nvmlDeviceGetMemoryInfo_v2, 26, false},
      {CALL_nvmlDeviceGetMaxClockInfo, 20, false},
      {CALL_nvmlDeviceGetPerformanceState, 20, false},
      {CALL_nvmlDeviceGetUtilizationRates, 20, false},
      {CALL_nvmlDeviceGetEnforcedPowerLimit, 20, false},
      {CALL_nvmlDeviceGetPowerManagementLimit, 20, false},
      {CALL_nvmlDeviceGetViolationStatus, 20, false},
      {CALL_nvmlDeviceGetRemappedRows, 20, false},
      {CALL_nvmlDeviceGetTotalEccErrors, 20, false},
      {CALL_nvmlDeviceGetMemoryErrorCounter, 20, false},
      {CALL_nvmlDeviceGetComputeRunningProcesses_v3, 270, false},
      {CALL_nvmlDeviceGetMPSComputeRunningProcesses_v3, 270, false},
      {CALL_nvmlDeviceGetProcessUtilization, 3000, false},
      {CALL_nvmlDeviceGetProcessesUtilizationInfo, 3000, false},
      {CALL_nvmlDeviceGetPcieThroughput, 21000, true},
  };
  for (size_t i = 0; i < sizeof costs / sizeof *costs; i++)
    scenario.latency[costs[i].call] = (struct latency){costs[i].us, costs[i].sleep};
  scenario.field_latency_us[83] = scenario.field_latency_us[191] = 3800 - 9;
  /* Measured alone and together: 270 and 271 share their 1.13 ms, 75 adds to it. */
  scenario.field_latency_us[75] = 650;
  scenario.field_latency_us[270] = 1130;
  scenario.graphics_latency_us = 1850;
}

static void read_latency(struct parser *p) {
  static const char *const modes[] = {"burn", "sleep"};
  const char *profile = take(p, "profile");
  if (profile != NULL) {
    if (strcmp(profile, "h200") != 0)
      fail(p, "latency: the only profile is h200");
    apply_h200_latency();
    return;
  }
  const char *name = take(p, "call");
  double us = require_number(p, "us");
  uint64_t field;
  if (take_unsigned(p, "field", &field)) {
    if (field >= MAX_FIELD_ID)
      fail(p, "latency: there is no field %llu", (unsigned long long)field);
    else
      scenario.field_latency_us[field] = us;
    if (name != NULL && strcmp(name, "nvmlDeviceGetFieldValues") != 0)
      fail(p, "latency: field= belongs to nvmlDeviceGetFieldValues");
    return;
  }
  if (name == NULL) {
    fail(p, "latency: needs call= or profile=");
    return;
  }
  struct latency latency = {us, take_choice(p, "mode", modes, 2, 0) == 1};
  enum call_id call = require_call(p, name);
  for (int i = 0; i < CALL_COUNT && !p->failed; i++)
    if (call == CALL_ANY || (int)call == i)
      scenario.latency[i] = latency;
}

static void read_counter_reset(struct parser *p) {
  int gpu = take_gpu(p, false);
  double at = 0;
  take_number(p, "at", &at);
  FOR_DEVICES(device, gpu) {
    if (p->reset_count == MAX_RESETS) {
      fail(p, "fault: more than %d counter resets", MAX_RESETS);
      return;
    }
    p->resets[p->reset_count].gpu = device->index;
    p->resets[p->reset_count++].at_ns = p->base_ns + to_ns(at);
  }
}

static void read_fault(struct parser *p) {
  if (take_flag(p, "counter_reset")) {
    read_counter_reset(p);
    return;
  }
  struct fault fault = {.kind = FAULT_CODE, .call = CALL_ANY, .field = -1, .to_call = UINT64_MAX, .every = 1};
  bool lost = take_flag(p, "lost"), mismatch = take_flag(p, "driver_mismatch");
  bool hang = take_flag(p, "hang"), garbage = take_flag(p, "garbage");
  const char *call = take(p, "call");
  fault.gpu = take_gpu(p, lost);
  fault.from_ns = take_ns(p, "from", -INFINITY);
  fault.to_ns = take_ns(p, "to", INFINITY);
  if (fault.from_ns > to_ns(-INFINITY))
    fault.from_ns += p->base_ns;
  if (fault.to_ns < to_ns(INFINITY))
    fault.to_ns += p->base_ns;
  take_unsigned(p, "from_call", &fault.from_call);
  take_unsigned(p, "to_call", &fault.to_call);
  if (take_unsigned(p, "every", &fault.every) && fault.every == 0)
    fail(p, "fault: every=0 makes no sense");
  double number;
  bool has_code = take_number(p, "code", &number);
  if (has_code)
    fault.code = (int)number;
  bool has_latency = take_number(p, "latency_us", &fault.latency_us);
  fault.burn = has_latency && take_flag(p, "burn");
  fault.has_value = garbage && take_number(p, "value", &fault.value);
  fault.same_handle = lost && take_number(p, "same_handle", &number) && number != 0;
  uint64_t field;
  if (take_unsigned(p, "field", &field))
    fault.field = (int)field;

  if (lost || mismatch) {
    if (call != NULL || lost + mismatch + hang + garbage + has_latency + has_code != 1 || fault.field >= 0)
      fail(p, "fault: %s stands alone, with gpu, from and to", lost ? "lost" : "driver_mismatch");
    fault.kind = lost ? FAULT_LOST : FAULT_MISMATCH;
  } else {
    if (call == NULL)
      fail(p, "fault: needs call=<name or *>");
    else
      fault.call = require_call(p, call);
    if (hang + garbage + has_latency + (has_code && !hang) != 1)
      fail(p, "fault: needs exactly one of code=, hang, garbage, latency_us=");
    fault.kind = hang ? FAULT_HANG : garbage ? FAULT_GARBAGE : has_latency ? FAULT_LATENCY : FAULT_CODE;
    if (fault.field >= 0 && (fault.call != CALL_nvmlDeviceGetFieldValues || hang || has_latency))
      fail(p, "fault: field= goes with call=nvmlDeviceGetFieldValues and code= or garbage");
  }
  if (p->faults->count == MAX_FAULTS)
    fail(p, "fault: more than %d", MAX_FAULTS);
  else
    p->faults->faults[p->faults->count++] = fault;
}

/* ---- whole files ---- */

static void read_epoch(struct parser *p) {
  uint64_t ns = 0;
  if (!take_unsigned(p, "ns", &ns))
    fail(p, "epoch: needs ns=");
  scenario.has_epoch = true;
  scenario.epoch_ns = (int64_t)(ns / 1000 * 1000); /* driver time stamps are whole microseconds */
}

static void read_seed(struct parser *p) {
  if (!take_unsigned(p, "value", &scenario.seed))
    fail(p, "seed: needs value=");
  for (int i = 0; i < scenario.device_count; i++)
    set_phases(&scenario.devices[i]);
}

static void read_driver(struct parser *p) {
  const char *text;
  if ((text = take(p, "version")) != NULL)
    snprintf(scenario.driver_version, sizeof scenario.driver_version, "%s", text);
  if ((text = take(p, "nvml")) != NULL)
    snprintf(scenario.nvml_version, sizeof scenario.nvml_version, "%s", text);
  double cuda;
  if (take_number(p, "cuda", &cuda))
    scenario.cuda_version = (int)cuda;
}

static void read_control(struct parser *p) {
  const char *path = take(p, "path");
  if (path == NULL || strlen(path) >= sizeof scenario.control_path)
    fail(p, "control: needs path=, shorter than %zu characters", sizeof scenario.control_path);
  else
    snprintf(scenario.control_path, sizeof scenario.control_path, "%s", path);
}

static void read_line(struct parser *p, char *line) {
  static const struct {
    const char *name;
    void (*read)(struct parser *p);
    bool in_control;
  } directives[] = {
      {"epoch", read_epoch, false},     {"seed", read_seed, false},     {"driver", read_driver, false},
      {"control", read_control, false}, {"device", read_device, false}, {"sensor", read_sensor, false},
      {"power", read_power, false},     {"gpm", read_gpm, false},       {"state", read_state, false},
      {"throttle", read_throttle, false}, {"health", read_health, false}, {"process", read_process, false},
      {"latency", read_latency, false}, {"xid", read_xid, true},        {"fault", read_fault, true},
  };
  split_words(p, line);
  if (p->word_count == 0 || p->failed)
    return;
  for (size_t i = 0; i < sizeof directives / sizeof *directives; i++)
    if (strcmp(directives[i].name, p->words[0]) == 0 && (directives[i].in_control || !p->control)) {
      directives[i].read(p);
      check_all_used(p);
      return;
    }
  fail(p, "unknown directive '%s'", p->words[0]);
}

static void read_file(struct parser *p) {
  FILE *file = fopen(p->path, "r");
  if (file == NULL) {
    fail(p, "cannot open it: %s", strerror(errno));
    return;
  }
  char *line = NULL;
  size_t size = 0;
  for (p->line = 1; !p->failed && getline(&line, &size, file) >= 0; p->line++)
    read_line(p, line);
  free(line);
  fclose(file);
}

/* Events and counter resets happen once and stay happened, also when their line goes away. */
static void take_over(const struct parser *p) {
  for (int i = 0; i < p->event_count; i++) {
    int at = atomic_load(&scenario.event_count);
    if (at == MAX_EVENTS)
      break;
    scenario.events[at] = p->events[i];
    atomic_store(&scenario.event_count, at + 1);
  }
  for (int i = 0; i < p->reset_count; i++) {
    struct device *device = &scenario.devices[p->resets[i].gpu];
    int at = atomic_load(&device->reset_count);
    if (at == MAX_RESETS)
      break;
    device->resets_ns[at] = p->resets[i].at_ns;
    atomic_store(&device->reset_count, at + 1);
  }
}

void scenario_free(void) {
  for (int i = 0; i < scenario.device_count; i++)
    free(scenario.devices[i].truth.steps);
  memset(&scenario, 0, sizeof scenario);
}

bool scenario_load(const char *path) {
  static struct parser parser; /* some kilobytes; loading is under the gate's lock */
  memset(&parser, 0, sizeof parser);
  scenario_free();
  scenario.seed = 1;
  scenario.cuda_version = 13000;
  snprintf(scenario.driver_version, sizeof scenario.driver_version, "580.159.04");
  snprintf(scenario.nvml_version, sizeof scenario.nvml_version, "13.580.159.04");
  parser.path = path;
  parser.faults = &scenario.faults;
  read_file(&parser);
  take_over(&parser);
  return !parser.failed;
}

bool control_load(const char *path, int64_t now_ns, struct fault_list *faults) {
  static struct parser parser;
  memset(&parser, 0, sizeof parser);
  parser.path = path;
  parser.control = true;
  parser.base_ns = now_ns;
  parser.faults = faults;
  read_file(&parser);
  if (parser.failed)
    return false;
  take_over(&parser);
  return true;
}
