/* The way into every call: the clock, the counting of calls, faults and latency.
 *
 * One mutex guards what changes at run time (handles, faults, the virtual clock); it is held for the decision only,
 * never while a call sleeps, burns or computes, so a hanging call blocks its own thread and nobody else. */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#define MAX_HANDLES 1024
#define MAX_CLOCK_STEPS 64
#define CONTROL_CHECK_NS (20 * NS_PER_MS)

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed; /* the clock or the faults changed */

static bool loaded;
static atomic_int references;
static int64_t epoch_ns;
static bool has_epoch;

static struct nvml_handle handles[MAX_HANDLES];
static int handle_count;
static struct nvml_handle *current_handle[MAX_DEVICES];
static uint64_t sequence;
static uint64_t dead_before[MAX_DEVICES]; /* handles born earlier than this sequence are dead */

static atomic_ullong calls[CALL_COUNT][MAX_DEVICES];
static atomic_ullong calls_in_all[CALL_COUNT];

static struct fault_list control_faults;
static struct stat control_seen;
static int64_t control_checked_ns;

/* ---- names ---- */

#define SHIM_CALL_NAME(name) #name,
static const char *const call_names[] = {SHIM_CALLS(SHIM_CALL_NAME)};

enum call_id call_by_name(const char *name) {
  if (strcmp(name, "*") == 0)
    return CALL_ANY;
  for (int i = 0; i < CALL_COUNT; i++)
    if (strcmp(call_names[i], name) == 0)
      return (enum call_id)i;
  return CALL_NONE;
}

/* ---- the clock ---- */

static atomic_bool virtual_clock;
static _Atomic int64_t virtual_now_ns;

/* Steps of the wall clock, in order: from `at_ns` of the model on, time stamps are shifted by `shift_ns` in all. */
static struct {
  int64_t at_ns, shift_ns;
} clock_steps[MAX_CLOCK_STEPS];
static atomic_int clock_step_count;

static int64_t read_clock_ns(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * NS_PER_S + now.tv_nsec;
}

int64_t clock_now_ns(void) {
  return atomic_load(&virtual_clock) ? atomic_load(&virtual_now_ns) : read_clock_ns(CLOCK_REALTIME);
}

static void wake_everyone(void) {
  pthread_mutex_lock(&mutex);
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&mutex);
}

void clock_set_ns(int64_t now_ns) {
  atomic_store(&virtual_now_ns, now_ns);
  atomic_store(&virtual_clock, true);
  wake_everyone();
}

void clock_advance_ns(int64_t delta_ns) {
  clock_set_ns(clock_now_ns() + delta_ns);
}

void clock_use_real_time(void) {
  atomic_store(&virtual_clock, false);
  wake_everyone();
}

bool clock_is_virtual(void) {
  return atomic_load(&virtual_clock);
}

void clock_step_ns(int64_t delta_ns) {
  int count = atomic_load(&clock_step_count);
  if (count == MAX_CLOCK_STEPS)
    return;
  clock_steps[count].at_ns = clock_now_ns();
  clock_steps[count].shift_ns = delta_ns + (count > 0 ? clock_steps[count - 1].shift_ns : 0);
  atomic_store(&clock_step_count, count + 1);
}

bool clock_was_stepped(void) {
  return atomic_load(&clock_step_count) > 0;
}

uint64_t clock_stamp_us(int64_t t_ns) {
  int64_t wall_ns = epoch_ns + t_ns;
  /* A stamp made at the very instant of a step is made by the old clock. */
  for (int i = atomic_load(&clock_step_count) - 1; i >= 0; i--)
    if (clock_steps[i].at_ns < wall_ns)
      return (uint64_t)((wall_ns + clock_steps[i].shift_ns) / 1000);
  return (uint64_t)(wall_ns / 1000);
}

int64_t gate_now_ns(void) {
  return clock_now_ns() - epoch_ns;
}

int64_t gate_epoch_ns(void) {
  return has_epoch ? epoch_ns : -1;
}

