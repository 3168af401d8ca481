// Panel types whose components Grafana does not publish, drawn plainly from the same options, units and mappings.
import React from 'react';
import { formattedValueToString, getDisplayProcessor, getFieldDisplayName, getValueFormat, renderTextPanelMarkdown } from '@grafana/data';
import { FROM, NOW, STEP } from './data.js';

const LEGEND = 24;
const AXIS = 20;
const across = (left, width) => (t) => left + ((t - FROM) / (NOW - FROM)) * width;
const clock = (t) => new Date(t).toTimeString().slice(0, 5);
const SMALL = { fontSize: 12 };

function TimeAxis({ left, width, y, color }) {
  const x = across(left, width);
  const ticks = [0.1, 0.3, 0.5, 0.7, 0.9].map((part) => FROM + part * (NOW - FROM));
  return ticks.map((t) => <text key={t} x={x(t)} y={y} fill={color} textAnchor="middle" style={SMALL}>{clock(t)}</text>);
}

function Legend({ entries, y, color, width }) {
  const widths = entries.map(([name]) => 26 + 6.6 * name.length);
  // Narrow panels keep the names that fit; Grafana would scroll.
  let x = 4;
  return entries.filter((_, i) => widths.slice(0, i + 1).reduce((sum, w) => sum + w, 4) < width).map(([name, fill]) => {
    const at = x;
    x += 26 + 6.6 * name.length;
    return (
      <g key={name}>
        <rect x={at} y={y - 9} width={12} height={4} fill={fill} />
        <text x={at + 16} y={y - 3} fill={color} style={SMALL}>{name}</text>
      </g>
    );
  });
}

export function StateTimeline({ panel, frames, width, height, theme }) {
  const rows = frames.map((frame) => {
    const [time, value] = frame.fields;
    return { name: getFieldDisplayName(value, frame, frames), time: time.values, value: value.values };
  }).sort((a, b) => a.name.localeCompare(b.name, 'en', { numeric: true }));
  const mapping = panel.fieldConfig.defaults.mappings[0].options;
  const color = theme.colors.text.primary;
  const left = Math.min(8 + 7 * Math.max(...rows.map((row) => row.name.length)), width / 2.5);
  const inner = width - left - 4;
  const lane = Math.min((height - LEGEND - AXIS) / rows.length, 60);
  const x = across(left, inner);
  const states = Object.values(mapping).sort((a, b) => a.index - b.index);
  const spans = (row) => row.value.reduce((all, value, i) => {
    const last = all.at(-1);
    const begin = row.time[i];
    if (last && last.value === value && begin - last.end < 1500 * STEP) last.end = begin;
    else if (last && begin - last.end < 1500 * STEP) all.push({ value, begin: (last.end = begin), end: begin });
    else all.push({ value, begin, end: begin });
    return all;
  }, []);
  return (
    <svg width={width} height={height}>
      {rows.map((row, i) => (
        <g key={row.name}>
          <text x={left - 6} y={(i + 0.5) * lane + 4} fill={color} textAnchor="end" style={SMALL}>{row.name}</text>
          {spans(row).map(({ value, begin, end }) => {
            const state = mapping[String(value)] || { text: String(value), color: 'red' };
            const wide = Math.max(x(Math.min(end + STEP * 500, NOW)) - x(Math.max(begin, FROM)), 1);
            return (
              <g key={begin}>
                <rect x={x(Math.max(begin, FROM))} y={(i + 0.1) * lane} width={wide} height={lane * 0.8}
                  fill={theme.visualization.getColorByName(state.color)} opacity={0.85} />
                {wide > 7 * state.text.length && (
                  <text x={x(Math.max(begin, FROM)) + 5} y={(i + 0.5) * lane + 4} fill="#111" style={SMALL}>{state.text}</text>
                )}
              </g>
            );
          })}
        </g>
      ))}
      <TimeAxis left={left} width={inner} y={rows.length * lane + 14} color={color} />
      <Legend entries={states.map((s) => [s.text, theme.visualization.getColorByName(s.color)])} y={height - 2} color={color} width={width} />
    </svg>
  );
}

