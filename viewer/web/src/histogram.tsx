/** Bars of one quantity. What is drawn over with the pointer, or chosen with the fields under it, is what stays. */

import { useRef, useState } from "preact/hooks";

import { number } from "./format";

export interface Bins {
  /** n + 1 edges of n bins. */
  edges: number[];
  counts: number[];
  /** What has no value, and stands in no bin. */
  num_without: number;
}

interface Props {
  label: string;
  bins: Bins;
  /** The chosen interval; null: all. */
  range: [number, number] | null;
  onRange: (range: [number, number] | null) => void;
}

const WIDTH = 640;
const HEIGHT = 120;
const FOOT = 18;

export function Histogram({ label, bins, range, onRange }: Props) {
  const svg = useRef<SVGSVGElement>(null);
  const [drag, setDrag] = useState<[number, number] | null>(null);
  const low = bins.edges[0] ?? 0;
  const high = bins.edges[bins.edges.length - 1] ?? 1;
  const span = high - low || 1;
  const most = Math.max(1, ...bins.counts);
  const total = bins.counts.reduce((sum, one) => sum + one, 0);
  const x = (value: number) => ((value - low) / span) * WIDTH;
  const at = (event: PointerEvent) => {
    const box = svg.current?.getBoundingClientRect();
    return box ? Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * span + low : low;
  };
  const edgeBefore = (value: number) => [...bins.edges].reverse().find((edge) => edge <= value + 1e-12) ?? low;
  const edgeAfter = (value: number) => bins.edges.find((edge) => edge >= value - 1e-12) ?? high;
  const chosen = drag ? ([Math.min(...drag), Math.max(...drag)] as [number, number]) : range;
  const inside = (index: number) => {
    if (!chosen) return true;
    return (bins.edges[index + 1] ?? high) > chosen[0] && (bins.edges[index] ?? low) < chosen[1] + (chosen[0] === chosen[1] ? 1e-12 : 0);
  };
  return (
    <figure class="histogram">
      <figcaption>
        <span>{label}</span>
        <span class="muted">
          {chosen ? `${number(chosen[0], 3)} to ${number(chosen[1], 3)}` : `${total.toLocaleString("en-US")} in all${bins.num_without ? `, ${bins.num_without.toLocaleString("en-US")} without` : ""}`}
        </span>
        {range && (
          <button type="button" class="quiet" onClick={() => onRange(null)}>
            All
          </button>
        )}
      </figcaption>
      <svg
        ref={svg}
        viewBox={`0 0 ${WIDTH} ${HEIGHT + FOOT}`}
        preserveAspectRatio="none"
        role="img"
        aria-label={`${label}: ${bins.counts.map((one, index) => `${one} from ${number(bins.edges[index], 3)}`).join(", ")}`}
        onPointerDown={(event) => {
          event.currentTarget.setPointerCapture(event.pointerId);
          const value = at(event);
          setDrag([value, value]);
        }}
        onPointerMove={(event) => drag && setDrag([drag[0], at(event)])}
        onPointerUp={(event) => {
          if (!drag) return;
          const value = at(event);
          setDrag(null);
          const picked: [number, number] = [edgeBefore(Math.min(drag[0], value)), edgeAfter(Math.max(drag[0], value))];
          if (picked[0] === picked[1]) picked[1] = edgeAfter(picked[0] + 1e-9);
          onRange(picked);
        }}
        onPointerCancel={() => setDrag(null)}
      >
        {bins.counts.map((one, index) => {
          const left = x(bins.edges[index] ?? low);
          const right = x(bins.edges[index + 1] ?? high);
          const tall = one ? Math.max(2, (one / most) * (HEIGHT - 4)) : 0;
          return (
            <rect key={index} class={inside(index) ? "bar" : "bar out"} x={left + 1} width={Math.max(1, right - left - 2)} y={HEIGHT - tall} height={tall}>
              <title>{`${number(bins.edges[index], 3)} to ${number(bins.edges[index + 1], 3)}: ${one}`}</title>
            </rect>
          );
        })}
        <line class="axis" x1={0} x2={WIDTH} y1={HEIGHT} y2={HEIGHT} />
        {chosen && <rect class="brush" x={x(chosen[0])} width={Math.max(2, x(chosen[1]) - x(chosen[0]))} y={0} height={HEIGHT} />}
      </svg>
      <div class="ends" aria-hidden="true">
        <span>{number(low, 3)}</span>
        <span>{number(high, 3)}</span>
      </div>
    </figure>
  );
}
