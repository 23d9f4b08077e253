/** Asks the server, or the file that the page was exported to. Answers are kept while nothing in their run changes. */

import { useEffect, useRef, useState } from "preact/hooks";

import type { Live, RequestPath, Requests } from "./api";
import { requestKey } from "./api";
import { answerFrom, exported } from "./embedded";

const KEPT = 60;
const POLL_MS = 2000;

type Answer = Requests[RequestPath]["answer"];
const kept = new Map<string, { version: string; answer: Promise<Answer> }>();

/** How often each run has changed since the page was opened. */
const changes = new Map<string, number>();
let anyChange = 0;

/** Changes when what a request asks may have: the runs that it names have. */
function versionOf(parameters: object): string {
  const { run, a, b } = parameters as { run?: string | string[]; a?: string; b?: string };
  const runs = [run, a, b].flat().filter((one) => one !== undefined);
  return runs.length ? runs.map((one) => changes.get(one) ?? 0).join() : String(anyChange);
}

async function send(key: string): Promise<unknown> {
  let response: Response;
  try {
    response = await fetch(key, { headers: { Accept: "application/json" } });
  } catch {
    throw new Error("The server does not answer. Is `polyturn view` still running?");
  }
  const body = (await response.json().catch(() => null)) as { error?: string } | null;
  if (!response.ok) throw new Error(body?.error ?? `The server answered ${response.status}.`);
  return body;
}

export function ask<Path extends RequestPath>(path: Path, parameters: Requests[Path]["parameters"]): Promise<Requests[Path]["answer"]> {
  const key = requestKey(path, parameters);
  const version = versionOf(parameters);
  const before = kept.get(key);
  kept.delete(key);
  if (before?.version === version) {
    kept.set(key, before);
    return before.answer as Promise<Requests[Path]["answer"]>;
  }
  const file = exported();
  const answer = file ? Promise.resolve().then(() => answerFrom(file, path, parameters)) : send(key);
  kept.set(key, { version, answer: answer as Promise<Answer> });
  answer.catch(() => kept.delete(key));
  for (const oldest of kept.keys()) {
    if (kept.size <= KEPT) break;
    kept.delete(oldest);
  }
  return answer as Promise<Requests[Path]["answer"]>;
}

export interface Asked<T> {
  answer: T | null;
  error: string | null;
  /** Whether another answer is on its way; `answer` is then the one before. */
  pending: boolean;
}

/** The answer to a request, anew when it or its run changes. `parameters` null: nothing is asked. */
export function useAnswer<Path extends RequestPath>(
  path: Path,
  parameters: Requests[Path]["parameters"] | null,
): Asked<Requests[Path]["answer"]> {
  const key = parameters === null ? "" : requestKey(path, parameters);
  const changed = useChanges();
  const version = parameters === null ? "" : versionOf(parameters);
  const [state, setState] = useState<Asked<Requests[Path]["answer"]> & { key: string }>({ key, answer: null, error: null, pending: true });
  useEffect(() => {
    if (parameters === null) return;
    let stale = false;
    setState((before) => ({ ...before, pending: true }));
    ask(path, parameters).then(
      (answer) => stale || setState({ key, answer, error: null, pending: false }),
      (error: Error) => stale || setState({ key, answer: null, error: error.message, pending: false }),
    );
    return () => {
      stale = true;
    };
  }, [key, version]);
  void changed;
  return parameters === null ? { answer: null, error: null, pending: false } : state;
}

const CHANGED = "runschange";

export function useChanges(): number {
  const [count, setCount] = useState(anyChange);
  useEffect(() => {
    const listener = () => setCount(anyChange);
    addEventListener(CHANGED, listener);
    return () => removeEventListener(CHANGED, listener);
  }, []);
  return count;
}

/** Asks from time to time what has changed, while somebody looks. */
export function startLive(): void {
  if (exported()) return;
  let cursor: string | undefined;
  const poll = async () => {
    if (document.visibilityState === "visible") {
      try {
        const live = (await send(requestKey("/api/live", { cursor }))) as Live;
        // The first answer names all runs: nothing of them has been asked before.
        if (cursor !== undefined && live.changed.length) {
          for (const run of live.changed) changes.set(run, (changes.get(run) ?? 0) + 1);
          anyChange += 1;
          dispatchEvent(new Event(CHANGED));
        }
        cursor = live.cursor;
      } catch {
        // A server that was stopped is told by whatever is asked next.
      }
    }
    setTimeout(poll, POLL_MS);
  };
  void poll();
}

/** A value that has not changed for some time: what is typed is asked when the typing rests. */
export function useRested<T>(value: T, milliseconds: number): T {
  const [rested, setRested] = useState(value);
  const first = useRef(true);
  useEffect(() => {
    if (first.current) {
      first.current = false;
      return;
    }
    const timer = setTimeout(() => setRested(value), milliseconds);
    return () => clearTimeout(timer);
  }, [value, milliseconds]);
  return rested;
}
