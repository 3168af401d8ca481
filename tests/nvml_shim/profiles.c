/* What each GPU family can do.
 *
 * H200 values were measured on one card; update periods and windows of the others follow the published sensor
 * surveys (SC24, arXiv 2312.02741, and its artefact). Names, clocks and limits are data-sheet values. */
#include "shim.h"

#include <string.h>

#define MS(x) ((int64_t)((x) * 1000000))

struct profile {
  const char *id, *name;
  unsigned architecture, compute_major, compute_minor, cores, bus_width_bits, memory_mib;
  unsigned limit_min_w, limit_max_w;
  unsigned sm_mhz, memory_mhz;
  bool remapped_rows, memory_temperature, nvlink;
  double memory_w;
  struct sensor instant, average;
  enum power_usage power_usage;
  bool power_fields;
  int64_t counter_period_ns;
  struct ring power_ring, utilization_ring;
  enum gpm_support gpm;
  enum mig_mode mig;
};

#define SECOND_AVERAGE {.period_ns = MS(100), .window_ns = MS(1000)}
#define UTILIZATION_RING {.depth = 71, .period_ns = MS(200)}

static const struct profile profiles[] = {
    {.id = "h200", .name = "NVIDIA H200", .architecture = 9, .compute_major = 9, .compute_minor = 0,
     .cores = 16896, .bus_width_bits = 6016, .memory_mib = 143771, .limit_min_w = 200, .limit_max_w = 700,
     .sm_mhz = 1980, .memory_mhz = 3201, .remapped_rows = true, .memory_temperature = true, .nvlink = true,
     .memory_w = 42, .instant = {.period_ns = MS(100), .window_ns = MS(25), .lag_ns = MS(7)},
     .average = SECOND_AVERAGE, .power_usage = USAGE_AVERAGE, .power_fields = true, .counter_period_ns = MS(100),
     .power_ring = {.depth = 119, .period_ns = MS(20), .jitter = true}, .utilization_ring = UTILIZATION_RING,
     .gpm = GPM_ON, .mig = MIG_OFF},
    {.id = "a100", .name = "NVIDIA A100-SXM4-80GB", .architecture = 7, .compute_major = 8, .compute_minor = 0,
     .cores = 6912, .bus_width_bits = 5120, .memory_mib = 81920, .limit_min_w = 100, .limit_max_w = 400,
     .sm_mhz = 1410, .memory_mhz = 1593, .remapped_rows = true, .memory_temperature = true, .nvlink = true,
     .instant = {.period_ns = MS(100), .window_ns = MS(25), .lag_ns = MS(7)},
     .power_usage = USAGE_INSTANT, .power_fields = true, .counter_period_ns = MS(100),
     .utilization_ring = UTILIZATION_RING, .mig = MIG_OFF},
    {.id = "ada", .name = "NVIDIA L40S", .architecture = 8, .compute_major = 8, .compute_minor = 9,
     .cores = 18176, .bus_width_bits = 384, .memory_mib = 46068, .limit_min_w = 100, .limit_max_w = 350,
     .sm_mhz = 2520, .memory_mhz = 9001, .remapped_rows = true,
     .instant = {.period_ns = MS(100), .window_ns = MS(100)}, .average = SECOND_AVERAGE,
     .power_usage = USAGE_AVERAGE, .power_fields = true, .counter_period_ns = MS(100),
     .utilization_ring = UTILIZATION_RING},
    {.id = "t4", .name = "Tesla T4", .architecture = 6, .compute_major = 7, .compute_minor = 5,
     .cores = 2560, .bus_width_bits = 256, .memory_mib = 15360, .limit_min_w = 60, .limit_max_w = 70,
     .sm_mhz = 1590, .memory_mhz = 5001, .instant = {.period_ns = MS(100), .window_ns = MS(100)},
     .power_usage = USAGE_INSTANT, .power_fields = true, .counter_period_ns = MS(100),
     .utilization_ring = UTILIZATION_RING},
    {.id = "pascal", .name = "Tesla P100-SXM2-16GB", .architecture = 4, .compute_major = 6, .compute_minor = 0,
     .cores = 3584, .bus_width_bits = 4096, .memory_mib = 16384, .limit_min_w = 150, .limit_max_w = 300,
     .sm_mhz = 1480, .memory_mhz = 715, .instant = {.period_ns = MS(20), .window_ns = MS(10)},
     .power_usage = USAGE_INSTANT, .power_fields = true, .utilization_ring = UTILIZATION_RING},
    {.id = "average_only", .name = "NVIDIA RTX A6000", .architecture = 7, .compute_major = 8, .compute_minor = 6,
     .cores = 10752, .bus_width_bits = 384, .memory_mib = 49140, .limit_min_w = 100, .limit_max_w = 300,
     .sm_mhz = 2100, .memory_mhz = 8001, .remapped_rows = true, .average = SECOND_AVERAGE,
     .power_usage = USAGE_AVERAGE, .utilization_ring = UTILIZATION_RING},
};

const char *const profile_names = "h200, a100, ada, t4, pascal, average_only";

