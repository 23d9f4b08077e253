/** Curves over steps, several runs over one another. */

import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";

import { number } from "./format";
import { cssColor, useThemeChanges } from "./theme";

export interface Curve {
  label: string;
  color: string;
  /** Dashes tell curves apart where colours do not. */
  dash?: number[];
  steps: number[];
  values: (number | null)[];
  /** Least and most of the steps that a point stands for; null: it stands for one. */
  low: (number | null)[] | null;
  high: (number | null)[] | null;
}

/** What a curve means, and between what it is healthy. */
export interface About {
  unit: string;
  meaning: string;
  low: number | null;
  high: number | null;
  otherwise: string | null;
}

interface Props {
  title: string;
  /** By label of a curve. */
  about: Record<string, About | undefined>;
  /** Whether each value says whose it is. */
  isLabelled: boolean;
  curves: Curve[];
  /** The step of the slider; null: none. */
  step: number | null;
  onStep?: (step: number) => void;
  height?: number;
}

/** All curves over the union of their steps, as uPlot takes them. */
function aligned(curves: Curve[]): uPlot.AlignedData {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const columns = curves.flatMap((curve) =>
    [curve.values, ...bounds(curve)].map((column) => {
      const values = new Map(curve.steps.map((step, at) => [step, column[at] ?? null]));
      // undefined: this run has no such step, and the line goes on over it; null: it has no value there.
      return steps.map((step) => values.get(step));
    }),
  );
  return [steps, ...columns] as uPlot.AlignedData;
}

function bounds(curve: Curve): (number | null)[][] {
  return curve.low && curve.high ? [curve.high, curve.low] : [];
}

/** Each curve as a line, with a band between its bounds where it has some. */
function drawnAs(curves: Curve[]): Pick<uPlot.Options, "series" | "bands"> {
  const series: uPlot.Series[] = [{}];
  const bands: uPlot.Band[] = [];
  for (const curve of curves) {
    series.push({ label: curve.label, stroke: curve.color, width: 1.75, dash: curve.dash, points: { show: curve.steps.length < 2 } });
    if (!bounds(curve).length) continue;
    bands.push({ series: [series.length, series.length + 1], fill: `${curve.color}30` });
    series.push({ points: { show: false } }, { points: { show: false } });
  }
  return { series, bands };
}

export function Chart({ title, about, isLabelled, curves, step, onStep, height = 180 }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const at = useRef(step);
  at.current = step;
  const chosen = useRef(onStep);
  chosen.current = onStep;
  const theme = useThemeChanges();

  useEffect(() => {
    const element = host.current;
    if (!element) return;
    const ink = cssColor("--muted");
    const grid = cssColor("--line");
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: ink, font, grid: { stroke: grid, width: 1 }, ticks: { show: false } };
    const made = new uPlot(
      {
        width: element.clientWidth || 300,
        height,
        legend: { show: false },
        cursor: { points: { size: 6 }, drag: { x: false, y: false }, sync: { key: "steps" } },
        scales: { x: { time: false } },
        axes: [
          { ...axis, size: 26, space: 48, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000] },
          { ...axis, size: 54, space: 28, values: (_, ticks) => ticks.map((tick) => number(tick, 3)) },
        ],
        ...drawnAs(curves),
        hooks: {
          draw: [
            (self) => {
              if (at.current === null) return;
              const x = Math.round(self.valToPos(at.current, "x", true));
              const { ctx, bbox } = self;
              ctx.save();
              ctx.strokeStyle = cssColor("--accent");
              ctx.lineWidth = devicePixelRatio;
              ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
              ctx.beginPath();
              ctx.moveTo(x, bbox.top);
              ctx.lineTo(x, bbox.top + bbox.height);
              ctx.stroke();
              ctx.restore();
            },
          ],
        },
      },
      aligned(curves),
      element,
    );
    made.over.addEventListener("click", () => {
      const index = made.cursor.idx;
      const value = index === null || index === undefined ? undefined : made.data[0][index];
      if (value !== undefined) chosen.current?.(value);
    });
    plot.current = made;
    const observer = new ResizeObserver(() => {
      if (element.clientWidth) made.setSize({ width: element.clientWidth, height });
    });
    observer.observe(element);
    return () => {
      observer.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [curves, height, theme]);
  const drawnAt = useRef(step);
  useEffect(() => {
    // The first drawing is still to come, and shows the step by itself.
    if (drawnAt.current !== step) plot.current?.redraw(false, false);
    drawnAt.current = step;
  }, [step]);

  const said = curves.map((curve) => {
    const index = step === null ? curve.steps.length - 1 : curve.steps.indexOf(step);
    return { curve, value: index < 0 ? null : (curve.values[index] ?? null) };
  });
  const unhealthy = said.filter(({ curve, value }) => !isHealthy(value, about[curve.label]) && about[curve.label]?.otherwise);
  return (
    <figure class="chart">
      <figcaption>
        <span class="name">{title}</span>
        <span class="values">
          {said.map(({ curve, value }) => (
            <span key={curve.label} title={explained(curve.label, about[curve.label])} class={isHealthy(value, about[curve.label]) ? "" : "unhealthy"}>
              <span class="dot" style={{ background: curve.color }} />
              {isLabelled && <span class="muted">{curve.label} </span>}
              {number(value)}
            </span>
          ))}
        </span>
      </figcaption>
      <div
        ref={host}
        class="plot"
        role="img"
        aria-label={`${title} ${step === null ? "at the last step" : `at step ${step}`}: ${said.map(({ curve, value }) => `${curve.label} ${number(value)}`).join(", ")}`}
      />
      {unhealthy.map(({ curve }) => (
        <p key={curve.label} class="advice">
          {isLabelled && `${curve.label}: `}
          {about[curve.label]?.otherwise}
        </p>
      ))}
    </figure>
  );
}

function isHealthy(value: number | null, about: About | undefined): boolean {
  if (value === null || !about) return true;
  return (about.low === null || value >= about.low) && (about.high === null || value <= about.high);
}

function explained(label: string, about: About | undefined): string {
  if (!about) return label;
  const range = about.low === null && about.high === null ? "" : `; healthy from ${number(about.low)} to ${number(about.high)}`;
  return `${label}: ${about.meaning}, in ${about.unit}${range}`;
}
