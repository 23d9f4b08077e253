/** Small parts that several views show. */

import type { ComponentChildren } from "preact";

import type { Alarm, EpisodeRow, Outcome, RunState } from "./api";
import type { Asked } from "./client";
import { number } from "./format";
import { link } from "./router";
import { Inline } from "./visible_text";

/** What was asked for, or why it is not there. */
export function Ready<T>({ of, children }: { of: Asked<T>; children: (answer: T) => ComponentChildren }) {
  if (of.error !== null) {
    return (
      <div class="failure" role="alert">
        <Inline text={of.error} limit={2000} />
      </div>
    );
  }
  if (of.answer === null) {
    return (
      <p class="waiting" role="status">
        Reading…
      </p>
    );
  }
  return <>{children(of.answer)}</>;
}

export function Facts({ facts }: { facts: [string, ComponentChildren][] }) {
  return (
    <dl class="facts">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>
            <Inline text={name} />
          </dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

export function Problems({ problems }: { problems: string[] }) {
  if (!problems.length) return null;
  return (
    <ul class="notes" aria-label="Problems">
      {problems.map((problem) => (
        <li key={problem}>
          <Inline text={problem} limit={1000} />
        </li>
      ))}
    </ul>
  );
}

export function Alarms({ alarms }: { alarms: Alarm[] }) {
  if (!alarms.length) return null;
  return (
    <ul class="notes" aria-label="Alarms">
      {alarms.map((alarm) => (
        <li key={`${alarm.name}${alarm.since}`} class={alarm.until === null ? "bad" : ""}>
          <b>
            <Inline text={alarm.name} />
          </b>{" "}
          <Inline text={alarm.sentence} limit={1000} />{" "}
          <span class="muted">
            {alarm.until === null ? `since step ${alarm.since}` : `steps ${alarm.since} to ${alarm.until}, over`}
          </span>
        </li>
      ))}
    </ul>
  );
}

const STATES: Record<RunState, string> = { running: "accent live", finished: "good", interrupted: "warn", failed: "bad", stopped: "warn" };

export function State({ state }: { state: RunState }) {
  return <span class={`chip ${STATES[state] ?? ""}`}>{state}</span>;
}

const OUTCOMES: Record<Outcome, string> = { completed: "good", truncated: "warn", failed: "bad" };

export function OutcomeChip({ row }: { row: Pick<EpisodeRow, "outcome" | "stop_reason"> }) {
  return (
    <span class={`chip ${OUTCOMES[row.outcome] ?? ""}`}>
      {row.outcome}
      {row.outcome === "completed" ? "" : <>: <Inline text={row.stop_reason} limit={60} /></>}
    </span>
  );
}

export function Signed({ value }: { value: number | null }) {
  if (value === null) return <>–</>;
  return <>{value > 0 ? `+${number(value, 3)}` : number(value, 3)}</>;
}

export function episodeLink(run: string, row: { set: string; step: number; episode_id: string }, query: Record<string, string | number> = {}): string {
  return link(["run", run, "episode", row.episode_id], { set: row.set, step: row.step, ...query });
}

export function groupLink(run: string, row: { set: string; step: number; group_id: string }): string {
  return link(["run", run, "group", row.group_id], { set: row.set, step: row.step });
}

export const COLORS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
/** Curves whose colours come round again are dashed. */
export const DASHES: (number[] | undefined)[] = [undefined, [6, 3], [2, 3], [8, 3, 2, 3]];
