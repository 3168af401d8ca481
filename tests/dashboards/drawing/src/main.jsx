// Draws /BOARD.json with Grafana's published components: ?board=, &theme=, &range= and &scrape= in seconds, and values
// for variables that are not "all". The page's title says when it is done and how many faults there were.
import React from 'react';
import { createRoot } from 'react-dom/client';
import { createTheme, getFieldDisplayValues, ThemeContext } from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, Table, TimeSeries, VizRepeater } from '@grafana/ui';
import { faults, FROM, interpolator, load, NOW } from './data.js';
import { Heatmap, Scatter, StateTimeline, Text } from './stand_ins.jsx';

const parameters = new URLSearchParams(location.search);
const theme = createTheme({ colors: { mode: parameters.get('theme') || 'dark' } });
const WIDTH = 1400;
const CELL = 38; // Grafana's: 30 pixels and a gap of 8
const TOP = 48;

function Figure({ panel, frames, width, height }) {
  const values = getFieldDisplayValues({
    fieldConfig: panel.fieldConfig, reduceOptions: { calcs: ['lastNotNull'], ...panel.options.reduceOptions },
    replaceVariables: (text) => text, theme, data: frames, sparkline: true, timeZone: 'browser',
  });
  return (
    <VizRepeater getValues={() => values} source={values} width={width} height={height} orientation="auto"
      renderValue={({ value, width: w, height: h }) => (
        <BigValue value={{ ...value.display, title: '' }} sparkline={value.sparkline} width={w} height={h} theme={theme}
          colorMode={panel.options.colorMode || 'value'} graphMode={panel.options.graphMode || 'area'} />
      )} />
  );
}

function Lines({ panel, frames, width, height }) {
  const timeRange = { from: { valueOf: () => FROM }, to: { valueOf: () => NOW }, raw: { from: 'now-15m', to: 'now' } };
  return (
    <TimeSeries width={width} height={height} frames={frames} timeRange={timeRange} timeZone="browser"
      options={panel.options} legend={panel.options.legend} />
  );
}

const DRAWN = { timeseries: Lines, stat: Figure, statetimeline: StateTimeline, 'state-timeline': StateTimeline, heatmap: Heatmap, xychart: Scatter };

function Visualization(props) {
  const { panel, frames, width, height } = props;
  if (panel.type === 'text') return <Text {...props} />;
  if (!frames.length) {
    return <div style={{ padding: 16, opacity: 0.7 }}>{panel.fieldConfig?.defaults.noValue || 'No data'}</div>;
  }
  if (panel.type === 'table') {
    const [by] = panel.options.sortBy || [];
    const initialSortBy = by ? [{ displayName: by.displayName, desc: by.desc }] : undefined;
    return <Table data={frames[0]} width={width} height={height} initialSortBy={initialSortBy} />;
  }
  const Drawn = DRAWN[panel.type];
  if (!Drawn) throw new Error(`Nothing here draws a panel of type ${panel.type}.`);
  return <Drawn {...props} theme={theme} />;
}

class Guard extends React.Component {
  state = {};

  static getDerivedStateFromError(error) { return { error }; }

  componentDidCatch(error) { faults.push(`${this.props.title}: ${error.message}`); }

  render() {
    return this.state.error ? <pre style={{ color: 'red' }}>{this.state.error.stack.slice(0, 300)}</pre> : this.props.children;
  }
}

function Board({ dashboard, data, title }) {
  const column = WIDTH / 24;
  const rows = Math.max(...dashboard.panels.map((panel) => panel.gridPos.y + panel.gridPos.h));
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ position: 'relative', width: WIDTH, height: rows * CELL + TOP, color: theme.colors.text.primary, background: theme.colors.background.canvas }}>
        <h3 style={{ padding: 12, margin: 0 }}>{dashboard.title}</h3>
        {dashboard.panels.map((panel, i) => {
          const { x, y, w, h } = panel.gridPos;
          const [width, height] = [w * column - 8, h * CELL - 8];
          const style = { position: 'absolute', left: x * column + 4, top: TOP + y * CELL + 4, width, height };
          if (panel.type === 'row') return <div key={panel.id} style={{ ...style, fontWeight: 500, fontSize: 16, lineHeight: '30px' }}>⌄ {title(panel.title)}</div>;
          return (
            <div key={panel.id} style={style}>
              <Guard title={panel.title}>
                <PanelChrome title={title(panel.title)} description={panel.description} width={width} height={height}>
                  {(innerWidth, innerHeight) => <Visualization panel={panel} frames={data[i]} width={innerWidth} height={innerHeight} theme={theme} />}
                </PanelChrome>
              </Guard>
            </div>
          );
        })}
      </div>
    </ThemeContext.Provider>
  );
}

async function draw() {
  const dashboard = await (await fetch(`/${parameters.get('board')}.json`)).json();
  const interpolate = interpolator(dashboard);
  const data = await Promise.all(dashboard.panels.map((panel) => (panel.type === 'row' ? [] : load(panel, interpolate, theme).catch((error) => {
    faults.push(`${panel.title}: ${error.message}`);
    return [];
  }))));
  document.body.style.background = theme.colors.background.canvas;
  createRoot(document.getElementById('root')).render(<Board dashboard={dashboard} data={data} title={interpolate.title} />);
  // Charts measure themselves after the first paint.
  setTimeout(() => {
    faults.forEach((fault) => console.error(fault));
    document.title = `done, ${faults.length} faults`;
  }, 1500);
}

draw().catch((error) => {
  console.error(error.stack);
  document.title = 'done, 1 faults';
});
