/** How far trainer and engine are apart, by position in the segment and by step. */

import { useEffect, useRef, useState } from "preact/hooks";

import type { MismatchMap, RunSummary } from "../api";
import { useAnswer } from "../client";
import { number } from "../format";
import { useKeys } from "../keyboard";
import { Ready } from "../parts";
import { go, link, setQuery, useRoute } from "../router";
import { cssColor, useThemeChanges } from "../theme";
import { tint } from "../token_colors";
import { Inline } from "../visible_text";

export function MismatchView({ run }: { run: RunSummary }) {
  const asked = useAnswer("/api/mismatch", { run: run.id });
  return <Ready of={asked}>{(map) => (map.steps.length && map.positions.length ? <Map_ run={run} map={map} /> : <Empty reason={map.reason} />)}</Ready>;
}

function Empty({ reason }: { reason: string | null }) {
  return (
    <p class="empty">
      <Inline text={reason ?? "No logprobs of trainer and engine were kept."} limit={600} />
    </p>
  );
}

const CELL = 14;

function Map_({ run, map }: { run: RunSummary; map: MismatchMap }) {
  const { query } = useRoute();
  const which = query.get("show") === "max" ? "max" : "mean";
  const cells = map[which];
  const canvas = useRef<HTMLCanvasElement>(null);
  const [at, setAt] = useState<{ step: number; position: number } | null>(null);
  const theme = useThemeChanges();
  const all = cells.flat().filter((value) => value !== null);
  const most = Math.max(...all, 1e-12);
  useEffect(() => {
    const element = canvas.current;
    const context = element?.getContext("2d");
    if (!element || !context) return;
    element.width = map.steps.length;
    element.height = map.positions.length;
    context.fillStyle = cssColor("--tint-size");
    context.clearRect(0, 0, element.width, element.height);
    cells.forEach((column, x) =>
      column.forEach((value, y) => {
        if (value === null) return;
        context.globalAlpha = 0.06 + 0.94 * Math.sqrt(value / most);
        context.fillRect(x, y, 1, 1);
      }),
    );
  }, [map, which, theme]);
  useKeys([
    { keys: ["ArrowRight", "l"], help: "next step", run: () => move(1, 0) },
    { keys: ["ArrowLeft", "h"], help: "previous step", run: () => move(-1, 0) },
    { keys: ["j", "ArrowDown"], help: "later position", run: () => move(0, 1) },
    { keys: ["k", "ArrowUp"], help: "earlier position", run: () => move(0, -1) },
    { keys: ["Enter", "o"], help: "open the step", run: () => open() },
  ]);
  const clamp = (value: number, length: number) => Math.max(0, Math.min(length - 1, value));
  const move = (x: number, y: number) =>
    setAt((before) => ({
      step: clamp((before?.step ?? -Math.sign(x)) + x, map.steps.length),
      position: clamp((before?.position ?? -Math.sign(y)) + y, map.positions.length),
    }));
  const open = () => {
    if (at) go(["run", run.id, "episodes"], { step: map.steps[at.step] });
  };
  const place = (event: PointerEvent | MouseEvent) => {
    const box = canvas.current?.getBoundingClientRect();
    if (!box) return null;
    return {
      step: clamp(Math.floor(((event.clientX - box.left) / box.width) * map.steps.length), map.steps.length),
      position: clamp(Math.floor(((event.clientY - box.top) / box.height) * map.positions.length), map.positions.length),
    };
  };
  const value = at === null ? null : (cells[at.step]?.[at.position] ?? null);
  const range = (index: number) => {
    const end = map.positions[index + 1];
    return end === undefined ? `from ${number(map.positions[index])}` : `${number(map.positions[index])} to ${number(end - 1)}`;
  };
  return (
    <section class="panel map" aria-label="Mismatch">
      <div class="filters">
        <button type="button" class="plain" aria-pressed={which === "mean"} onClick={() => setQuery({ show: null })}>
          Mean
        </button>
        <button type="button" class="plain" aria-pressed={which === "max"} onClick={() => setQuery({ show: "max" })}>
          Largest
        </button>
        <span class="legend" style={{ margin: 0 }}>
          <span>
            0
            <span class="ramp" style={{ background: `linear-gradient(90deg, ${tint("size", 0.06)}, ${tint("size", 0.5)} 25%, ${tint("size", 1)})` }} />
            {number(most, 3)}
          </span>
          <span class="muted">|logprob of the trainer − of the engine|, by position (down) and step (across)</span>
        </span>
      </div>
      <div class="map-frame">
        <div class="map-rows muted" aria-hidden="true">
          <span>{number(map.positions[0])}</span>
          <span>{number(map.positions[map.positions.length - 1])}</span>
        </div>
        <canvas
          ref={canvas} role="img" style={{ height: `${Math.max(120, Math.min(520, map.positions.length * CELL))}px` }}
          aria-label={`Largest ${which} ${number(most, 3)} over ${map.steps.length} steps`}
          onPointerMove={(event) => setAt(place(event))}
          onClick={(event) => {
            const cell = place(event);
            if (cell) location.hash = link(["run", run.id, "episodes"], { step: map.steps[cell.step] });
          }}
        />
        <div class="map-columns muted" aria-hidden="true">
          <span>step {map.steps[0]}</span>
          <span>step {map.steps[map.steps.length - 1]}</span>
        </div>
      </div>
      <p class="token-card" aria-live="polite">
        {at === null ? (
          <span class="muted">Point at a cell, or press the arrow keys; a click opens the step.</span>
        ) : (
          <>
            <span><b>step</b>{map.steps[at.step]}</span>
            <span><b>positions</b>{range(at.position)}</span>
            <span><b>{which}</b>{number(value, 4)}</span>
            <span><b>tokens</b>{number(map.num_tokens[at.step]?.[at.position] ?? 0)}</span>
          </>
        )}
      </p>
    </section>
  );
}