/* ---- latency ---- */

static void burn_cpu_us(double us) {
  int64_t end_ns = read_clock_ns(CLOCK_THREAD_CPUTIME_ID) + (int64_t)(us * 1e3);
  while (read_clock_ns(CLOCK_THREAD_CPUTIME_ID) < end_ns)
    ;
}

static void sleep_us(double us) {
  struct timespec rest = {.tv_sec = (time_t)(us / 1e6)};
  rest.tv_nsec = (long)((us - (double)rest.tv_sec * 1e6) * 1e3);
  while (clock_nanosleep(CLOCK_MONOTONIC, 0, &rest, &rest) == EINTR)
    ;
}

void gate_pay(const struct visit *visit) {
  if (visit->sleep_us > 0)
    sleep_us(visit->sleep_us);
  if (visit->burn_us > 0)
    burn_cpu_us(visit->burn_us);
}

/* ---- waiting ---- */

/* With the mutex held: sleeps until something may have changed, at most `ms`. */
static void wait_changed_ms(double ms) {
  int64_t end_ns = read_clock_ns(CLOCK_MONOTONIC) + (int64_t)(ms * 1e6);
  struct timespec end = {.tv_sec = end_ns / NS_PER_S, .tv_nsec = end_ns % NS_PER_S};
  pthread_cond_timedwait(&changed, &mutex, &end);
}

static void check_control(bool now);

int64_t gate_wait_ms(double ms) {
  pthread_mutex_lock(&mutex);
  if (ms > 0)
    wait_changed_ms(ms);
  check_control(false);
  pthread_mutex_unlock(&mutex);
  return gate_now_ns();
}

/* ---- the control file ---- */

static bool overlaps(const struct fault *fault, int64_t from_ns, int64_t to_ns) {
  return fault->from_ns <= to_ns && fault->to_ns > from_ns;
}

/* A GPU that was lost stays a different GPU for the handles of before, also when the line that lost it is gone. */
static void bury_handles(const struct fault_list *list, int64_t now_ns) {
  for (int i = 0; i < list->count; i++) {
    const struct fault *fault = &list->faults[i];
    if (fault->kind != FAULT_LOST || fault->same_handle || fault->from_ns > now_ns)
      continue;
    for (int gpu = 0; gpu < scenario.device_count; gpu++)
      if (fault->gpu < 0 || fault->gpu == gpu)
        dead_before[gpu] = ++sequence;
  }
}

/* With the mutex held. */
static void check_control(bool now) {
  static struct fault_list fresh;
  if (!loaded || scenario.control_path[0] == 0)
    return;
  int64_t monotonic_ns = read_clock_ns(CLOCK_MONOTONIC_COARSE);
  if (!now && monotonic_ns - control_checked_ns < CONTROL_CHECK_NS)
    return;
  control_checked_ns = monotonic_ns;
  struct stat seen = {0};
  if (stat(scenario.control_path, &seen) != 0)
    memset(&seen, 0, sizeof seen);
  if (seen.st_ino == control_seen.st_ino && seen.st_size == control_seen.st_size &&
      seen.st_mtim.tv_sec == control_seen.st_mtim.tv_sec && seen.st_mtim.tv_nsec == control_seen.st_mtim.tv_nsec)
    return;
  control_seen = seen;
  fresh.count = 0;
  int64_t now_ns = gate_now_ns();
  if (seen.st_ino != 0 && !control_load(scenario.control_path, now_ns, &fresh))
    return; /* it said why; the faults of before stay */
  bury_handles(&control_faults, now_ns);
  control_faults = fresh;
  pthread_cond_broadcast(&changed);
}

void gate_poll_control(void) {
  pthread_mutex_lock(&mutex);
  check_control(true);
  pthread_mutex_unlock(&mutex);
}

/* ---- faults ---- */

