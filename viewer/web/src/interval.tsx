/** A mean and its interval, drawn on a scale that a column shares. */

import { number } from "./format";

interface Props {
  mean: number;
  low: number | null;
  high: number | null;
  /** Ends of the scale. */
  from: number;
  to: number;
  zero?: boolean;
}

export function Interval({ mean, low, high, from, to, zero = false }: Props) {
  const place = (value: number) => 4 + (192 * (value - from)) / (to - from || 1);
  const said = low === null || high === null ? `${number(mean, 3)}, no interval` : `${number(mean, 3)}, interval from ${number(low, 3)} to ${number(high, 3)}`;
  return (
    <svg class="interval" viewBox="0 0 200 20" preserveAspectRatio="none" role="img" aria-label={said}>
      <line class="rail" x1={4} x2={196} y1={10} y2={10} />
      {zero && <line class="zero" x1={place(0)} x2={place(0)} y1={1} y2={19} />}
      {low !== null && high !== null && <line class="bar" x1={place(low)} x2={place(high)} y1={10} y2={10} />}
      <line class="dot" x1={place(mean)} x2={place(mean)} y1={4} y2={16} />
    </svg>
  );
}

export function between(low: number | null, high: number | null): string {
  return low === null || high === null ? "" : `${number(low, 3)} to ${number(high, 3)}`;
}
