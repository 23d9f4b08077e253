/** The tokens of a segment, coloured by what the reader chooses; what is known of each under the pointer. */

import { useCallback, useEffect, useMemo, useState } from "preact/hooks";

import type { EpisodeKey, Tokens } from "./api";
import { ask } from "./client";
import { number } from "./format";
import { useKeys } from "./keyboard";
import { setQuery, useRoute } from "./router";
import type { Quantity, Scale } from "./token_colors";
import { QUANTITIES, scaleOf, valuesOf } from "./token_colors";
import { Inline, plain } from "./visible_text";

const CHUNK = 2000;

/** The parts of a segment that are there, and a way to the next. */
function useTokens(episode: EpisodeKey, segment: number, until: number) {
  const [state, setState] = useState<{ parts: Tokens[]; error: string | null; pending: boolean }>({ parts: [], error: null, pending: true });
  const load = useCallback(
    async (before: Tokens[], end: number) => {
      let parts = before;
      setState({ parts, error: null, pending: true });
      try {
        do {
          const start = parts.reduce((sum, part) => sum + part.ids.length, 0);
          const part = await ask("/api/tokens", { ...episode, segment, start, count: CHUNK });
          parts = [...parts, part];
          if (!part.ids.length || start + part.ids.length >= part.total) break;
        } while (parts.reduce((sum, part) => sum + part.ids.length, 0) <= end);
        setState({ parts, error: null, pending: false });
      } catch (error) {
        setState({ parts, error: (error as Error).message, pending: false });
      }
    },
    [episode.run, episode.set, episode.step, episode.id, segment],
  );
  useEffect(() => void load([], until), [load]);
  return { ...state, more: () => void load(state.parts, 0) };
}

export function TokenView({ episode, segment }: { episode: EpisodeKey; segment: number }) {
  const { query } = useRoute();
  const pinned = query.get("token") === null ? null : Number(query.get("token"));
  const { parts, error, pending, more } = useTokens(episode, segment, pinned ?? 0);
  const [hovered, setHovered] = useState<number | null>(null);
  const have = parts.reduce((sum, part) => sum + part.ids.length, 0);
  const first = parts[0];
  const offered = QUANTITIES.filter(({ name }) => parts.some((part) => valuesOf(part, name)?.some((value) => value !== null)));
  const quantity = (offered.find(({ name }) => name === query.get("color")) ?? offered[0])?.name ?? "sampled";
  const scale = useMemo(() => scaleOf(quantity, parts.flatMap((part) => valuesOf(part, quantity) ?? [])), [quantity, parts]);
  const at = hovered ?? pinned;
  const move = (by: number) => setQuery({ token: Math.max(0, Math.min(have - 1, (pinned ?? -1) + by)) });
  const nextQuantity = (by: number) => {
    const place = offered.findIndex(({ name }) => name === quantity);
    setQuery({ color: offered[(place + by + offered.length) % offered.length]?.name });
  };
  useKeys([
    { keys: ["ArrowRight", "l"], help: "next token", run: () => move(1) },
    { keys: ["ArrowLeft", "h"], help: "previous token", run: () => move(-1) },
    { keys: ["c"], help: "colour by the next quantity", run: () => nextQuantity(1) },
    { keys: ["C"], help: "colour by the quantity before", run: () => nextQuantity(-1) },
  ]);
  useEffect(() => {
    if (pinned !== null) document.getElementById(`token-${pinned}`)?.scrollIntoView({ block: "nearest" });
  }, [pinned, have]);

  if (error !== null && !first) {
    return (
      <div class="failure" role="alert">
        <Inline text={error} limit={1000} />
      </div>
    );
  }
  if (!first) return <p class="waiting" role="status">Reading…</p>;
  return (
    <section aria-label="Tokens" class="panel">
      <div class="filters">
        <label for="color-by">Colour by</label>
        <select id="color-by" value={quantity} onChange={(event) => setQuery({ color: event.currentTarget.value })}>
          {offered.map(({ name, label }) => (
            <option key={name} value={name}>
              {label}
            </option>
          ))}
        </select>
        <Legend scale={scale} says={QUANTITIES.find(({ name }) => name === quantity)?.says ?? ""} />
      </div>
      {first.texts === null && (
        <p class="muted">
          Ids alone: <Inline text={first.tokenizer} />
        </p>
      )}
      <div
        class="tokens"
        onPointerOver={(event) => {
          const target = (event.target as HTMLElement).closest<HTMLElement>(".t");
          if (target?.dataset.at) setHovered(Number(target.dataset.at));
        }}
        onPointerLeave={() => setHovered(null)}
        onClick={(event) => {
          const target = (event.target as HTMLElement).closest<HTMLElement>(".t");
          if (target?.dataset.at) setQuery({ token: target.dataset.at });
        }}
      >
        {parts.map((part) => (
          <Part key={part.start} part={part} quantity={quantity} scale={scale} pinned={pinned !== null && pinned >= part.start && pinned < part.start + part.ids.length ? pinned : null} />
        ))}
      </div>
      {have < first.total && (
        <button type="button" class="plain" disabled={pending} onClick={more}>
          {number(Math.min(CHUNK, first.total - have))} more of {number(first.total)} tokens
        </button>
      )}
      <TokenCard parts={parts} at={at} />
    </section>
  );
}

