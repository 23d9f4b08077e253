/** What tokens can be coloured by, and how. Blue is below, orange above, violet is size; none depends on red or green. */

import type { Tokens } from "./api";
import { number } from "./format";

export type Quantity = "sampled" | "logprob" | "difference" | "ratio" | "weight" | "clipped" | "advantage" | "version" | "turn" | "reference" | "teacher";

export const QUANTITIES: { name: Quantity; label: string; says: string }[] = [
  { name: "sampled", label: "mask", says: "Coloured: sampled by the policy, and trained on." },
  { name: "logprob", label: "logprob", says: "Of the engine that sampled it." },
  { name: "difference", label: "trainer − engine", says: "Logprob of the trainer minus that of the engine, before the first update." },
  { name: "ratio", label: "ratio", says: "exp(trainer − engine)." },
  { name: "weight", label: "correction weight", says: "What a correction weighs it by; 0: it was rejected." },
  { name: "clipped", label: "clipped", says: "Bounded by a correction or the loss before the first update." },
  { name: "advantage", label: "advantage", says: "What the token is worth." },
  { name: "version", label: "policy version", says: "Updates of the weights before it was sampled." },
  { name: "turn", label: "turn", says: "The turn that it belongs to." },
  { name: "reference", label: "reference logprob", says: "Of the frozen reference." },
  { name: "teacher", label: "teacher logprob", says: "Of the teacher." },
];

type Value = number | boolean | null;

export function valuesOf(tokens: Tokens, quantity: Quantity): Value[] | null {
  switch (quantity) {
    case "sampled":
      return tokens.sampled;
    case "logprob":
      return tokens.logprobs;
    case "difference":
      return tokens.differences;
    case "ratio":
      return tokens.ratios;
    case "weight":
      return tokens.weights;
    case "clipped":
      return tokens.clipped;
    case "advantage":
      return tokens.advantages;
    case "version":
      return tokens.versions;
    case "turn":
      return tokens.turns;
    case "reference":
      return tokens.reference_logprobs;
    case "teacher":
      return tokens.teacher_logprobs;
  }
}

export interface Scale {
  /** The CSS background of a value, and whether it is marked beside its colour. */
  paint: (value: Value) => { background: string; strong: boolean } | null;
  legend: { kind: "ramp"; low: string; high: string; gradient: string } | { kind: "swatches"; items: [string, string][] };
}

/** One of the tints of the style sheet, as opaque as `alpha` says, from 0 to 1. */
export const tint = (name: "plus" | "minus" | "size", alpha: number) =>
  `color-mix(in srgb, var(--tint-${name}) ${(100 * Math.max(0, Math.min(1, alpha))).toFixed(1)}%, transparent)`;

/** The value that only a fiftieth of the sizes exceed: one outlier does not fade all others. */
function usualSize(values: Value[], center: number): number {
  const sizes = values.filter((value) => typeof value === "number").map((value) => Math.abs(value - center)).sort((a, b) => a - b);
  return sizes[Math.min(sizes.length - 1, Math.floor(sizes.length * 0.98))] || 1e-6;
}

export function scaleOf(quantity: Quantity, values: Value[]): Scale {
  if (quantity === "sampled") {
    return {
      paint: (value) => (value ? { background: tint("minus", 0.2), strong: false } : null),
      legend: { kind: "swatches", items: [["sampled", tint("minus", 0.2)], ["context", "transparent"]] },
    };
  }
  if (quantity === "clipped") {
    return {
      paint: (value) => (value ? { background: tint("plus", 0.45), strong: true } : null),
      legend: { kind: "swatches", items: [["clipped", tint("plus", 0.45)], ["not", "transparent"]] },
    };
  }
  if (quantity === "version" || quantity === "turn") {
    const distinct = [...new Set(values.filter((value) => typeof value === "number" && value >= 0) as number[])].sort((a, b) => a - b);
    const color = (value: number) => `color-mix(in srgb, var(--c${distinct.indexOf(value) % 7}) 30%, transparent)`;
    return {
      paint: (value) => (typeof value === "number" && value >= 0 ? { background: color(value), strong: false } : null),
      legend: { kind: "swatches", items: distinct.slice(0, 24).map((value) => [String(value), color(value)]) },
    };
  }
  if (quantity === "logprob" || quantity === "reference" || quantity === "teacher") {
    const most = Math.max(1, usualSize(values, 0));
    return {
      paint: (value) => (typeof value === "number" ? { background: tint("size", 0.7 * Math.sqrt(Math.min(1, -value / most))), strong: false } : null),
      legend: { kind: "ramp", low: "0", high: `−${number(most, 2)}`, gradient: `linear-gradient(90deg, ${tint("size", 0)}, ${tint("size", 0.7)})` },
    };
  }
  const center = quantity === "ratio" || quantity === "weight" ? 1 : 0;
  const most = usualSize(values, center);
  return {
    paint: (value) => {
      if (typeof value !== "number") return null;
      const size = Math.min(1, Math.abs(value - center) / most);
      return { background: tint(value < center ? "minus" : "plus", 0.65 * size), strong: quantity === "weight" && value === 0 };
    },
    legend: {
      kind: "ramp",
      low: number(center - most, 2),
      high: number(center + most, 2),
      gradient: `linear-gradient(90deg, ${tint("minus", 0.65)}, ${tint("minus", 0)}, ${tint("plus", 0.65)})`,
    },
  };
}