/* `call=*` means the calls that reach the driver; these are the library's own book-keeping. */
static bool stays_in_library(enum call_id call) {
  return call == CALL_nvmlShutdown || call == CALL_nvmlEventSetFree || call == CALL_nvmlGpmSampleAlloc ||
         call == CALL_nvmlGpmSampleFree || call == CALL_nvmlGpmMetricsGet;
}

struct attempt {
  enum call_id call;
  const struct device *device; /* NULL: a call without one */
  const struct nvml_handle *handle;
  uint64_t number_on_gpu, number_in_all; /* how often this call was made, this time included */
};

static bool applies(const struct fault *fault, const struct attempt *attempt, int64_t now_ns) {
  if (fault->call == CALL_ANY ? stays_in_library(attempt->call) : fault->call != attempt->call)
    return false;
  if (fault->gpu >= 0 && (attempt->device == NULL || attempt->device->index != fault->gpu))
    return false;
  if (now_ns < fault->from_ns || now_ns >= fault->to_ns)
    return false;
  uint64_t number = fault->gpu >= 0 ? attempt->number_on_gpu : attempt->number_in_all;
  return number >= fault->from_call && number <= fault->to_call && number % fault->every == 0;
}

static bool is_lost(const struct fault_list *list, int gpu, const struct nvml_handle *handle, int64_t now_ns) {
  for (int i = 0; i < list->count; i++) {
    const struct fault *fault = &list->faults[i];
    if (fault->kind != FAULT_LOST || (fault->gpu >= 0 && fault->gpu != gpu))
      continue;
    if (now_ns >= fault->from_ns && now_ns < fault->to_ns)
      return true;
    if (handle != NULL && !fault->same_handle && overlaps(fault, handle->born_ns, now_ns))
      return true;
  }
  return false;
}

static bool handle_is_dead(const struct nvml_handle *handle, int64_t now_ns) {
  int gpu = handle->device->index;
  return handle->born_sequence < dead_before[gpu] || is_lost(&scenario.faults, gpu, handle, now_ns) ||
         is_lost(&control_faults, gpu, handle, now_ns);
}

static void add_field_fault(struct visit *visit, const struct fault *fault) {
  if (visit->field_fault_count == MAX_FIELD_FAULTS)
    return;
  visit->field_faults[visit->field_fault_count++] = (struct field_fault){
      fault->field, fault->code, fault->kind == FAULT_GARBAGE, fault->has_value, fault->value};
}

/* One pass over a list. Returns the code to fail with, and whether to hang first. */
static nvmlReturn_t pass_faults(const struct fault_list *list, const struct attempt *attempt, int64_t now_ns,
                                struct visit *visit, bool *hang) {
  nvmlReturn_t code = NVML_SUCCESS;
  for (int i = 0; i < list->count; i++) {
    const struct fault *fault = &list->faults[i];
    if (fault->kind == FAULT_LOST || !applies(fault, attempt, now_ns))
      continue;
    if (fault->field >= 0) {
      add_field_fault(visit, fault);
      continue;
    }
    switch (fault->kind) {
    case FAULT_HANG:
      *hang = true;
      break;
    case FAULT_MISMATCH:
      code = NVML_ERROR_LIB_RM_VERSION_MISMATCH;
      break;
    case FAULT_CODE:
      code = code == NVML_SUCCESS ? fault->code : code;
      break;
    case FAULT_LATENCY:
      *(fault->burn ? &visit->burn_us : &visit->sleep_us) += fault->latency_us;
      break;
    case FAULT_GARBAGE:
      visit->garbage = true;
      visit->has_value = fault->has_value;
      visit->value = fault->value;
      break;
    case FAULT_LOST:
      break;
    }
  }
  return code;
}