function Legend({ scale, says }: { scale: Scale; says: string }) {
  const { legend } = scale;
  return (
    <span class="legend" title={says} style={{ margin: 0 }}>
      {legend.kind === "ramp" ? (
        <span>
          {legend.low}
          <span class="ramp" style={{ background: legend.gradient }} />
          {legend.high}
        </span>
      ) : (
        legend.items.map(([label, color]) => (
          <span key={label}>
            <span class="swatch ruled" style={{ background: color }} />
            {label}
          </span>
        ))
      )}
      <span class="muted">{says}</span>
    </span>
  );
}

function Part({ part, quantity, scale, pinned }: { part: Tokens; quantity: Quantity; scale: Scale; pinned: number | null }) {
  return useMemo(() => {
    const values = valuesOf(part, quantity);
    return (
      <>
        {part.ids.map((id, index) => {
          const at = part.start + index;
          const paint = scale.paint(values?.[index] ?? null);
          const sampled = part.sampled[index];
          return (
            <span
              key={at}
              id={`token-${at}`}
              data-at={at}
              class={`t ${sampled ? "trained" : "context"}${paint?.strong ? " strong" : ""}${pinned === at ? " at" : ""}`}
              style={paint ? { background: paint.background } : undefined}
            >
              {part.texts === null ? `${id} ` : shown(part.texts[index] ?? "")}
            </span>
          );
        })}
      </>
    );
  }, [part, quantity, scale, pinned]);
}

const LONGEST = 400;

/** The text of a token, its line ends and what cannot be seen named. */
function shown(text: string) {
  if (text === "") return <span class="nl">·</span>;
  const parts = text.slice(0, LONGEST).split("\n");
  if (parts.length === 1) return <Inline text={text} limit={LONGEST} />;
  return parts.map((part, at) => (
    <>
      {at > 0 && <span class="nl">{"↵\n"}</span>}
      {part !== "" && <Inline text={part} />}
    </>
  ));
}

function TokenCard({ parts, at }: { parts: Tokens[]; at: number | null }) {
  const part = at === null ? undefined : parts.find((one) => at >= one.start && at < one.start + one.ids.length);
  if (at === null || !part) {
    return <div class="token-card muted">Point at a token, or press the arrow keys, to see its id and figures.</div>;
  }
  const index = at - part.start;
  const text = part.texts?.[index];
  const figures: [string, string][] = [
    ["position", String(at)],
    ["id", String(part.ids[index])],
    ...(text === undefined ? [] : ([["text", JSON.stringify(plain(text.slice(0, 80)))]] as [string, string][])),
    ["sampled", part.sampled[index] ? "yes" : "no"],
  ];
  for (const { name, label } of QUANTITIES) {
    if (name === "sampled") continue;
    const value = valuesOf(part, name)?.[index];
    if (value !== null && value !== undefined) figures.push([label, typeof value === "boolean" ? (value ? "yes" : "no") : number(value, 4)]);
  }
  return (
    <div class="token-card" aria-live="polite">
      {figures.map(([name, value]) => (
        <span key={name}>
          <b>{name}</b>
          <bdi>{value}</bdi>
        </span>
      ))}
    </div>
  );
}