bool profile_apply(struct device *device, const char *name) {
  for (size_t i = 0; i < sizeof profiles / sizeof *profiles; i++) {
    const struct profile *p = &profiles[i];
    if (strcmp(p->id, name) != 0)
      continue;
    snprintf(device->name, sizeof device->name, "%s", p->name);
    device->architecture = p->architecture;
    device->compute_major = p->compute_major;
    device->compute_minor = p->compute_minor;
    device->cores = p->cores;
    device->bus_width_bits = p->bus_width_bits;
    device->memory_mib = p->memory_mib;
    device->limit_min_mw = p->limit_min_w * 1000;
    device->limit_max_mw = p->limit_max_w * 1000;
    device->limit_default_mw = device->limit_mw = p->limit_max_w * 1000;
    device->max_sm_mhz = p->sm_mhz;
    device->max_memory_mhz = p->memory_mhz;
    device->sm_mhz = (struct pair){p->sm_mhz, p->sm_mhz};
    device->memory_mhz = (struct pair){p->memory_mhz, p->memory_mhz};
    device->has_remapped_rows = p->remapped_rows;
    device->has_memory_temperature = p->memory_temperature;
    device->has_nvlink = p->nvlink;
    device->memory_w = (struct pair){p->memory_w, p->memory_w};
    device->instant = p->instant;
    device->average = p->average;
    device->power_usage = p->power_usage;
    device->power_fields = p->power_fields;
    device->counter_period_ns = p->counter_period_ns;
    device->power_ring = p->power_ring;
    device->utilization_ring = p->utilization_ring;
    device->gpm = p->gpm;
    device->gpm_period_ns = MS(100);
    device->mig = p->mig;

    device->truth = (struct truth){.kind = TRUTH_CONSTANT, .low_w = 100};
    device->gain = device->counter_gain = 1;
    device->quantum_mw = 1;
    device->counter_start_mj = 1e9; /* a card that has been up for hours, as in the field */
    device->temperature_c = (struct pair){40, 40};
    device->memory_temperature_c = (struct pair){45, 45};
    device->memory_used_mib = (struct pair){-1, -1};
    device->persistence = true;
    return true;
  }
  return false;
}

const char *const throttle_names[THROTTLE_COUNT] = {
    [THROTTLE_SW_POWER_CAP] = "sw_power_cap",
    [THROTTLE_SW_THERMAL] = "sw_thermal",
    [THROTTLE_HW_THERMAL] = "hw_thermal",
    [THROTTLE_HW_POWER_BRAKE] = "hw_power_brake",
    [THROTTLE_SYNC_BOOST] = "sync_boost",
    [THROTTLE_BOARD_LIMIT] = "board_limit",
    [THROTTLE_LOW_UTILIZATION] = "low_utilization",
    [THROTTLE_RELIABILITY] = "reliability",
    [THROTTLE_BASE_CLOCKS] = "base_clocks",
};

/* The GPM metrics that a Hopper driver answers and that an exporter asks for; all others are NOT_SUPPORTED. The
 * scenario uses the lower-case short name. */
static const nvmlGpmMetric_t gpm_metrics[] = {
    {1, 0, 0, {"graphics_util", "Graphics engine activity", "%"}},
    {2, 0, 0, {"sm_util", "SM activity", "%"}},
    {3, 0, 0, {"sm_occupancy", "SM occupancy", "%"}},
    {4, 0, 0, {"integer_util", "Integer pipe activity", "%"}},
    {5, 0, 0, {"any_tensor_util", "Tensor pipe activity", "%"}},
    {6, 0, 0, {"dfma_tensor_util", "DFMA tensor activity", "%"}},
    {7, 0, 0, {"hmma_tensor_util", "HMMA tensor activity", "%"}},
    {8, 0, 0, {"dmma_tensor_util", "DMMA tensor activity", "%"}},
    {9, 0, 0, {"imma_tensor_util", "IMMA tensor activity", "%"}},
    {10, 0, 0, {"dram_bw_util", "DRAM bandwidth", "%"}},
    {11, 0, 0, {"fp64_util", "FP64 pipe activity", "%"}},
    {12, 0, 0, {"fp32_util", "FP32 pipe activity", "%"}},
    {13, 0, 0, {"fp16_util", "FP16 pipe activity", "%"}},
    {20, 0, 0, {"pcie_tx_per_sec", "PCIe traffic from the GPU", "MiB/s"}},
    {21, 0, 0, {"pcie_rx_per_sec", "PCIe traffic to the GPU", "MiB/s"}},
    {60, 0, 0, {"nvlink_total_rx_per_sec", "NVLink traffic to the GPU", "MiB/s"}},
    {61, 0, 0, {"nvlink_total_tx_per_sec", "NVLink traffic from the GPU", "MiB/s"}},
};
#define GPM_METRICS (sizeof gpm_metrics / sizeof *gpm_metrics)

int gpm_metric_by_name(const char *name) {
  for (size_t i = 0; i < GPM_METRICS; i++)
    if (strcmp(gpm_metrics[i].metricInfo.shortName, name) == 0)
      return (int)gpm_metrics[i].metricId;
  return -1;
}

const nvmlGpmMetric_t *gpm_metric_info(unsigned metric) {
  for (size_t i = 0; i < GPM_METRICS; i++)
    if (gpm_metrics[i].metricId == metric)
      return &gpm_metrics[i];
  return NULL;
}

bool gpm_metric_counts_cycles(unsigned metric) {
  return metric <= 13 && metric != 10;
}