/* With the mutex held; gives it up while the call hangs. */
static nvmlReturn_t apply_faults(const struct attempt *attempt, struct visit *visit) {
  if (scenario.faults.count == 0 && scenario.control_path[0] == 0)
    return NVML_SUCCESS;
  for (;;) {
    check_control(false);
    int64_t now_ns = gate_now_ns();
    bool hang = false;
    visit->burn_us = visit->sleep_us = 0;
    visit->field_fault_count = 0;
    visit->garbage = false;
    nvmlReturn_t code = pass_faults(&scenario.faults, attempt, now_ns, visit, &hang);
    nvmlReturn_t control_code = pass_faults(&control_faults, attempt, now_ns, visit, &hang);
    if (!hang) {
      bool own = stays_in_library(attempt->call);
      if (!own && attempt->device != NULL && code != NVML_ERROR_LIB_RM_VERSION_MISMATCH) {
        int gpu = attempt->device->index;
        if (attempt->handle != NULL ? handle_is_dead(attempt->handle, now_ns)
                                    : is_lost(&scenario.faults, gpu, NULL, now_ns) ||
                                          is_lost(&control_faults, gpu, NULL, now_ns))
          return NVML_ERROR_GPU_IS_LOST;
      }
      return code != NVML_SUCCESS ? code : control_code;
    }
    wait_changed_ms(20);
  }
}

/* ---- entering ---- */

static nvmlReturn_t enter(enum call_id call, struct device *device, const struct nvml_handle *handle, double extra_us,
                          struct visit *visit) {
  struct attempt attempt = {.call = call, .device = device, .handle = handle};
  *visit = (struct visit){.device = device};
  attempt.number_in_all = atomic_fetch_add(&calls_in_all[call], 1) + 1;
  if (device != NULL)
    attempt.number_on_gpu = atomic_fetch_add(&calls[call][device->index], 1) + 1;
  pthread_mutex_lock(&mutex);
  nvmlReturn_t code = apply_faults(&attempt, visit);
  pthread_mutex_unlock(&mutex);
  const struct latency *latency = &scenario.latency[call];
  *(latency->sleep ? &visit->sleep_us : &visit->burn_us) += latency->us + extra_us;
  /* The ring's cost falls due when samples are copied, which only the caller of the gate knows. */
  if (call != CALL_nvmlDeviceGetSamples)
    gate_pay(visit);
  visit->t_ns = gate_now_ns();
  return code;
}

nvmlReturn_t gate_enter(enum call_id call, struct visit *visit) {
  return gate_is_initialised() ? enter(call, NULL, NULL, 0, visit) : NVML_ERROR_UNINITIALIZED;
}

nvmlReturn_t gate_enter_gpu(enum call_id call, struct device *device, double extra_us, struct visit *visit) {
  return gate_is_initialised() ? enter(call, device, NULL, extra_us, visit) : NVML_ERROR_UNINITIALIZED;
}

nvmlReturn_t gate_enter_device(enum call_id call, nvmlDevice_t handle, double extra_us, struct visit *visit) {
  if (!gate_is_initialised())
    return NVML_ERROR_UNINITIALIZED;
  uintptr_t offset = (uintptr_t)handle - (uintptr_t)handles;
  if (offset >= sizeof handles || offset % sizeof *handles != 0 || handle->device == NULL)
    return NVML_ERROR_INVALID_ARGUMENT;
  return enter(call, handle->device, handle, extra_us, visit);
}

/* With the mutex held. */
static struct nvml_handle *living_handle(struct device *device) {
  struct nvml_handle *handle = current_handle[device->index];
  int64_t now_ns = gate_now_ns();
  if (handle != NULL && !handle_is_dead(handle, now_ns))
    return handle;
  if (handle_count == MAX_HANDLES)
    return NULL;
  handle = &handles[handle_count++];
  *handle = (struct nvml_handle){.device = device, .born_ns = now_ns, .born_sequence = ++sequence};
  return current_handle[device->index] = handle;
}

nvmlReturn_t gate_enter_lookup(enum call_id call, struct device *device, nvmlDevice_t *handle) {
  struct visit visit;
  nvmlReturn_t code = gate_enter_gpu(call, device, 0, &visit);
  if (code != NVML_SUCCESS)
    return code;
  pthread_mutex_lock(&mutex);
  *handle = living_handle(device);
  pthread_mutex_unlock(&mutex);
  return *handle == NULL ? NVML_ERROR_MEMORY : NVML_SUCCESS;
}