export function Heatmap({ panel, frames, width, height, theme }) {
  const bound = (frame) => (frame.name === '+Inf' ? Infinity : Number(frame.name));
  const buckets = [...frames].sort((a, b) => bound(a) - bound(b));
  const at = new Map();
  const cells = [];
  // Prometheus' buckets are cumulative: what lies between two bounds is their difference.
  buckets.forEach((frame, row) => frame.fields[0].values.forEach((t, i) => {
    const below = at.get(t) ?? 0;
    const value = frame.fields[1].values[i];
    at.set(t, value);
    if (value - below > 1e-9) cells.push({ t, row, value: value - below });
  }));
  if (!cells.length) return <div>No data</div>;
  const rowsUsed = cells.map((c) => c.row);
  const low = Math.max(Math.min(...rowsUsed) - 1, 0);
  const high = Math.min(Math.max(...rowsUsed) + 1, buckets.length - 1);
  const most = Math.max(...cells.map((c) => c.value));
  const unit = getValueFormat(panel.options.yAxis?.unit || 'short');
  const color = theme.colors.text.primary;
  const left = 64;
  const inner = width - left - 4;
  const lane = (height - AXIS) / (high - low + 1);
  const x = across(left, inner);
  const times = [...at.keys()].sort((a, b) => a - b);
  const wide = Math.max(x(times[1]) - x(times[0]) - 1, 1);
  return (
    <svg width={width} height={height}>
      {buckets.slice(low, high + 1).map((frame, i) => (
        <text key={frame.name} x={left - 6} y={height - AXIS - i * lane} fill={color} textAnchor="end" style={SMALL}>
          {bound(frame) === Infinity ? '∞' : formattedValueToString(unit(bound(frame), 1))}
        </text>
      ))}
      {cells.map(({ t, row, value }) => (
        <rect key={`${t} ${row}`} x={Math.max(x(t) - wide, left)} y={height - AXIS - (row - low) * lane} width={Math.min(wide, x(t) - left)}
          height={lane - 1} fill="#ff8c1a" opacity={0.15 + 0.85 * Math.sqrt(value / most)} />
      ))}
      <TimeAxis left={left} width={inner} y={height - 4} color={color} />
    </svg>
  );
}

export function Scatter({ panel, frames, width, height, theme }) {
  const [frame] = frames;
  const field = (name) => frame.fields.find((one) => getFieldDisplayName(one, frame, frames) === name);
  const color = theme.colors.text.primary;
  const series = panel.options.series.map((one) => {
    const x = field(one.x.matcher.options);
    const y = field(one.y.matcher.options);
    const fill = theme.visualization.getColorByName(y?.config.color?.fixedColor || 'blue');
    const points = x && y ? x.values.map((v, i) => [v, y.values[i]]).filter(([a, b]) => a != null && b != null) : [];
    return { name: one.name.fixed, fill, points, x, y };
  });
  const points = series.flatMap((one) => one.points);
  if (!points.length) return <div>No data</div>;
  const most = [0, 1].map((axis) => 1.05 * Math.max(...points.map((point) => point[axis])));
  const left = 80;
  const bottom = AXIS * 2 + LEGEND;
  const px = (v) => left + (v / most[0]) * (width - left - 12);
  const py = (v) => height - bottom - (v / most[1]) * (height - bottom - 8);
  const parts = [0, 0.25, 0.5, 0.75, 1];
  const show = (f, v) => formattedValueToString(getDisplayProcessor({ field: f, theme })(v));
  const { x: fx, y: fy } = series.find((one) => one.points.length);
  return (
    <svg width={width} height={height}>
      {parts.map((part) => (
        <g key={part}>
          <line x1={left} x2={width - 12} y1={py(part * most[1])} y2={py(part * most[1])} stroke={theme.colors.border.weak} />
          <text x={left - 6} y={py(part * most[1]) + 4} fill={color} textAnchor="end" style={SMALL}>{show(fy, part * most[1])}</text>
          <text x={px(part * most[0])} y={height - bottom + 16} fill={color} textAnchor="middle" style={SMALL}>{show(fx, part * most[0])}</text>
        </g>
      ))}
      <text x={width / 2} y={height - bottom + 33} fill={color} textAnchor="middle" style={SMALL}>{fx.config.custom?.axisLabel}</text>
      <text x={12} y={height / 2 - 20} fill={color} textAnchor="middle" style={SMALL} transform={`rotate(-90 12 ${height / 2 - 20})`}>
        {panel.fieldConfig.defaults.custom?.axisLabel}
      </text>
      {series.map((one) => one.points.map(([a, b], i) => (
        <circle key={`${one.name} ${i}`} cx={px(a)} cy={py(b)} r={one.name === 'B*' ? 5 : 3} fill={one.fill} opacity={0.7} />
      )))}
      <Legend entries={series.map((one) => [one.name, one.fill])} y={height - 2} color={color} width={width} />
    </svg>
  );
}

export function Text({ panel }) {
  return <div className="markdown-html" style={{ overflow: 'hidden' }} dangerouslySetInnerHTML={{ __html: renderTextPanelMarkdown(panel.options.content) }} />;
}
