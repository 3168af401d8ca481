// From a panel's targets to Grafana's data frames: executes the queries, applies transformations and field overrides.
import { lastValueFrom } from 'rxjs';
import {
  applyFieldOverrides, dataLinksOverrideProcessor, displayNameOverrideProcessor, FieldType, identityOverrideProcessor,
  numberOverrideProcessor, standardFieldConfigEditorRegistry, standardTransformers, standardTransformersRegistry,
  stringOverrideProcessor, thresholdsOverrideProcessor, toDataFrame, transformDataFrame, unitOverrideProcessor,
  valueMappingsOverrideProcessor,
} from '@grafana/data';

const parameters = new URLSearchParams(location.search);
const RANGE_SECONDS = Number(parameters.get('range') || 900);
const SCRAPE_SECONDS = Number(parameters.get('scrape') || 5);
// Grafana asks for about one point per pixel; a third of that is what fits here.
const POINTS = 240;
export const NOW = Date.now();
export const FROM = NOW - RANGE_SECONDS * 1000;
export const STEP = Math.max(SCRAPE_SECONDS, Math.ceil(RANGE_SECONDS / POINTS));
const leastStep = (target) => (target.interval ? parseInt(target.interval, 10) : SCRAPE_SECONDS);
const stepOf = (target) => Math.max(leastStep(target), STEP);
export const faults = [];

// Grafana's bootstrap fills these two registries; its packages alone leave them empty.
const property = (id, process) => ({
  id, path: id, name: id, description: '', process, override: process, editor: () => null, shouldApply: () => true,
});
const custom = (id) => ({ ...property(`custom.${id}`, identityOverrideProcessor), path: id, isCustom: true });
const customIds = [
  'lineStyle', 'lineWidth', 'fillOpacity', 'stacking', 'cellOptions', 'axisLabel', 'drawStyle', 'showPoints',
  'thresholdsStyle', 'lineInterpolation', 'gradientMode', 'spanNulls', 'hideFrom', 'scaleDistribution', 'axisSoftMin', 'axisSoftMax',
  'axisPlacement', 'axisColorMode', 'axisGridShow', 'minWidth', 'align',
];
standardFieldConfigEditorRegistry.setInit(() => [
  property('unit', unitOverrideProcessor),
  property('min', numberOverrideProcessor),
  property('max', numberOverrideProcessor),
  property('decimals', numberOverrideProcessor),
  property('displayName', displayNameOverrideProcessor),
  property('noValue', stringOverrideProcessor),
  property('color', identityOverrideProcessor),
  property('thresholds', thresholdsOverrideProcessor),
  property('mappings', valueMappingsOverrideProcessor),
  property('links', dataLinksOverrideProcessor),
  ...customIds.map(custom),
]);
const transformers = new Map(Object.values(standardTransformers).map((one) => [one.id, one]));
standardTransformersRegistry.setInit(() => [...transformers.values()].map((one) => (
  { id: one.id, name: one.name, aliasIds: [], transformation: one, editor: () => null })));

export function interpolator(dashboard) {
  const chosen = { datasource: 'prometheus' };
  for (const variable of dashboard.templating.list) {
    const value = variable.current?.value;
    chosen[variable.name] = variable.includeAll ? variable.allValue : parameters.get(variable.name) ?? value ?? '.*';
  }
  const shown = (text, names) => text.replace(/\$\{?(\w+)(:\w+)?\}?/g, (match, name) => names[name] ?? match);
  return {
    title: (text) => shown(text, chosen),
    query: (target) => shown(target.expr, {
      ...chosen,
      __rate_interval: `${Math.max(4 * leastStep(target), stepOf(target) + leastStep(target))}s`,
      __range: `${RANGE_SECONDS}s`,
      __interval: `${stepOf(target)}s`,
    }),
  };
}

const legend = (target, labels) => (target.legendFormat || '').replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? '')
  || 'Value';

function tableFrame(target, result) {
  const labels = [...new Set(result.flatMap((one) => Object.keys(one.metric)))];
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: result.map((one) => one.value[0] * 1000) },
      ...labels.map((name) => ({ name, type: FieldType.string, values: result.map((one) => one.metric[name] ?? '') })),
      { name: `Value #${target.refId}`, type: FieldType.number, values: result.map((one) => Number(one.value[1])) },
    ],
  });
}

function seriesFrame(target, one) {
  const points = one.values || [one.value];
  const name = legend(target, one.metric);
  return toDataFrame({
    refId: target.refId,
    name,
    fields: [
      { name: 'Time', type: FieldType.time, values: points.map((p) => p[0] * 1000), config: { interval: stepOf(target) * 1000 } },
      {
        name: 'Value', type: FieldType.number, labels: one.metric, config: { displayNameFromDS: name },
        values: points.map((p) => Number(p[1])),
      },
    ],
  });
}

async function ask(target, interpolate) {
  const query = encodeURIComponent(interpolate.query(target));
  const step = stepOf(target);
  const instant = target.instant && !target.range;
  const end = Math.floor(NOW / 1000 / step) * step;
  const url = instant
    ? `/api/v1/query?query=${query}&time=${NOW / 1000}`
    : `/api/v1/query_range?query=${query}&start=${FROM / 1000}&end=${end}&step=${step}`;
  const answer = await (await fetch(url)).json();
  if (answer.status !== 'success') {
    throw new Error(`${target.expr}: ${answer.error}`);
  }
  const { result } = answer.data;
  if (target.format === 'table') {
    return result.length ? [tableFrame(target, result)] : [];
  }
  return result.map((one) => seriesFrame(target, one));
}

export async function load(panel, interpolate, theme) {
  const answers = await Promise.all((panel.targets || []).map((target) => ask(target, interpolate)));
  let frames = answers.flat();
  if (panel.transformations && frames.length) {
    frames = await lastValueFrom(transformDataFrame(panel.transformations, frames, { interpolate: (text) => text }));
  }
  const color = { mode: panel.type === 'timeseries' ? 'palette-classic' : 'thresholds' };
  return applyFieldOverrides({
    data: frames,
    fieldConfig: { defaults: { color, ...panel.fieldConfig?.defaults }, overrides: panel.fieldConfig?.overrides || [] },
    fieldConfigRegistry: standardFieldConfigEditorRegistry,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'browser',
  });
}