nvmlDevice_t gate_current_handle(struct device *device) {
  pthread_mutex_lock(&mutex);
  nvmlDevice_t handle = current_handle[device->index];
  if (handle == NULL)
    handle = living_handle(device);
  pthread_mutex_unlock(&mutex);
  return handle;
}

bool gate_gpu_is_lost(const struct device *device) {
  pthread_mutex_lock(&mutex);
  int64_t now_ns = gate_now_ns();
  bool lost = is_lost(&scenario.faults, device->index, NULL, now_ns) ||
              is_lost(&control_faults, device->index, NULL, now_ns);
  pthread_mutex_unlock(&mutex);
  return lost;
}

/* ---- lifetime ---- */

bool gate_is_initialised(void) {
  return atomic_load(&references) > 0;
}

nvmlReturn_t gate_initialise(enum call_id call) {
  const char *path = getenv(SHIM_VARIABLE);
  if (path == NULL || *path == 0)
    return NVML_ERROR_LIBRARY_NOT_FOUND;
  pthread_mutex_lock(&mutex);
  if (!loaded) {
    if (!scenario_load(path)) {
      pthread_mutex_unlock(&mutex);
      return NVML_ERROR_INVALID_ARGUMENT;
    }
    loaded = true;
    has_epoch = true;
    epoch_ns = scenario.has_epoch ? scenario.epoch_ns : clock_now_ns() / 1000 * 1000;
    check_control(true);
  }
  pthread_mutex_unlock(&mutex);
  struct visit visit;
  nvmlReturn_t code = enter(call, NULL, NULL, 0, &visit);
  if (code == NVML_SUCCESS)
    atomic_fetch_add(&references, 1);
  return code;
}

nvmlReturn_t gate_shutdown(void) {
  struct visit visit;
  nvmlReturn_t code = gate_enter(CALL_nvmlShutdown, &visit);
  if (code == NVML_SUCCESS)
    atomic_fetch_sub(&references, 1);
  return code;
}

uint64_t gate_call_count(enum call_id call, int gpu) {
  if (call < 0 || gpu >= MAX_DEVICES)
    return 0;
  return gpu < 0 ? atomic_load(&calls_in_all[call]) : atomic_load(&calls[call][gpu]);
}

void gate_reset(void) {
  pthread_mutex_lock(&mutex);
  scenario_free();
  loaded = has_epoch = false;
  epoch_ns = 0;
  atomic_store(&references, 0);
  memset(handles, 0, sizeof handles);
  memset(current_handle, 0, sizeof current_handle);
  memset(dead_before, 0, sizeof dead_before);
  handle_count = 0;
  for (int call = 0; call < CALL_COUNT; call++) {
    atomic_store(&calls_in_all[call], 0);
    for (int gpu = 0; gpu < MAX_DEVICES; gpu++)
      atomic_store(&calls[call][gpu], 0);
  }
  control_faults.count = 0;
  memset(&control_seen, 0, sizeof control_seen);
  control_checked_ns = 0;
  atomic_store(&clock_step_count, 0);
  atomic_store(&virtual_clock, false);
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&mutex);
}

__attribute__((constructor)) static void load(void) {
  pthread_condattr_t attributes;
  pthread_condattr_init(&attributes);
  pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  pthread_cond_init(&changed, &attributes);
  pthread_condattr_destroy(&attributes);
  const char *path = getenv(SHIM_VARIABLE);
  if (path == NULL || *path == 0)
    fprintf(stderr,
            "nvml shim: this libnvidia-ml.so.1 is jouletrace's test double and refuses to work unless " SHIM_VARIABLE
            " names a scenario file; remove its folder from LD_LIBRARY_PATH to use the real driver.\n");
}
